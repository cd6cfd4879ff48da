"""What a policy's arms cost against the oracle's: regret, per round and per device, of any recorded run.

[ours] FedSpine (arXiv 2501.02438) names no regret. Here it is simulated time, since a controller is there to save it:

* The run's fleet is rebuilt from its configuration, without jitter: same devices, power modes, links, participants.
  Each round's expected duration follows from the recorded arms, with the run's own rule of when a round closes.
* Beside it the oracle plays the whole run: the solver of `fedsim.control.balanced`, told the true expected times, under
  the same bounds, and at the same mean ratio of the participants in every round, so that nobody wins by pruning more or
  less. It starts from its own earlier arms, not from the run's: most of a round's steps run before its cut, so that an
  arm shows in the *next* rounds' times, and an oracle that had to start from the run's ratios would share its mistakes.
* Regret of a round = the run's expected duration - the oracle's. It adds up to the expected seconds lost. A round's may
  be negative (the oracle weighs ratios by the job that starts and ends at them). That of a run under ``oracle`` is
  zero, but where its policy was asked about other work (methods with rounds without importance, and ``stack``).
* A device's regret in a round = what its own expected time has beyond the duration of the oracle's round, at least 0:
  the seconds by which it alone made the round longer. Where the server waits for all, the round's regret, if positive,
  is that of its slowest device.
* The oracle is asked about the work that the clock would count in that round: without importance where the method
  estimates none, and with the downloads that its own earlier rounds make.
* The oracle chooses ranks too: a policy with a fixed rank pays for it in regret, though a larger rank may teach more.
  It takes the largest that costs no time. Under ``stack`` (FLoRA) any rank costs time, as all download it later: there
  it takes the smallest, and what a method loses by larger ones is regret too.
* Cold-start cost = regret of the first rounds that may prune (of any round, for methods that do not prune): as many as
  it takes each device to take part `COLD_PARTICIPATIONS` times on average.

Where updates were lost in the run they are lost to the oracle too. Not recorded, so priced alike on both sides: kept
counts of layers under ``global`` selection (as if all lost the same share), and a classifier of more than two outputs
(as one of two).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from fedsim.contracts.common import FloatArray, IntArray, Outcome, State
from fedsim.contracts.control import Arms, Ask, ExpectedTime, Feedback, RoundContext, Work
from fedsim.contracts.flights import Flights
from fedsim.control.client_selection import SELECTIONS
from fedsim.control.solver import level
from fedsim.errors import RunError
from fedsim.federation.federation import Federation
from fedsim.fleet.fleet import Fleet
from fedsim.learn.entries import RULES
from fedsim.methods.catalogue import method_named
from fedsim.records.reader import Run
from fedsim.runner.build import build, participants_per_round
from fedsim.runner.config import build_config
from fedsim.runner.run import perturbation
from fedsim.settings import Config
from fedsim.sim.arrays import ArrayPlayer
from fedsim.sim.protocol import sample_clients
from fedsim.sim.trips import arrivals_of, trips_of

COLD_PARTICIPATIONS = 10
"""Rounds of its own in which a device counts as new: after as many `balanced` had settled."""
_ON_SCHEDULE = 1e-9


@dataclass(frozen=True, eq=False)
class Regret:
    """Regret of one run; times are expected ones (without jitter), in simulated seconds.

    Attributes:
        rounds: ``round participants prune_ratio_mean oracle_prune_ratio_mean expected_s oracle_s regret_s
            cumulative_regret_s``, a row per round.
        devices: ``client device participations regret_s rounds_slowest``, a row per client that took part;
            ``rounds_slowest`` counts the rounds in which none took longer.
        arms: ``round client device prune_ratio_target lora_rank expected_s oracle_ratio oracle_rank oracle_expected_s
            regret_s cumulative_regret_s``, a row per round and client: arms over time, the oracle's beside them, and
            the device's own regret.
        cold_start_first_round, cold_start_rounds: which rounds the cold start counts.
    """

    rounds: pd.DataFrame
    devices: pd.DataFrame
    arms: pd.DataFrame
    cold_start_first_round: int
    cold_start_rounds: int

    @property
    def total_s(self) -> float:
        """Expected seconds lost in the whole run."""
        return float(self.rounds["regret_s"].sum())

    @property
    def relative(self) -> float:
        """`total_s` over the oracle's expected seconds."""
        return self.total_s / float(self.rounds["oracle_s"].sum())

    @property
    def warmup_s(self) -> float:
        """Expected seconds lost before the cold start's rounds: what ranks tried or fixed in warm-up cost."""
        return float(self.rounds.loc[self.rounds["round"] < self.cold_start_first_round, "regret_s"].sum())

    @property
    def cold_start_s(self) -> float:
        """Expected seconds lost in the cold start's rounds."""
        return float(self.rounds.loc[self._cold(), "regret_s"].sum())

    @property
    def settled_s_per_round(self) -> float:
        """Mean regret of the rounds after the cold start; NaN where there are none."""
        first_after = self.cold_start_first_round + self.cold_start_rounds
        return float(self.rounds.loc[self.rounds["round"] >= first_after, "regret_s"].mean())

    def _cold(self) -> pd.Series:
        since = self.rounds["round"] - self.cold_start_first_round
        return (since >= 0) & (since < self.cold_start_rounds)


