"""S-UCB: what it learns, and its housekeeping."""

import numpy as np
import pytest
from control_toys import ToyAsk, ToyFleet, play
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.contracts.control import Feedback, RoundContext, Work
from fedsim.control.policies import PolicyInputs, make_policy
from fedsim.rng import Stream, generator, uniforms
from fedsim.settings import ControlSettings, PruneSettings

RANKS = (2, 4, 8, 16, 32)
ASK = ToyAsk(ranks=RANKS)


def _context(index, size, low=0.0, high=0.8, schedule=0.4):
    return RoundContext(
        index,
        np.arange(size),
        np.full(size, low),
        np.full(size, low),
        np.full(size, high),
        schedule,
        0.8,
        0.05,
    )


def _feedback(context, arms, reward):
    nothing = np.zeros(context.clients.size)
    work = Work(nothing, nothing, nothing, nothing, nothing, nothing)
    here = np.ones(context.clients.size, dtype=bool)
    return Feedback(
        context.round_index, context.clients, nothing, arms.ratio, arms.rank, work, nothing + 1, here, reward
    )


def _drifting_peak(index, ratio, rank, size):
    """A narrow peak that wanders over the arm space, with noise in the reward."""
    x, y = ratio / 0.8, np.log2(rank / 2) / 4
    angle = 2 * np.pi * index / 480
    centre = 0.5 + 0.35 * np.cos(angle), 0.5 + 0.35 * np.sin(angle)
    clean = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * 0.2**2))
    noise = 0.05 * generator(3, Stream.COMPUTE_JITTER, index).normal(size=size)
    return clean, np.clip(clean + noise, 0.0, 1.0)


def _mean_reward(name, **control):
    """Mean clean reward of 60 devices over 120 rounds on the drifting peak, all arms always feasible."""
    size = 60
    if name == "chance":
        ids = np.arange(size)
        arms = [
            (
                0.8 * uniforms(0, Stream.POLICY, ids, t),
                np.array(RANKS)[(5 * uniforms(0, Stream.POLICY_RANK, ids, t)).astype(int)],
            )
            for t in range(120)
        ]
        return np.mean([_drifting_peak(t, ratio, rank, size)[0] for t, (ratio, rank) in enumerate(arms)])
    settings = ControlSettings(policy="sucb", arms="absolute", smooth=False, **control)
    policy = make_policy(PolicyInputs(settings, clients=size, ask=ASK, seed=0, fixed_rank=8))
    total = []
    for index in range(120):
        context = _context(index, size)
        arms = policy.select(context)
        clean, noisy = _drifting_peak(index, arms.ratio, arms.rank, size)
        policy.update(_feedback(context, arms, noisy))
        total.append(clean.mean())
    return np.mean(total)


def test_follows_a_drifting_peak_far_better_than_chance():
    chance = _mean_reward("chance")
    learned = _mean_reward("sucb")
    textbook = _mean_reward("sucb", exploration=2**0.5)
    assert 0.15 < chance < 0.3
    assert learned > 2.0 * chance
    assert learned > 1.3 * textbook


def test_warm_up_explores_ranks_and_leaves_the_ratio_at_zero():
    for arms in ("offset", "absolute"):
        policy = make_policy(
            PolicyInputs(ControlSettings(policy="sucb", arms=arms), clients=20, ask=ASK, seed=1, fixed_rank=8)
        )
        seen = []
        for index in range(12):
            context = _context(index, 20, high=0.0, schedule=0.0)
            chosen = policy.select(context)
            assert (chosen.ratio == 0.0).all()
            seen.append(chosen.rank)
            policy.update(_feedback(context, chosen, np.full(20, 0.5)))
        assert set(np.concatenate(seen)) == set(RANKS)


def test_offset_keeps_the_fleet_mean_on_the_schedule():
    fleet = ToyFleet(20, 0)
    played = play(
        "sucb",
        ask=ASK,
        expected=fleet.expected,
        measured=fleet.measured,
        clients=20,
        rounds=60,
        control={"smooth": False},
    )
    for ratio, schedule, (low, high) in zip(played.ratios, played.schedule, played.reachable, strict=True):
        assert ratio.mean() == pytest.approx(min(max(schedule, low), high), abs=1e-9)


def test_smooth_play_moves_to_touching_leaves_only():
    settings = ControlSettings(policy="sucb", arms="absolute", smooth=True)
    policy = make_policy(PolicyInputs(settings, clients=30, ask=ASK, seed=2, fixed_rank=8))
    rows = np.arange(30)

    def last_box():
        state = policy.state()
        return [state[name][:, state["played"], rows].T for name in ("lower", "upper")]

    for index in range(80):
        before_low, before_high = last_box()
        context = _context(index, 30)
        arms = policy.select(context)
        low, high = last_box()
        assert ((low <= before_high) & (high >= before_low)).all()
        policy.update(_feedback(context, arms, uniforms(9, Stream.POLICY, context.clients, index)))
    assert (policy.state()["leaves"] == 16).any()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["middle", "played"]), st.floats(0.1, 1.0), st.booleans())
