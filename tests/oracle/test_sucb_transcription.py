"""S-UCB against a slow transcription of its definition: one device at a time, plain lists and dicts.

Both draw the same keyed random numbers, so they must play the same arms, round after round, to the last bit.
"""

import math

import numpy as np
import pytest

from fedsim.contracts.control import Feedback, RoundContext, Work
from fedsim.control.policies import PolicyInputs, make_policy
from fedsim.control.recentre import recentre
from fedsim.control.schedule import cubic_ratio, feasible_bounds
from fedsim.control.sucb import LEAST_CHILD_SHARE, NEVER_PLAYED, OFFSET_SPAN
from fedsim.rng import Stream, generator, uniforms
from fedsim.settings import ControlSettings, PruneSettings


class Ranks:
    """Only the ranks on offer matter to S-UCB."""

    def __init__(self, ranks):
        self.ranks = np.array(ranks, dtype=np.int64)

    def work(self, ratio_before, ratio, rank):
        raise AssertionError("S-UCB must not look at the work")


def _draw(stream, client, *keys):
    return float(uniforms(5, stream, [client], *keys)[0])


class Device:
    """The definition, for one device."""

    def __init__(self, client, settings, ranks):
        self.client, self.settings = client, settings
        self.positions = [math.log2(rank) - math.log2(ranks[0]) for rank in ranks]
        if len(ranks) > 1:
            self.positions = [position / self.positions[-1] for position in self.positions]
        self.ranks = ranks
        self.leaves = [{"low": [0.0, 0.0], "high": [1.0, self.positions[-1]], "N": 0.0, "S": 0.0}]
        self.played = self.leaves[0]
        self.point = None

    def select(self, round_index, bounds, schedule, ratio_max):
        feasible = []
        for bound in bounds:
            offset = 0.5 * (1.0 + (bound - schedule) / OFFSET_SPAN)
            x = offset if self.settings.arms == "offset" else bound / ratio_max
            feasible.append(min(1.0, max(0.0, x)))
        low, high = [feasible[0], 0.0], [feasible[1], self.positions[-1]]
        candidates = []
        for leaf in self.leaves:
            if all(leaf["low"][axis] <= high[axis] and leaf["high"][axis] >= low[axis] for axis in (0, 1)):
                candidates.append(leaf)
        if self.settings.smooth:
            distance = [self._gap(leaf, self.played) for leaf in candidates]
            candidates = [leaf for leaf, gap in zip(candidates, distance, strict=True) if gap == min(distance)]
        total = 0.0
        for leaf in candidates:
            total += leaf["N"]
        values = []
        for leaf in candidates:
            if leaf["N"] <= NEVER_PLAYED:
                values.append(math.inf)
            else:
                bonus = max(0.0, float(np.log(total))) if total > 0 else 0.0
                explore = self.settings.exploration * float(np.sqrt(bonus / leaf["N"]))
                values.append(leaf["S"] / leaf["N"] + explore)
        best = [leaf for leaf, value in zip(candidates, values, strict=True) if value == max(values)]
        leaf = best[math.floor(_draw(Stream.POLICY_TIES, self.client, round_index) * len(best))]
        point = []
        for axis in (0, 1):
            start, end = max(leaf["low"][axis], low[axis]), min(leaf["high"][axis], high[axis])
            point.append(start + _draw(Stream.POLICY, self.client, round_index, axis) * (end - start))
        self.played, self.point = leaf, point
        distances = [abs(point[1] - position) for position in self.positions]
        rank = self.ranks[distances.index(min(distances))]
        ratio = (
            schedule + (2.0 * point[0] - 1.0) * OFFSET_SPAN if self.settings.arms == "offset" else point[0] * ratio_max
        )
        return min(max(ratio, bounds[0]), bounds[1]), rank

    @staticmethod
    def _gap(one, other):
        return max(
            max(0.0, one["low"][axis] - other["high"][axis], other["low"][axis] - one["high"][axis]) for axis in (0, 1)
        )

    def update(self, arrived, reward):
        for leaf in self.leaves:
            leaf["N"] *= self.settings.discount
            leaf["S"] *= self.settings.discount
        if not arrived:
            return
        leaf = self.played
        leaf["N"] += 1.0
        leaf["S"] += reward
        sides = [leaf["high"][axis] - leaf["low"][axis] for axis in (0, 1)]
        axis = 0 if sides[0] >= sides[1] else 1
        if sides[axis] <= self.settings.split:
            return
        cut = 0.5 * (leaf["low"][axis] + leaf["high"][axis])
        if self.settings.cut == "played":
            margin = LEAST_CHILD_SHARE * sides[axis]
            if self.point[axis] - leaf["low"][axis] >= margin and leaf["high"][axis] - self.point[axis] >= margin:
                cut = self.point[axis]
        upper = {"low": list(leaf["low"]), "high": list(leaf["high"]), "N": leaf["N"], "S": leaf["S"]}
        leaf["high"][axis] = cut
        upper["low"][axis] = cut
        self.leaves.append(upper)
        if self.point[axis] >= cut:
            self.played = upper


