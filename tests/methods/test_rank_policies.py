"""Policies that choose ranks alone: by device class, and by salience."""

from __future__ import annotations

import numpy as np

from fedsim.contracts.control import Feedback, RoundContext
from fedsim.control.rank_growth import RankGrowth
from fedsim.control.static_rank import StaticRank
from fedsim.fleet.fleet import load_fleet
from fedsim.settings import FleetSettings

RANKS = np.array([2, 4, 8, 16])


def context(clients, round_index=0, schedule=0.0, low=0.0, high=1.0, cap=0.5):
    count = len(clients)
    return RoundContext(
        round_index=round_index,
        clients=np.asarray(clients),
        ratio_before=np.zeros(count),
        ratio_low=np.full(count, low),
        ratio_high=np.full(count, high),
        schedule_ratio=schedule,
        ratio_max=cap,
        step_max=1.0,
    )


def feedback(clients, reward):
    count = len(clients)
    return Feedback(
        round_index=0,
        clients=np.asarray(clients),
        ratio_before=np.zeros(count),
        ratio=np.zeros(count),
        rank=np.full(count, 4),
        work=None,  # the policy looks at no work
        time_s=np.ones(count),
        arrived=np.isfinite(reward),
        reward=np.asarray(reward),
    )


def test_classes_are_spread_over_the_ranks():
    classes = np.array([0, 2, 1, 1, 0])
    arms = StaticRank(RANKS, classes).select(context([0, 1, 2, 4], schedule=0.3, high=0.2))
    assert arms.rank.tolist() == [2, 16, 8, 2]
    assert arms.ratio.tolist() == [0.2] * 4
    assert StaticRank(RANKS, np.zeros(3, dtype=np.int64)).select(context([0, 2])).rank.tolist() == [16, 16]
    assert StaticRank(RANKS, np.array([0, 1])).select(context([0, 1])).rank.tolist() == [2, 16]


def test_a_fleets_classes_are_those_of_its_devices():
    for name in ("fedspine-80", "fedspine-80-modes"):
        fleet = load_fleet(FleetSettings(name=name), "fp32", 0)
        order = {"jetson-tx2": 0, "jetson-xavier-nx": 1, "jetson-agx-xavier": 2}
        assert fleet.speed_classes().tolist() == [order[str(device)] for device in fleet.device_of]


def grown(policy, reward, schedules, clients=4):
    """Ranks round after round, with the same reward each time."""
    ranks = []
    for index, schedule in enumerate(schedules):
        ranks.append(policy.select(context(range(clients), index, schedule)).rank.tolist())
        policy.update(feedback(range(clients), reward))
    return ranks


def test_ranks_grow_with_the_schedule_where_salience_is_highest():
    """First place 1 of 0..3, final budget place 2 in the mean: four steps for four clients, to the two most salient."""
    ranks = grown(RankGrowth(RANKS, 4, 4), [0.2, 1.0, 0.1, 0.9], [0.0, 0.0, 0.125, 0.25, 0.5, 0.5])
    assert ranks[:2] == [[4, 4, 4, 4]] * 2
    assert ranks[2] == [4, 8, 4, 4]
    assert ranks[3] == [4, 16, 4, 4]
    assert ranks[4] == [4, 16, 4, 8]  # one step a round
    assert ranks[5] == [4, 16, 4, 16]


def test_nobody_grows_unheard_and_nothing_grows_without_a_schedule():
    silent = RankGrowth(RANKS, 8, 3)
    assert grown(silent, [np.nan] * 3, [0.5, 0.5], 3) == [[8, 8, 8]] * 2
    unpruned = RankGrowth(RANKS, 9, 3)  # no rank of 9 is on offer
    for _ in range(3):
        assert unpruned.select(context(range(3), schedule=0.0, cap=0.0)).rank.tolist() == [8, 8, 8]
        unpruned.update(feedback(range(3), [1.0, 0.5, 0.2]))


def test_growth_goes_on_from_its_state():
    one, other = RankGrowth(RANKS, 2, 4), RankGrowth(RANKS, 2, 4)
    grown(one, [0.2, 1.0, 0.1, 0.9], [0.0, 0.25])
    other.restore({name: np.array(value) for name, value in one.state().items()})
    assert grown(one, [1.0, 0.1, 0.1, 0.9], [0.4, 0.5]) == grown(other, [1.0, 0.1, 0.1, 0.9], [0.4, 0.5])
