"""What holds for every policy: the registry, checkpoints, keyed draws, bounds."""

import numpy as np
import pytest
from control_toys import ToyAsk, ToyFleet, play

from fedsim.contracts.control import Feedback, Policy, RoundContext, Work
from fedsim.control.fixed_arms import Uniform
from fedsim.control.policies import POLICIES, PolicyEntry, PolicyInputs, make_policy
from fedsim.errors import ConfigError, RunError
from fedsim.rng import Stream, uniforms
from fedsim.settings import ControlSettings

ASK = ToyAsk()
NAMES = sorted(POLICIES)


def _make(name, clients=12, fleet=None):
    expected = (fleet or ToyFleet(clients, 0)).expected
    return make_policy(
        PolicyInputs(
            ControlSettings(policy=name),
            clients=clients,
            ask=ASK,
            seed=7,
            fixed_rank=8,
            expected_time=expected,
            speed_class=np.arange(clients) % 3,
        )
    )


def test_names_and_protocol():
    bandits = ["d_ucb_grid", "e_ucb", "sucb", "thompson"]
    assert sorted([*bandits, "balanced", "oracle", "random", "rank_growth", "static_rank", "uniform"]) == NAMES
    for name in NAMES:
        assert isinstance(_make(name), Policy)


def test_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown control.policy 'blanced'; did you mean 'balanced'\?"):
        _make("blanced")


def test_oracle_needs_expected_times():
    with pytest.raises(ConfigError, match="'oracle' needs"):
        make_policy(PolicyInputs(ControlSettings(policy="oracle"), clients=3, ask=ASK, seed=0, fixed_rank=8))


def test_a_registered_policy_is_found_at_call_time(monkeypatch):
    def mine(inputs):
        return Uniform(int(inputs.ask.ranks[-1]))

    monkeypatch.setitem(POLICIES, "mine", PolicyEntry("mine", mine))
    context = RoundContext(
        0,
        np.arange(2),
        np.zeros(2),
        np.zeros(2),
        np.array([0.2, 0.05]),
        schedule_ratio=0.1,
        ratio_max=0.8,
        step_max=0.2,
    )
    arms = _make("mine").select(context)
    np.testing.assert_array_equal(arms.rank, [32, 32])
    np.testing.assert_allclose(arms.ratio, [0.1, 0.05])


@pytest.mark.parametrize("name", NAMES)
def test_restored_midway_goes_on_identically(name):
    fleet = ToyFleet(12, 0, period=10, compute_modes=(1.0, 2.0))

    def reload(index, policy):
        if index != 23:
            return policy
        fresh = _make(name, fleet=fleet)
        # As a checkpoint does it: arrays are written and read, nothing is shared.
        fresh.restore({key: array.copy() for key, array in policy.state().items()})
        return fresh

    runs = [
        play(
            name,
            ask=ASK,
            expected=fleet.expected,
            measured=fleet.measured,
            clients=12,
            participants=5,
            rounds=45,
            policy=_make(name, fleet=fleet),
            on_round=hook,
        )
        for hook in (None, reload)
    ]
    for first, second in zip(runs[0].ratios, runs[1].ratios, strict=True):
        np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(np.concatenate(runs[0].ranks), np.concatenate(runs[1].ranks))
    np.testing.assert_array_equal(runs[0].duration_s, runs[1].duration_s)


@pytest.mark.parametrize("name", ["balanced", "d_ucb_grid", "e_ucb", "rank_growth", "sucb", "thompson"])
def test_a_checkpoint_that_does_not_fit_is_refused(name):
    policy = _make(name)
    state = dict(policy.state())
    key = sorted(state)[0]
    with pytest.raises(RunError, match=f"'{key}' has shape"):
        policy.restore(state | {key: state[key][..., :-1]})
    state.pop(key)
    with pytest.raises(RunError, match=f"no array '{key}'"):
        policy.restore(state)


@pytest.mark.parametrize("name", NAMES)
def test_state_is_arrays_over_clients_only(name):
    small, large = (_make(name, clients).state() for clients in (10, 20))
    for key, array in small.items():
        assert isinstance(array, np.ndarray)
        assert array.dtype != object
        assert array.shape.count(10) == 1
        assert large[key].shape == tuple(20 if length == 10 else length for length in array.shape)


def _trajectory(name, clients):
    """Arms of clients 0 to 9 over rounds whose bounds and rewards do not depend on how many others there are."""
    policy = make_policy(
        PolicyInputs(ControlSettings(policy=name, arms="absolute"), clients=clients, ask=ASK, seed=7, fixed_rank=8)
    )
    out = []
    for index in range(30):
        ids = np.arange(clients)
        # An out-of-reach schedule is not re-centred by absolute arms; random is told its own mean.
        bounds = np.zeros(clients), np.full(clients, 0.6)
        context = RoundContext(index, ids, bounds[0], *bounds, schedule_ratio=0.3, ratio_max=0.8, step_max=0.6)
        arms = policy.select(context)
        nothing = np.zeros(clients)
        work = Work(nothing, nothing, nothing, nothing, nothing, nothing)
        reward = uniforms(1, Stream.BATCH_ORDER, ids, index)
        here = np.ones(clients, dtype=bool)
        policy.update(Feedback(index, ids, nothing, arms.ratio, arms.rank, work, nothing + 1, here, reward))
        out.append((arms.ratio[:10], arms.rank[:10]))
    return out


def test_adding_clients_leaves_the_draws_of_others_alone():
    for name in ("sucb", "random"):
        few, many = _trajectory(name, 10), _trajectory(name, 13)
        for (ratio, rank), (ratio_more, rank_more) in zip(few, many, strict=True):
            np.testing.assert_array_equal(rank, rank_more)
            if name == "sucb":
                np.testing.assert_array_equal(ratio, ratio_more)
            else:
                # Random shifts all by one amount: differences between clients that no bound holds stay.
                free = (ratio > 0) & (ratio < 0.6) & (ratio_more > 0) & (ratio_more < 0.6)
                assert free.sum() > 2
                assert np.ptp((ratio - ratio_more)[free]) < 1e-9


def test_random_is_centred_and_spread():
    context = RoundContext(
        4,
        np.arange(500),
        np.zeros(500),
        np.zeros(500),
        np.full(500, 0.6),
        schedule_ratio=0.2,
        ratio_max=0.8,
        step_max=0.6,
    )
    arms = _make("random", 500).select(context)
    assert arms.ratio.mean() == pytest.approx(0.2, abs=1e-9)
    assert arms.ratio.std() > 0.1
    assert np.bincount(np.searchsorted(ASK.ranks, arms.rank)).min() > 60