def _settings(**changed):
    return ControlSettings(policy="sucb", **changed)


CASES = {
    "defaults": (_settings(), (2, 4, 8, 16, 32), True, 12),
    "absolute": (_settings(arms="absolute", smooth=False), (2, 4, 8, 16, 32), False, 12),
    "absolute smooth sampled": (_settings(arms="absolute", smooth=True), (4, 8, 16), True, 4),
    "played cuts": (_settings(cut="played", smooth=False, split=0.1), (2, 4, 8, 16, 32), True, 12),
    "played smooth absolute": (_settings(cut="played", arms="absolute", split=0.05), (1, 3, 64), False, 5),
    "one rank": (_settings(exploration=1.4), (8,), True, 12),
    "fast forgetting": (_settings(discount=0.5, smooth=False), (2, 4, 8, 16, 32), True, 3),
    "no forgetting, greedy": (_settings(discount=1.0, exploration=0.0, split=0.5), (2, 32), False, 12),
}


@pytest.mark.parametrize("case", CASES)
def test_plays_exactly_as_defined(case):
    settings, ranks, reversible, participants = CASES[case]
    clients, rounds = 12, 250
    prune = PruneSettings(target=0.5, target_scope="fleet_mean", max_ratio=0.8, reversible=reversible)
    policy = make_policy(PolicyInputs(settings, clients=clients, ask=Ranks(ranks), seed=5, fixed_rank=8))
    devices = [Device(client, settings, ranks) for client in range(clients)]
    ratio = np.zeros(clients)
    leaves = 1
    for index in range(rounds):
        draw = generator(5, Stream.CLIENT_SAMPLING, index)
        ids = np.sort(draw.choice(clients, participants, replace=False))
        before = ratio[ids]
        schedule = cubic_ratio(index, 10, 150, 0.5)
        low, high = feasible_bounds(
            prune, round_index=index, ratio_before=before, warmup_rounds=10, end_round=150, step_max=0.05
        )
        arms = policy.select(RoundContext(index, ids, before, low, high, schedule, 0.8, 0.05))
        slow = [devices[client].select(index, (low[row], high[row]), schedule, 0.8) for row, client in enumerate(ids)]
        slow_ratio = np.array([arm[0] for arm in slow])
        if settings.arms == "offset":
            slow_ratio = recentre(slow_ratio, schedule, low, high)
        np.testing.assert_array_equal(arms.ratio, slow_ratio)
        np.testing.assert_array_equal(arms.rank, [arm[1] for arm in slow])

        arrived = draw.random(ids.size) < 0.9
        # A few reward levels only, so that ties are common.
        reward = np.where(arrived, np.rint(draw.random(ids.size) * 4) / 4, np.nan)
        nothing = np.zeros(ids.size)
        work = Work(nothing, nothing, nothing, nothing, nothing, nothing)
        policy.update(Feedback(index, ids, before, arms.ratio, arms.rank, work, nothing + 1, arrived, reward))
        for row, client in enumerate(ids):
            devices[client].update(bool(arrived[row]), float(reward[row]))
        ratio[ids] = np.where(arrived, arms.ratio, before)
        leaves = max(len(device.leaves) for device in devices)
    np.testing.assert_array_equal(policy.state()["leaves"], [len(device.leaves) for device in devices])
    assert leaves > 2
