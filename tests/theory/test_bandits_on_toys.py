"""What bandit theory promises, on toys: the best arm of a stationary one is found, and found again after a change.

The reward is a peak over the ratio (and one over the rank, where the policy chooses it) with noise; all ratios are
always feasible. Devices are independent repetitions.
"""

import numpy as np
import pytest

from fedsim.contracts.control import Feedback, RoundContext, Work
from fedsim.control.policies import PolicyInputs, make_policy
from fedsim.rng import Stream, generator
from fedsim.settings import ControlSettings

SIZE = 40
RANKS = np.array([2, 8], dtype=np.int64)


class Ranks:
    ranks = RANKS


def _play(name, best_ratio, rounds, **control):
    """Ratios and ranks played, (rounds, SIZE); `best_ratio(round)` is where the peak stands, rank 8 is worth more."""
    settings = ControlSettings(policy=name, arms="absolute", smooth=False, cut="played", **control)
    policy = make_policy(PolicyInputs(settings, clients=SIZE, ask=Ranks(), seed=1, fixed_rank=8))
    ids, nothing = np.arange(SIZE), np.zeros(SIZE)
    work = Work(nothing, nothing, nothing, nothing, nothing, nothing)
    ratios, ranks = np.zeros((rounds, SIZE)), np.zeros((rounds, SIZE))
    for index in range(rounds):
        context = RoundContext(index, ids, nothing, nothing, np.full(SIZE, 0.8), 0.4, 0.8, 0.8)
        arms = policy.select(context)
        clean = 1.0 - 1.5 * np.abs(arms.ratio - best_ratio(index)) - 0.2 * (arms.rank == 2)
        noise = 0.05 * generator(2, Stream.COMPUTE_JITTER, index).normal(size=SIZE)
        reward = np.clip(clean + noise, 0.0, 1.0)
        here = np.ones(SIZE, dtype=bool)
        policy.update(Feedback(index, ids, nothing, arms.ratio, arms.rank, work, nothing + 1, here, reward))
        ratios[index], ranks[index] = arms.ratio, arms.rank
    return ratios, ranks


def _hits(ratios, ranks, best):
    """Share of plays of the best arm: the rank, and a ratio nearer than half a step of the coarse grid."""
    return np.mean((np.abs(ratios - best) < 0.2) & (ranks == 8))


# Policy, exploration, split (3 ratios x 2 ranks on the grid; the others cut their boxes), chance of the best arm.
CASES = [("sucb", 0.1, 0.25, 1 / 4), ("e_ucb", 0.1, 0.25, 1 / 2), ("d_ucb_grid", 0.1, 0.5, 1 / 6)]
CASES += [("thompson", 0.2, 0.5, 1 / 6)]


@pytest.mark.parametrize(("name", "exploration", "split", "chance"), CASES)
def test_the_best_arm_of_a_stationary_toy_is_played_most_of_the_time(name, exploration, split, chance):
    ratios, ranks = _play(name, lambda index: 0.4, 200, discount=0.99, exploration=exploration, split=split)
    early, late = (_hits(ratios[part], ranks[part], 0.4) for part in (slice(0, 5), slice(100, None)))
    assert early < chance + 0.2
    assert late > 0.75


@pytest.mark.parametrize(("name", "exploration", "split", "chance"), CASES)
def test_discounted_statistics_recover_from_a_change_and_undiscounted_ones_do_not(name, exploration, split, chance):
    def moving(index):
        return 0.0 if index < 150 else 0.8

    recovered = {}
    for discount in (0.95, 1.0):
        ratios, ranks = _play(name, moving, 230, discount=discount, exploration=exploration, split=split)
        assert _hits(ratios[100:150], ranks[100:150], 0.0) > 0.5
        recovered[discount] = _hits(ratios[200:], ranks[200:], 0.8)
    assert recovered[0.95] > chance + 0.2
    assert recovered[0.95] > 2.0 * recovered[1.0]