def regret(run: Run) -> Regret:
    """Regret of a run against the oracle: real, timing-only or surrogate, under any policy; unfinished ones so far.

    Raises:
        RunError: the run recorded no clients, has no round yet, or its records do not fit its configuration.
        FedsimError: a model, fleet or profile file of the run is no longer there.
    """
    rows = run.client_rounds
    if rows.empty:
        raise RunError(f"run '{run.path}' has no rounds yet: there is no regret to tell")
    config = build_config(run.config)
    if config.server.mode != "sync":
        raise RunError(
            f"run '{run.path}' has server.mode {config.server.mode}: regret is told of whole rounds (server.mode sync)"
        )
    if SELECTIONS.named(config.server.selection).needs_history:
        raise RunError(
            f"run '{run.path}' has server.selection {config.server.selection}, which goes by how clients did: another "
            "policy would have met other clients, and there is no regret to tell"
        )
    fleet, played, oracle = _rebuilt(run, config, rows)
    round_rows: list[dict[str, float]] = []
    tables: list[pd.DataFrame] = []
    for index, own in _by_round(rows):
        clients = own["client"].to_numpy()
        sampled, quota = sample_clients(fleet.clients, config.server, config.seed, index)
        if not np.array_equal(clients, sampled):
            raise RunError(
                f"run '{run.path}': the clients recorded in round {index} are not those that its configuration draws "
                "(another version of fedsim, or a fleet file that has changed)"
            )
        plan, played_s, duration_s = _play(played, fleet, config, index, quota, own)
        best, best_s, best_duration_s = _play(oracle, fleet, config, index, quota, own)
        round_rows.append(
            {
                "round": index,
                "participants": len(clients),
                "prune_ratio_mean": plan.ratio_asked.mean(),
                "oracle_prune_ratio_mean": best.ratio_asked.mean(),
                "expected_s": duration_s,
                "oracle_s": best_duration_s,
            }
        )
        table = own[["round", "client", "device", "prune_ratio_target", "lora_rank"]].reset_index(drop=True)
        tables.append(
            table.assign(
                expected_s=played_s,
                oracle_ratio=best.ratio_asked,
                oracle_rank=best.rank,
                oracle_expected_s=best_s,
                regret_s=np.maximum(0.0, played_s - best_duration_s),
            )
        )
    return _result(config, fleet, pd.DataFrame(round_rows), pd.concat(tables, ignore_index=True))


def _result(config: Config, fleet: Fleet, rounds: pd.DataFrame, arms: pd.DataFrame) -> Regret:
    rounds["regret_s"] = rounds["expected_s"] - rounds["oracle_s"]
    rounds["cumulative_regret_s"] = rounds["regret_s"].cumsum()
    arms["cumulative_regret_s"] = arms.groupby("client")["regret_s"].cumsum()
    slowest = arms["expected_s"] >= arms.groupby("round")["expected_s"].transform("max")
    devices = (
        arms.assign(slowest=slowest)
        .groupby("client")
        .agg(
            device=("device", "first"),
            participations=("round", "size"),
            regret_s=("regret_s", "sum"),
            rounds_slowest=("slowest", "sum"),
        )
        .reset_index()
    )
    first = config.prune_warmup_rounds if method_named(config.method).prunes else 0
    per_device = fleet.clients / participants_per_round(config, fleet.clients)
    asked = int(np.ceil(COLD_PARTICIPATIONS * per_device))
    return Regret(rounds, devices, arms, first, max(0, min(asked, len(rounds) - first)))


