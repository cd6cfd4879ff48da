"""E-UCB, D-UCB and Thompson sampling on a grid against slow transcriptions: one device at a time, plain lists.

Both sides draw the same keyed random numbers, so they must play the same arms, round after round, to the last bit.
"""

import math

import numpy as np
import pytest

from fedsim.contracts.control import Feedback, RoundContext, Work
from fedsim.control.policies import PolicyInputs, make_policy
from fedsim.control.recentre import recentre
from fedsim.control.schedule import cubic_ratio, feasible_bounds
from fedsim.rng import Stream, generator, normals, uniforms
from fedsim.settings import ControlSettings, PruneSettings

SEED = 5
SPAN = 0.2


class Ranks:
    """Only the ranks on offer matter to these policies."""

    def __init__(self, ranks):
        self.ranks = np.array(ranks, dtype=np.int64)

    def work(self, ratio_before, ratio, rank):
        raise AssertionError("bandits must not look at the work")


def _interval(settings, bounds, schedule, ratio_max):
    x = []
    for bound in bounds:
        value = 0.5 * (1.0 + (bound - schedule) / SPAN) if settings.arms == "offset" else bound / ratio_max
        x.append(min(1.0, max(0.0, value)))
    return x


def _ratio(settings, bounds, schedule, ratio_max, x):
    ratio = schedule + (2.0 * x - 1.0) * SPAN if settings.arms == "offset" else x * ratio_max
    return min(max(ratio, bounds[0]), bounds[1])


def _ucb(candidates, exploration, tie):
    """The place of the largest bound among (N, S) pairs."""
    total = sum(n for n, _ in candidates)
    values = []
    for n, s in candidates:
        if n <= 1e-9:
            values.append(math.inf)
        else:
            values.append(s / n + exploration * math.sqrt(max(0.0, math.log(total)) / n))
    best = [place for place, value in enumerate(values) if value == max(values)]
    return best[math.floor(tie * len(best))]


class EUcbDevice:
    """FedMP's definition: a region's statistics are the discounted plays that fell into it."""

    def __init__(self, client, settings, ranks):
        self.client, self.settings = client, settings
        self.regions = [{"low": 0.0, "high": 1.0, "plays": []}]

    def select(self, index, bounds, schedule, ratio_max):
        low, high = _interval(self.settings, bounds, schedule, ratio_max)
        meets = [region for region in self.regions if region["low"] <= high and region["high"] >= low]
        sums = [(sum(p["n"] for p in r["plays"]), sum(p["s"] for p in r["plays"])) for r in meets]
        tie = float(uniforms(SEED, Stream.POLICY_TIES, [self.client], index)[0])
        self.played = meets[_ucb(sums, self.settings.exploration, tie)]
        start, end = max(self.played["low"], low), min(self.played["high"], high)
        self.x = start + float(uniforms(SEED, Stream.POLICY, [self.client], index)[0]) * (end - start)
        return _ratio(self.settings, bounds, schedule, ratio_max, self.x), 8

    def update(self, arrived, reward):
        for region in self.regions:
            for play in region["plays"]:
                play["n"] *= self.settings.discount
                play["s"] *= self.settings.discount
        if not arrived:
            return
        region = self.played
        region["plays"].append({"x": self.x, "n": 1.0, "s": reward})
        length = region["high"] - region["low"]
        if length <= self.settings.split:
            return
        at = 0.5 * (region["low"] + region["high"])
        near = min(self.x - region["low"], region["high"] - self.x) < 0.01 * length
        if self.settings.cut == "played" and not near:
            at = self.x
        *old, new = region["plays"]
        upper, lower = ([new], []) if new["x"] >= at else ([], [new])
        if old:  # more than one only where they lie within 1% of an end: they go with the last of them
            (upper if old[-1]["x"] >= at else lower)[:0] = old
        self.regions.append({"low": at, "high": region["high"], "plays": upper})
        region["high"], region["plays"] = at, lower


class GridDevice:
    """A fixed grid with N and S of each arm."""

    def __init__(self, client, settings, ranks):
        self.client, self.settings = client, settings
        steps = math.ceil(1.0 / settings.split - 1e-9)
        self.step = 1.0 / steps
        self.arms = [{"x": k * self.step, "rank": rank, "n": 0.0, "s": 0.0} for k in range(steps + 1) for rank in ranks]

    def select(self, index, bounds, schedule, ratio_max):
        low, high = _interval(self.settings, bounds, schedule, ratio_max)
        outside = [max(low - arm["x"], arm["x"] - high) for arm in self.arms]
        places = [place for place, gap in enumerate(outside) if gap < self.step * (1 - 1e-9)]
        self.played = self.arms[self.choose(places, index)]
        return _ratio(self.settings, bounds, schedule, ratio_max, self.played["x"]), self.played["rank"]

    def update(self, arrived, reward):
        for arm in self.arms:
            arm["n"] *= self.settings.discount
            arm["s"] *= self.settings.discount
        if arrived:
            self.played["n"] += 1.0
            self.played["s"] += reward


