"""The leveller against a slow search, and its exactness."""

import numpy as np
import pytest
from control_toys import ToyAsk, ToyFleet
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.contracts.control import RoundContext
from fedsim.control.recentre import recentre
from fedsim.control.solver import common_deadline, largest_ranks, level, ratio_grid
from fedsim.rng import Stream, generator


def _slow_mean(times, ratios, deadline):
    """Mean ratio when each device takes its first ratio that meets the deadline, else its first fastest one."""
    chosen = []
    for time_row, ratio_row in zip(times, ratios, strict=True):
        meets = [index for index, time in enumerate(time_row) if time <= deadline]
        chosen.append(ratio_row[meets[0] if meets else int(np.argmin(time_row))])
    return float(np.mean(chosen))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.integers(2, 8),
    st.floats(0.0, 1.0),
    st.booleans(),
    st.sampled_from([1, 3, 4096]),
)
def test_deadline_is_the_smallest_that_keeps_the_schedule(seed, clients, points, target, falling, sample):
    draw = np.random.default_rng(seed)
    # Whole numbers make ties and plateaus common; not falling: times need not fall with the ratio.
    times = draw.integers(1, 12, (clients, points)).astype(float)
    times = -np.sort(-times, axis=1) if falling else times
    grid = np.sort(draw.random(points))
    low, high = np.sort(draw.random((2, clients)), axis=0)
    ratios = np.clip(grid, low[:, None], high[:, None])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsim.control.solver._SAMPLE", sample)
        deadline, ratio = common_deadline(times.T, grid, low, high, target)
    slow = [value for value in np.unique(times) if _slow_mean(times, ratios, value) <= target]
    if slow:
        assert deadline == min(slow)
    nearest = min(max(target, ratios[:, 0].mean()), ratios[:, -1].mean())
    assert ratio.mean() == pytest.approx(nearest, abs=1e-9)
    assert (ratio >= ratios[:, 0]).all()
    assert (ratio <= ratios[:, -1]).all()
    if slow and falling:
        # Topping up to the schedule never makes a device miss a deadline that it met.
        for row in range(clients):
            reached = times[row, np.searchsorted(ratios[row], ratio[row] + 1e-9, side="right") - 1]
            assert reached <= max(deadline, times[row].min())


def _sorted_deadline(times, grid, low, high, target):
    """`common_deadline` by sorting every time, one bisection over all."""
    ratios = np.clip(grid, low[:, None], high[:, None])
    best = np.minimum.accumulate(times, axis=1)
    rows = np.arange(low.size)

    def ratio_at(deadline):
        return ratios[rows, (best > np.maximum(deadline, best[:, -1:])).sum(axis=1)]

    candidates = np.unique(best)
    first, last = 0, candidates.size - 1
    while first < last:
        middle = (first + last) // 2
        if ratio_at(candidates[middle]).mean() <= target:
            last = middle
        else:
            first = middle + 1
    under, over = ratio_at(candidates[last]), ratio_at(candidates[last - 1]) if last > 0 else ratios[:, -1]
    missing, room = target - under.mean(), over.mean() - under.mean()
    part = min(1.0, max(0.0, missing / room)) if room > 0 else 0.0
    return candidates[last], recentre(under + part * (over - under), target, ratios[:, 0], ratios[:, -1])


@pytest.mark.parametrize("target", [0.0, 0.2, 0.35, 0.5, 0.9])
@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("digits", [2, 12])
def test_sampled_search_equals_sorting_everything(target, spread, digits):
    draw = generator(7, Stream.POLICY)
    clients, grid = 700, np.linspace(0.0, 0.8, 81)
    falling = 1.0 - 0.9 * grid + 0.02 * draw.random((clients, grid.size))
    times = np.round(np.exp(spread * draw.normal(size=(clients, 1))) * falling, digits) + 1.0
    low = draw.uniform(0.0, 0.3, clients)
    high = low + draw.uniform(0.0, 0.5, clients)
    deadline, ratio = common_deadline(times.T, grid, low, high, target)
    slow_deadline, slow_ratio = _sorted_deadline(times, grid, low, high, target)
    assert deadline == slow_deadline
    np.testing.assert_array_equal(ratio, slow_ratio)


def test_identical_devices_share_a_step_alike():
    times = np.tile([[4.0], [3.0], [2.0]], (1, 4))
    _, ratio = common_deadline(times, np.array([0.0, 0.25, 0.5]), np.zeros(4), np.full(4, 0.5), 0.3)
    np.testing.assert_allclose(ratio, 0.3, atol=1e-12)