def _rebuilt(run: Run, config: Config, rows: pd.DataFrame) -> tuple[Fleet, Federation, Federation]:
    """The run's fleet without jitter, and its federation twice: with the recorded arms, and with the oracle."""
    calm = config.model_copy(
        update={
            # The rounds are the recorded ones, however they ended; nothing is trained.
            "server": config.server.model_copy(update={"time_budget_s": None}),
            "prune": config.prune.model_copy(update={"selection": "layer_local"}),
            "train": config.train.model_copy(update={"engine": "none", "surrogate": None}),
        }
    )
    draw = run.manifest.get("profile_draw")
    experiment = build(calm, lambda line: None, perturbation(draw))
    fleet = experiment.fleet
    links = replace(fleet.links, jitter_sigma=np.zeros_like(fleet.links.jitter_sigma))
    fleet = replace(fleet, links=links, compute_jitter_sigma=0.0)
    parts = experiment.federation.parts
    means = rows.groupby("round")["prune_ratio_target"].mean().to_dict()
    best: Federation
    policy = _AtPlayedMean(
        lambda index, clients: best.round_ask(index, clients),
        fleet.expected_seconds,
        means,
        smallest_ranks=RULES.named(config.aggregate.rule).sends_stacks,
    )
    best = Federation(replace(parts, policy=policy))
    return fleet, Federation(replace(parts, policy=_Recorded(rows))), best


class _LearnsNothing:
    """What both replaying policies share."""

    def update(self, feedback: Feedback) -> None:
        """Nothing to learn."""

    def state(self) -> State:
        """No state."""
        return {}

    def restore(self, state: State) -> None:
        """No state."""


class _Recorded(_LearnsNothing):
    """The arms that the run recorded."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self._rounds = dict(_by_round(rows))

    def select(self, context: RoundContext) -> Arms:
        """The arms of that round."""
        own = self._rounds[context.round_index]
        return Arms(ratio=own["prune_ratio_target"].to_numpy(), rank=own["lora_rank"].to_numpy())


class _AtPlayedMean(_LearnsNothing):
    """The oracle at the run's own mean ratio of each round, where that is not the schedule itself.

    Args:
        asks: what a round's arms ask of its participants, from the federation that it plays in.
        mean_ratio: of the run, by round.
        smallest_ranks: whether every rank is the smallest on offer.
    """

    def __init__(
        self,
        asks: Callable[[int, IntArray], Ask],
        expected_time: ExpectedTime,
        mean_ratio: dict[int, float],
        *,
        smallest_ranks: bool,
    ) -> None:
        self._asks = asks
        self._expected_time = expected_time
        self._mean_ratio = mean_ratio
        self._smallest_ranks = smallest_ranks

    def select(self, context: RoundContext) -> Arms:
        """The oracle's arms."""
        mean = self._mean_ratio[context.round_index]
        reachable = np.clip(context.schedule_ratio, context.ratio_low.mean(), context.ratio_high.mean())
        # What only rounding tells apart must not move the oracle's deadline from one step of the ratios to the next.
        if abs(mean - reachable) > _ON_SCHEDULE:
            context = replace(context, schedule_ratio=mean)

        def times(clients: IntArray, work: Work) -> FloatArray:
            return self._expected_time(context.round_index, clients, _of_some(work, context.clients, clients))

        highest = np.zeros(len(context.clients), dtype=np.int64) if self._smallest_ranks else None
        return level(context, self._asks(context.round_index, context.clients), times, highest_rank=highest)


def _of_some(work: Work, participants: IntArray, clients: IntArray) -> Work:
    """The work of some of the participants (ascending): the solver asks about a part of a large round at a time."""
    if len(clients) == len(participants):
        return work
    rows = np.searchsorted(participants, clients)
    taken = {name: value[rows] for name, value in vars(work).items() if np.shape(value)[:1] == participants.shape}
    return replace(work, **taken)


def _play(
    federation: Federation, fleet: Fleet, config: Config, index: int, quota: int, own: pd.DataFrame
) -> tuple[Flights, FloatArray, float]:
    """One round from second 0: the plan, each client's seconds if nothing cuts them, and the round's duration.

    Args:
        own: the round's records: the updates that arrived in the run are those that arrive here.
    """
    flights = federation.dispatch(own["client"].to_numpy(), index, 0.0)
    trips, player = trips_of(fleet, flights, index), ArrayPlayer(fleet.clients, 0.0)
    player.launch(trips)
    player.advance(quota, config.server.deadline_s)
    landed, end_s = player.land(player.waiting, None), player.now_s
    arrived = own["outcome"].to_numpy() == Outcome.OK.label
    outcome = np.where(arrived, Outcome.OK, Outcome.DROPPED).astype(np.int64)
    federation.merge(replace(arrivals_of(fleet, landed, index, 0.0, end_s, held=True), outcome=outcome))
    # Summed in the order in which the round is, so that the slowest client's time is the round's to the last bit.
    whole_s = trips.download_s + trips.compute_s + trips.upload_s
    time_s = np.where(trips.fits_memory, whole_s, trips.download_s)
    return flights, time_s, end_s


def _by_round(rows: pd.DataFrame) -> Iterator[tuple[int, pd.DataFrame]]:
    """Each round's rows, clients ascending."""
    for index, own in rows.groupby("round", sort=True):
        yield int(str(index)), own.sort_values("client")