class DUcbDevice(GridDevice):
    def choose(self, places, index):
        tie = float(uniforms(SEED, Stream.POLICY_TIES, [self.client], index)[0])
        sums = [(self.arms[place]["n"], self.arms[place]["s"]) for place in places]
        return places[_ucb(sums, self.settings.exploration, tie)]


class ThompsonDevice(GridDevice):
    def choose(self, places, index):
        values = []
        for place in places:
            arm, draw = self.arms[place], float(normals(SEED, Stream.POLICY, [self.client], index, place)[0])
            mean, deviation = (arm["s"] + 0.5) / (arm["n"] + 1.0), self.settings.exploration / math.sqrt(arm["n"] + 1.0)
            values.append(mean + deviation * draw)
        return places[values.index(max(values))]


DEVICES = {"e_ucb": EUcbDevice, "d_ucb_grid": DUcbDevice, "thompson": ThompsonDevice}
RANKS = (2, 4, 8, 16, 32)
CASES = {
    "offset": ({}, RANKS, True, 12),
    "as fedmp": ({"arms": "absolute", "exploration": 2**0.5, "cut": "played"}, RANKS, False, 12),
    "offset, fine": ({"split": 0.05, "cut": "played"}, RANKS, True, 12),
    "sampled, fine": ({"arms": "absolute", "split": 0.07, "cut": "played"}, (4, 8), True, 4),
    "fast forgetting": ({"discount": 0.5, "split": 0.3, "cut": "played"}, (2, 8, 32), False, 5),
    "no forgetting, greedy": ({"discount": 1.0, "exploration": 0.0, "split": 1.0}, (8,), True, 12),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", DEVICES)
def test_plays_exactly_as_defined(name, case):
    control, ranks, reversible, participants = CASES[case]
    settings = ControlSettings(policy=name, **control)
    clients, rounds = 12, 200
    prune = PruneSettings(target=0.5, target_scope="fleet_mean", max_ratio=0.8, reversible=reversible)
    policy = make_policy(PolicyInputs(settings, clients=clients, ask=Ranks(ranks), seed=SEED, fixed_rank=8))
    devices = [DEVICES[name](client, settings, ranks) for client in range(clients)]
    ratio = np.zeros(clients)
    different = set()
    for index in range(rounds):
        draw = generator(SEED, Stream.CLIENT_SAMPLING, index)
        ids = np.sort(draw.choice(clients, participants, replace=False))
        before = ratio[ids]
        schedule = cubic_ratio(index, 10, 120, 0.5)
        low, high = feasible_bounds(
            prune, round_index=index, ratio_before=before, warmup_rounds=10, end_round=120, step_max=0.05
        )
        arms = policy.select(RoundContext(index, ids, before, low, high, schedule, 0.8, 0.05))
        slow = [devices[client].select(index, (low[row], high[row]), schedule, 0.8) for row, client in enumerate(ids)]
        slow_ratio = np.array([arm[0] for arm in slow])
        if settings.arms == "offset":
            slow_ratio = recentre(slow_ratio, schedule, low, high)
        np.testing.assert_array_equal(arms.ratio, slow_ratio)
        np.testing.assert_array_equal(arms.rank, [arm[1] for arm in slow])
        different |= set(zip(np.round(arms.ratio - schedule, 9).tolist(), arms.rank.tolist(), strict=True))

        arrived = draw.random(ids.size) < 0.9
        reward = np.where(arrived, draw.random(ids.size), np.nan)
        nothing = np.zeros(ids.size)
        work = Work(nothing, nothing, nothing, nothing, nothing, nothing)
        policy.update(Feedback(index, ids, before, arms.ratio, arms.rank, work, nothing + 1, arrived, reward))
        for row, client in enumerate(ids):
            devices[client].update(bool(arrived[row]), float(reward[row]))
        ratio[ids] = np.where(arrived, arms.ratio, before)
    assert len(different) > 10
    if name == "e_ucb":
        np.testing.assert_array_equal(policy.state()["regions"], [len(device.regions) for device in devices])
        if settings.split < 1.0:
            assert max(len(device.regions) for device in devices) > 2