def test_leaves_always_tile_the_square(seed, cut, split, smooth):
    chosen = ControlSettings(policy="sucb", arms="absolute", cut=cut, split=split, smooth=smooth)
    policy = make_policy(PolicyInputs(chosen, clients=5, ask=ASK, seed=seed, fixed_rank=8))
    for index in range(60):
        context = _context(index, 5)
        arms = policy.select(context)
        policy.update(_feedback(context, arms, uniforms(seed, Stream.POLICY_RANK, context.clients, index)))
    state = policy.state()
    for client in range(5):
        lower, upper = (state[name][:, : state["leaves"][client], client].T for name in ("lower", "upper"))
        assert (upper > lower).all()
        assert (upper - lower).prod(axis=1).sum() == pytest.approx(1.0)
        points = np.random.default_rng(seed).random((50, 2))
        inside = (points[:, None] >= lower) & (points[:, None] <= upper)
        np.testing.assert_array_equal(inside.all(axis=2).sum(axis=1), 1)
        if cut == "middle" and split >= 0.25:
            assert state["leaves"][client] <= 16


def test_boxes_grow_when_played_cuts_need_room():
    chosen = ControlSettings(policy="sucb", arms="absolute", cut="played", split=0.02, smooth=False)
    policy = make_policy(PolicyInputs(chosen, clients=3, ask=ASK, seed=0, fixed_rank=8))
    for index in range(60):
        context = _context(index, 3)
        policy.update(_feedback(context, policy.select(context), np.full(3, 0.5)))
    assert (policy.state()["leaves"] > 16).all()


def test_absent_clients_neither_learn_nor_forget():
    policy = make_policy(PolicyInputs(ControlSettings(policy="sucb"), clients=4, ask=ASK, seed=0, fixed_rank=8))
    context = _context(0, 4)
    policy.update(_feedback(context, policy.select(context), np.full(4, 0.5)))
    before = policy.state()
    some = _context(1, 2)
    arms = policy.select(some)
    reward = np.array([1.0, np.nan])
    policy.update(_feedback(some, arms, reward))
    after = policy.state()
    np.testing.assert_array_equal(before["count"][:, 2:], after["count"][:, 2:])
    # Client 1 played but has no reward: it forgets, and learns nothing; nor is its leaf cut.
    np.testing.assert_allclose(after["count"][:, 1], 0.98 * before["count"][:, 1])
    assert after["leaves"][1] == before["leaves"][1]
    assert after["count"][:, 0].sum() > before["count"][:, 0].sum()


def test_absolute_arms_never_undo_a_cut():
    fleet = ToyFleet(20, 0)
    prune = PruneSettings(target=0.5)
    played = play(
        "sucb",
        ask=ASK,
        expected=fleet.expected,
        measured=fleet.measured,
        clients=20,
        rounds=80,
        prune=prune,
        control={"arms": "absolute"},
    )
    ratios = np.array(played.ratios)
    assert (np.diff(ratios, axis=0) >= -1e-12).all()
    np.testing.assert_allclose(ratios[-1], 0.5)


def test_blocks_of_clients_and_room_for_leaves_change_nothing(monkeypatch):
    def trajectory():
        policy = make_policy(PolicyInputs(ControlSettings(policy="sucb"), clients=9, ask=ASK, seed=4, fixed_rank=8))
        ratios = []
        for index in range(40):
            context = _context(index, 9)
            arms = policy.select(context)
            policy.update(_feedback(context, arms, uniforms(6, Stream.POLICY, context.clients, index)))
            ratios.append(np.concatenate([arms.ratio, arms.rank]))
        return np.array(ratios)

    whole = trajectory()
    monkeypatch.setattr("fedsim.control.sucb._BLOCK", 4)
    monkeypatch.setattr("fedsim.control.sucb._FIRST_LEAVES", 16)
    np.testing.assert_array_equal(trajectory(), whole)


def test_state_of_an_idle_client_is_small():
    policy = make_policy(PolicyInputs(ControlSettings(policy="sucb"), clients=30, ask=ASK, seed=0, fixed_rank=8))

    def bytes_per_client():
        return sum(array.nbytes for array in policy.state().values()) / 30

    assert bytes_per_client() <= 256
    for index in range(60):
        context = _context(index, 30)
        policy.update(_feedback(context, policy.select(context), np.full(30, 0.5)))
    assert (policy.state()["leaves"] > 8).any()
    assert bytes_per_client() <= 1024
