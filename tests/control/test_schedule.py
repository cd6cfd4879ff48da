"""Cubic schedule and feasible bounds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.control.schedule import cubic_ratio, default_step_max, feasible_bounds, ratio_cap
from fedsim.settings import PruneSettings


@given(st.integers(0, 20), st.integers(1, 60), st.floats(0.0, 0.95))
def test_schedule_is_zero_then_rises_then_stays_at_the_target(warmup, length, target):
    end = warmup + length
    values = np.array([cubic_ratio(index, warmup, end, target) for index in range(end + 10)])
    assert (values[:warmup] == 0.0).all()
    assert values[end - 1 :] == pytest.approx(target, abs=1e-12)
    assert (np.diff(values) >= -1e-15).all()
    if target > 1e-6:
        assert values[warmup] > 0.0


def test_schedule_matches_the_published_formula():
    # Zhu and Gupta: s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3, here s_i = 0, s_f = 0.5, t - t_0 = 2 of 4.
    assert cubic_ratio(11, 10, 14, 0.5) == pytest.approx(0.5 + (0 - 0.5) * (1 - 2 / 4) ** 3)
    with pytest.raises(ValueError, match="end_round 3"):
        cubic_ratio(0, 3, 3, 0.5)


def test_default_step_follows_the_schedule_and_the_sampling():
    first = cubic_ratio(10, 10, 60, 0.5)
    assert default_step_max(10, 60, 0.5, clients=80, participants_per_round=80) == 0.05
    assert default_step_max(10, 60, 0.5, clients=80, participants_per_round=16) == pytest.approx(1.5 * first * 5)
    assert default_step_max(10, 11, 0.9, clients=80, participants_per_round=8) == 1.0


def _bounds(prune, round_index, before):
    return feasible_bounds(
        prune, round_index=round_index, ratio_before=before, warmup_rounds=5, end_round=20, step_max=0.1
    )


def test_bounds_follow_the_rules():
    before = np.array([0.0, 0.3, 0.48])
    mean = PruneSettings(target=0.5, target_scope="fleet_mean", max_ratio=0.55, reversible=True)
    every = PruneSettings(target=0.5, target_scope="every_device", max_ratio=0.55)
    assert ratio_cap(mean) == 0.55
    assert ratio_cap(every) == 0.5
    for prune, index, low, high in [
        (mean, 4, [0, 0, 0], [0, 0, 0]),
        (mean, 5, [0, 0, 0], [0.1, 0.4, 0.55]),
        (mean, 20, [0, 0, 0], [0.1, 0.4, 0.55]),
        (every, 5, [0, 0.3, 0.48], [0.1, 0.4, 0.5]),
        (every, 19, [0, 0.3, 0.48], [0.1, 0.4, 0.5]),
        (every, 20, [0.1, 0.4, 0.5], [0.1, 0.4, 0.5]),
    ]:
        got_low, got_high = _bounds(prune, index, before)
        np.testing.assert_allclose(got_low, low, atol=1e-15)
        np.testing.assert_allclose(got_high, high, atol=1e-15)


@given(st.booleans(), st.sampled_from(["fleet_mean", "every_device"]), st.integers(0, 30), st.lists(st.floats(0, 0.8)))
def test_bounds_are_never_empty_and_steps_lead_to_the_target(reversible, scope, round_index, before):
    prune = PruneSettings(target=0.5, target_scope=scope, max_ratio=0.8, reversible=reversible)
    low, high = _bounds(prune, round_index, np.array(before))
    assert (low <= high).all()
    if not reversible:
        assert (low >= np.array(before)).all()


def test_every_device_reaches_its_target_by_steps():
    prune = PruneSettings(target=0.5)
    ratio = np.array([0.0, 0.2, 0.5])
    for index in range(20, 26):
        ratio, _ = _bounds(prune, index, ratio)
    np.testing.assert_allclose(ratio, 0.5)