def test_ranks_fill_the_spare_time_up_to_what_is_allowed():
    times = np.array([[1.0, 2.0, 3.0], [9.0, 10.0, 11.0], [12.0, 13.0, 14.0]])
    fastest = np.array([0, 0, 0])
    np.testing.assert_array_equal(largest_ranks(times, 12.0, fastest, np.array([2, 2, 2])), [2, 2, 0])
    np.testing.assert_array_equal(largest_ranks(times, 10.0, fastest, np.array([1, 2, 2])), [1, 1, 0])
    np.testing.assert_array_equal(largest_ranks(times, 10.0, fastest + 1, np.array([2, 0, 2])), [2, 0, 1])


def test_caution_concerns_ranks_only():
    ask, fleet = ToyAsk(), ToyFleet(20, 3)
    context = RoundContext(0, np.arange(20), np.zeros(20), np.zeros(20), np.full(20, 0.8), 0.4, 0.8, 1.0)

    def times(clients, work):
        return fleet.expected(0, clients, work)

    plain = level(context, ask, times)
    cautious = level(context, ask, times, cautious_times=lambda clients, work: 1.1 * times(clients, work))
    np.testing.assert_array_equal(plain.ratio, cautious.ratio)
    assert (cautious.rank <= plain.rank).all()
    assert (cautious.rank < plain.rank).any()


@pytest.mark.parametrize("groups", [4, 100])
def test_level_is_within_bounds_on_schedule_and_level(groups):
    clients = 40
    ask, fleet = ToyAsk(groups=groups), ToyFleet(clients, 3)
    ids = np.arange(clients)
    before = np.full(clients, 0.3)
    context = RoundContext(0, ids, before, np.zeros(clients), np.full(clients, 0.8), 0.4, 0.8, 1.0)
    arms = level(context, ask, lambda clients, work: fleet.expected(0, clients, work))
    assert arms.ratio.mean() == pytest.approx(0.4, abs=1e-9)
    time_s = fleet.expected(0, ids, ask.work(before, arms.ratio, arms.rank))
    flat = fleet.expected(0, ids, ask.work(before, np.full(clients, 0.4), 8))
    assert time_s.max() < 0.85 * flat.max()
    assert (1 - time_s / time_s.max()).mean() < 0.5 * (1 - flat / flat.max()).mean()


def test_chunks_change_nothing(monkeypatch):
    ask, fleet = ToyAsk(), ToyFleet(30, 4)
    draw = np.random.default_rng(0)
    low = draw.uniform(0, 0.4, 30)
    context = RoundContext(0, np.arange(30), low, low, low + 0.1, 0.25, 0.8, 0.1)

    def times(clients, work):
        return fleet.expected(0, clients, work)

    whole = level(context, ask, times)
    monkeypatch.setattr("fedsim.control.solver._CHUNK", 7)
    parts = level(context, ask, times)
    np.testing.assert_array_equal(whole.ratio, parts.ratio)
    np.testing.assert_array_equal(whole.rank, parts.rank)


def test_grid_covers_all_bounds_and_nothing_beyond_them():
    def grid(low, high):
        low, high = np.array(low), np.array(high)
        return ratio_grid(RoundContext(0, np.arange(low.size), low, low, high, 0.3, 0.8, 0.1))

    np.testing.assert_array_equal(grid([0.0, 0.2], [0.1, 0.8]), np.linspace(0.0, 0.8, 81))
    np.testing.assert_array_equal(grid([0.0, 0.0], [0.0, 0.0]), [0.0])
    # The points next to the bounds stay: clipped, they are the bounds.
    np.testing.assert_allclose(grid([0.304, 0.33], [0.315, 0.336]), [0.30, 0.31, 0.32, 0.33, 0.34])


def test_a_fleet_that_is_not_pruned_is_levelled_by_rank_alone():
    fleet, ask, nothing = ToyFleet(6, 3), ToyAsk(), np.zeros(6)
    context = RoundContext(0, np.arange(6), nothing, nothing, nothing, 0.0, 0.0, 0.1)
    np.testing.assert_array_equal(ratio_grid(context), [0.0])

    def times(clients, work):
        return fleet.expected(0, clients, work)

    arms = level(context, ask, times)
    np.testing.assert_array_equal(arms.ratio, nothing)
    fastest_s = times(context.clients, ask.work(nothing, nothing, nothing + 2))
    assert arms.rank[np.argmax(fastest_s)] == 2
    assert arms.rank.max() > 2
    assert times(context.clients, ask.work(nothing, nothing, arms.rank)).max() == fastest_s.max()
