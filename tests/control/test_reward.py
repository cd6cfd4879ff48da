"""The reward: range, terms, normaliser, checkpoint."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedsim.control.reward import RewardModel
from fedsim.settings import RewardSettings

NAN = float("nan")


def _round(model, size=4, **changed):
    return _rewards(model, size, **changed).reward


def _rewards(model, size=4, **changed):
    values = {
        "loss_before": np.full(size, 1.0),
        "loss_after": np.full(size, 0.8),
        "ratio_before": np.zeros(size),
        "ratio": np.full(size, 0.05),
        "step_max": 0.1,
        "target": 0.5,
        "lora_importance": np.full(size, 2.0),
        "time_s": np.full(size, 10.0),
        "arrived": np.ones(size, dtype=bool),
    }
    return model.compute(**(values | changed))


losses = arrays(np.float64, 6, elements=st.floats(0.0, 50.0) | st.just(NAN))
ratios = arrays(np.float64, 6, elements=st.floats(0.0, 0.9))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["product", "fedmp"]),
    st.floats(0, 1),
    st.floats(0, 50),
    st.tuples(*[st.sampled_from([0.0, 0.25, 1.0])] * 3),
    st.lists(
        st.tuples(
            losses,
            losses,
            ratios,
            ratios,
            arrays(np.float64, 6, elements=st.floats(0.0, 1e3) | st.just(NAN)),
            arrays(np.float64, 6, elements=st.floats(1e-3, 1e6)),
            arrays(np.bool_, 6),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_reward_is_in_the_unit_interval_exactly_where_clients_arrived(kind, share, kappa, weights, rounds):
    model = RewardModel(RewardSettings(kind=kind, time_share=share, time_penalty=kappa, weights=weights), clients=6)
    for before, after, ratio_before, ratio, importance, time_s, arrived in rounds:
        rewards = _rewards(
            model,
            6,
            loss_before=before,
            loss_after=after,
            ratio_before=ratio_before,
            ratio=ratio,
            lora_importance=importance,
            time_s=np.where(arrived, time_s, NAN),
            arrived=arrived,
        )
        reward = rewards.reward
        for column in (rewards.loss, rewards.progress, rewards.importance, rewards.time, reward):
            assert np.isnan(column[~arrived]).all()
            assert ((column >= 0.0) & (column <= 1.0) | np.isnan(column)).all()
        assert (reward[arrived] >= 0.0).all()
        assert (reward[arrived] <= 1.0).all()


def test_formula_by_hand():
    model = RewardModel(RewardSettings(time_share=0.5, time_penalty=2.0), clients=4)
    # Relative reductions 0.1, 0.2, 0.3, 0.4: their 90th percentile is 0.37.
    rewards = _rewards(
        model,
        loss_before=[1.0, 1.0, 1.0, 2.0],
        loss_after=[0.9, 0.8, 0.7, 1.2],
        ratio_before=[0.0, 0.0, 0.5, 0.0],
        ratio=[0.05, 0.1, 0.5, 0.0],
        lora_importance=[1.0, 2.0, 4.0, NAN],
        time_s=[8.0, 12.0, 10.0, 10.0],
    )
    learning = [
        (0.1 / 0.37 + 0.25 * 0.5 + 0.25 * 0.25) / 1.5,
        (0.2 / 0.37 + 0.25 * 1.0 + 0.25 * 0.5) / 1.5,
        (0.3 / 0.37 + 0.25 * 1.0) / 1.25,  # stood at its target: no progress term
        (1.0 + 0.25 * 0.0) / 1.25,  # no importance
    ]
    expected = [(0.5 + 0.5 * value) / (1 + 2 * gap) for value, gap in zip(learning, [0.2, 0.2, 0.0, 0.0], strict=True)]
    np.testing.assert_allclose(rewards.reward, expected, rtol=1e-12)
    np.testing.assert_allclose(rewards.loss, [0.1 / 0.37, 0.2 / 0.37, 0.3 / 0.37, 1.0], rtol=1e-12)
    np.testing.assert_array_equal(rewards.progress, [0.5, 1.0, NAN, 0.0])
    np.testing.assert_array_equal(rewards.importance, [0.25, 0.5, 1.0, NAN])
    np.testing.assert_allclose(rewards.time, [1 / 1.4, 1 / 1.4, 1.0, 1.0], rtol=1e-12)


def test_timing_only_leaves_the_time_factor():
    nothing = {"loss_before": np.full(4, NAN), "loss_after": np.full(4, NAN), "lora_importance": np.full(4, NAN)}
    time_s = np.array([5.0, 10.0, 15.0, 10.0])
    reward = _round(RewardModel(RewardSettings(time_penalty=2.0), 4), time_s=time_s, **nothing)
    np.testing.assert_allclose(reward, [0.5, 1.0, 0.5, 1.0])
    alone = _rewards(RewardModel(RewardSettings(time_penalty=2.0), 4), time_s=time_s, **nothing)
    np.testing.assert_array_equal(alone.time, alone.reward)
    assert np.isnan([alone.loss, alone.progress, alone.importance]).all(), "progress alone would teach to prune"
    fedmp = _rewards(RewardModel(RewardSettings(kind="fedmp"), 4), time_s=time_s, **nothing)
    # 1/gap = 0.2, 2, 0.2, 2 (the least gap is 5% of 10 s); their 90th percentile is 2.
    np.testing.assert_allclose(fedmp.reward, [0.1, 1.0, 0.1, 1.0])
    assert np.isnan([fedmp.loss, fedmp.progress, fedmp.importance, fedmp.time]).all()


def test_mean_time_counts_arrived_clients_only():
    model = RewardModel(RewardSettings(), 4)
    arrived = np.array([True, True, False, False])
    reward = _round(model, time_s=[10.0, 10.0, 1e9, NAN], arrived=arrived)
    assert reward[0] == reward[1] > 0.5
    assert np.isnan(reward[2:]).all()
    assert np.isnan(_round(model, arrived=np.zeros(4, dtype=bool))).all()
    with pytest.raises(ValueError, match="positive"):
        _round(model, time_s=[NAN, 1.0, 1.0, 1.0])


def test_normaliser_runs_over_rounds_and_travels_in_the_state():
    first, second = (RewardModel(RewardSettings(weights=(1.0, 0.0, 0.0)), 4) for _ in range(2))
    _round(first, loss_after=np.full(4, 0.1))
    fresh = _round(RewardModel(RewardSettings(weights=(1.0, 0.0, 0.0)), 4), loss_after=np.full(4, 0.7))
    second.restore(first.state())
    later = _round(first, loss_after=np.full(4, 0.7))
    np.testing.assert_array_equal(later, _round(second, loss_after=np.full(4, 0.7)))
    np.testing.assert_allclose(fresh, 1.0)
    np.testing.assert_allclose(later, 0.3 / 0.9)


def test_old_reductions_leave_the_window():
    model = RewardModel(RewardSettings(weights=(1.0, 0.0, 0.0)), 4)
    _round(model, loss_after=np.zeros(4))
    for _ in range(64):
        reward = _round(model, loss_after=np.full(4, 0.9))
    np.testing.assert_allclose(reward, 1.0)
