"""Toy surroundings for the controllers: what arms ask, how long devices take, and a round loop without a simulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fedsim.contracts.control import Feedback, Policy, RoundContext, Work
from fedsim.control.policies import PolicyInputs, make_policy
from fedsim.control.schedule import cubic_ratio, default_step_max, feasible_bounds, ratio_cap
from fedsim.rng import Stream, generator, mean_one_jitter
from fedsim.settings import ControlSettings, PruneSettings


class ToyAsk:
    """FLOPs fall with the ratio in whole steps and rise a little with the rank; traffic is proportional to the rank."""

    def __init__(
        self, groups: int = 100, ranks: tuple[int, ...] = (2, 4, 8, 16, 32), change_share: float = 1.0
    ) -> None:
        self._groups = groups
        self._ranks = np.array(ranks, dtype=np.int64)
        self._change_share = change_share

    @property
    def ranks(self) -> np.ndarray:
        return self._ranks

    def work(self, ratio_before, ratio, rank) -> Work:
        before, after, rank = np.broadcast_arrays(
            np.asarray(ratio_before, dtype=float), np.asarray(ratio, dtype=float), np.asarray(rank, dtype=float)
        )

        def kept(ratio):
            return np.maximum(1, np.rint((1.0 - ratio) * self._groups)) / self._groups

        share = self._change_share
        start = kept(np.minimum(before, after))
        flops = 40e12 * (share * kept(after) + (1 - share) * start) * (1 + 0.004 * rank)
        one_way = 0.65e6 * rank * kept(after)
        zero = np.zeros_like(flops)
        return Work(flops, zero, zero, zero, one_way, one_way)


@dataclass
class ToyFleet:
    """Devices that no profile describes: T = a FLOPs + b bytes + c with random a, b, c, re-drawn speeds, jitter.

    `speeds(round // period, clients)` multiplies a; `links` likewise b.
    """

    clients: int
    seed: int
    jitter: float = 0.02
    period: int = 0
    compute_modes: tuple[float, ...] = (1.0,)
    link_modes: tuple[float, ...] = (1.0,)
    a: np.ndarray = field(init=False)
    b: np.ndarray = field(init=False)
    c: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        draw = generator(self.seed, Stream.POWER_MODE)
        self.a = draw.uniform(1.2, 3.2, self.clients) * 1e-12
        self.b = draw.uniform(0.25, 0.8, self.clients) * 1e-6
        self.c = draw.uniform(0.0, 8.0, self.clients)

    def _mode(self, stream: Stream, modes: tuple[float, ...], round_index: int) -> np.ndarray:
        epoch = round_index // self.period if self.period else 0
        return generator(self.seed, stream, epoch).choice(np.array(modes), self.clients)

    def expected(self, round_index: int, clients: np.ndarray, work: Work) -> np.ndarray:
        a = self.a * self._mode(Stream.POWER_MODE, self.compute_modes, round_index)
        b = self.b * self._mode(Stream.LINK_MEAN, self.link_modes, round_index)
        axes = (...,) + (None,) * (np.ndim(work.flops) - 1)
        traffic = work.download_bytes + work.upload_bytes
        return a[clients][axes] * work.flops + b[clients][axes] * traffic + self.c[clients][axes]

    def measured(self, round_index: int, clients: np.ndarray, work: Work) -> np.ndarray:
        jitter = mean_one_jitter(self.seed, Stream.COMPUTE_JITTER, clients, round_index, self.jitter)
        return self.expected(round_index, clients, work) * jitter


@dataclass
class Played:
    """What a loop left behind: per round the duration, the participants' ratios and ranks, and mean idle share."""

    duration_s: np.ndarray
    idle: np.ndarray
    ratios: list[np.ndarray]
    ranks: list[np.ndarray]
    schedule: np.ndarray
    reachable: list[tuple[float, float]]
    policy: Policy


def time_reward(time_s: np.ndarray, penalty: float = 2.0) -> np.ndarray:
    """The timing-only reward."""
    mean = time_s.mean()
    return 1.0 / (1.0 + penalty * np.abs(time_s - mean) / mean)


def play(
    name: str,
    *,
    ask,
    expected: Callable,
    measured: Callable,
    clients: int,
    rounds: int = 100,
    seed: int = 0,
    prune: PruneSettings | None = None,
    warmup: int = 10,
    end: int = 60,
    participants: int | None = None,
    control: dict | None = None,
    fixed_rank: int = 8,
    reward: Callable = time_reward,
    policy: Policy | None = None,
    on_round: Callable[[int, Policy], Policy] | None = None,
) -> Played:
    """Play rounds of timing only."""
    prune = prune or PruneSettings(target=0.5, target_scope="fleet_mean", max_ratio=0.8, reversible=True)
    settings = ControlSettings(policy=name, **(control or {}))
    policy = policy or make_policy(
        PolicyInputs(settings, clients=clients, ask=ask, seed=seed, fixed_rank=fixed_rank, expected_time=expected)
    )
    taking_part = participants or clients
    step = prune.max_step or default_step_max(
        warmup, end, prune.target, clients=clients, participants_per_round=taking_part
    )
    ratio = np.zeros(clients)
    out = Played(np.zeros(rounds), np.zeros(rounds), [], [], np.zeros(rounds), [], policy)
    for index in range(rounds):
        if on_round is not None:
            policy = on_round(index, policy)
        ids = np.sort(generator(seed, Stream.CLIENT_SAMPLING, index).choice(clients, taking_part, replace=False))
        before = ratio[ids]
        low, high = feasible_bounds(
            prune, round_index=index, ratio_before=before, warmup_rounds=warmup, end_round=end, step_max=step
        )
        schedule = cubic_ratio(index, warmup, end, prune.target)
        context = RoundContext(index, ids, before, low, high, schedule, ratio_cap(prune), step)
        arms = policy.select(context)
        assert (arms.ratio >= low - 1e-12).all()
        assert (arms.ratio <= high + 1e-12).all()
        assert np.isin(arms.rank, ask.ranks).all()
        work = ask.work(before, arms.ratio, arms.rank)
        time_s = measured(index, ids, work)
        here = np.ones(ids.size, dtype=bool)
        policy.update(Feedback(index, ids, before, arms.ratio, arms.rank, work, time_s, here, reward(time_s)))
        ratio[ids] = arms.ratio
        out.duration_s[index] = time_s.max()
        out.idle[index] = (time_s.max() - time_s).mean() / time_s.max()
        out.ratios.append(arms.ratio)
        out.ranks.append(arms.rank)
        out.schedule[index] = schedule
        out.reachable.append((float(low.mean()), float(high.mean())))
    out.policy = policy
    return out
