"""What a policy's arms cost against the oracle's: regret, per round and per device, of any recorded run.

[ours] FedSpine (arXiv 2501.02438) names no regret. Here it is simulated time, since a controller is there to save it:

* The run's fleet is rebuilt from its configuration, without jitter: same devices, power modes, links, participants.
  Each round's expected duration follows from the recorded arms, with the run's own rule of when a round closes.
* Beside it the oracle plays the whole run: the solver of `fedsim.control.balanced`, told the true expected times, under
  the same bounds, and at the same mean ratio of the participants in every round, so that nobody wins by pruning more or
  less. It starts from its own earlier arms, not from the run's: most of a round's steps run before its cut, so that an
  arm shows in the *next* rounds' times, and an oracle that had to start from the run's ratios would share its mistakes.
* Regret of a round = the run's expected duration - the oracle's. It adds up to the expected seconds lost. A round's may
  be negative (the oracle weighs ratios by the job that starts and ends at them); the oracle's own is zero.
* A device's regret in a round = what its own expected time has beyond the duration of the oracle's round, at least 0:
  the seconds by which it alone made the round longer. Where the server waits for all, the round's regret, if positive,
  is that of its slowest device.
* The oracle chooses ranks too: a policy with a fixed rank pays for it in regret, though a larger rank may teach more.
* Cold-start cost = regret of the first rounds that may prune (of any round, for methods that do not prune): as many as
  it takes each device to take part `COLD_PARTICIPATIONS` times on average.

Where updates were lost in the run they are lost to the oracle too. Under ``global`` selection the kept counts of layers
are not recorded: both sides are priced as if every layer lost the same share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd

from fedsim.control.balanced import Oracle
from fedsim.control.reward import RewardModel
from fedsim.cost.ask import ShapeAsk
from fedsim.cost.shapes import load_shape
from fedsim.errors import RunError
from fedsim.experiment.build import build_ask, participants_per_round
from fedsim.experiment.config import build_config
from fedsim.experiment.results import Run
from fedsim.experiment.run import perturbation
from fedsim.methods.catalogue import method_named
from fedsim.methods.federation import Federation, Parts
from fedsim.methods.timing import TimingLearner
from fedsim.settings import Config
from fedsim.sim.fleet import Fleet, load_fleet
from fedsim.sim.protocol import sample_clients
from fedsim.sim.rounds import ArrayRounds
from fedsim.sim.timeline import Timeline, Trips, report_of, trips_of
from fedsim.sim.trace import Trace
from fedsim.specs import Arms, Feedback, FloatArray, Outcome, Policy, RoundContext, RoundPlan, State

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
    fleet, ask, oracle = _rebuilt(run, config, rows)
    asked = np.zeros(fleet.clients)
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
        ratio, rank = own["prune_ratio_target"].to_numpy(), own["lora_rank"].to_numpy()
        before = asked[clients]
        played = RoundPlan(index, clients, before, ratio, rank, ask.work(before, ratio, rank))
        best = oracle.open_round(index, clients)
        deadline_s = config.server.deadline_s
        _, played_s, duration_s = _expected(fleet, played, quota, deadline_s)
        end, best_s, best_duration_s = _expected(fleet, best, quota, deadline_s)
        arrived = own["outcome"].to_numpy() == Outcome.OK.label
        outcome = np.where(arrived, Outcome.OK, Outcome.DROPPED).astype(np.int64)
        oracle.close_round(replace(report_of(fleet, *end), outcome=outcome))
        asked[clients[arrived]] = ratio[arrived]
        round_rows.append(
            {
                "round": index,
                "participants": len(clients),
                "prune_ratio_mean": ratio.mean(),
                "oracle_prune_ratio_mean": best.ratio_target.mean(),
                "expected_s": duration_s,
                "oracle_s": best_duration_s,
            }
        )
        table = own[["round", "client", "device", "prune_ratio_target", "lora_rank"]].reset_index(drop=True)
        tables.append(
            table.assign(
                expected_s=played_s,
                oracle_ratio=best.ratio_target,
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


def _rebuilt(run: Run, config: Config, rows: pd.DataFrame) -> tuple[Fleet, ShapeAsk, Federation]:
    """The run's fleet without jitter, what its arms ask, and its federation with the oracle in the policy's place."""
    method = method_named(config.method)
    draw = run.manifest.get("profile_draw")
    fleet = load_fleet(config.fleet, config.cost.precision, config.seed, perturbation(config.seed, draw))
    links = replace(fleet.links, jitter_sigma=np.zeros_like(fleet.links.jitter_sigma))
    fleet = replace(fleet, links=links, compute_jitter_sigma=0.0)
    labels = len((run.manifest.get("data") or {}).get("label_names") or ()) or 2
    shape = load_shape(config.model.name, labels)
    ask = build_ask(config, method, shape, load_shape(config.cost.model, labels) if config.cost.model else shape)
    parts = Parts(
        # The oracle follows the run's rounds, however they ended; its jobs are priced as the run's are here.
        config=config.model_copy(
            update={
                "server": config.server.model_copy(update={"time_budget_s": None}),
                "prune": config.prune.model_copy(update={"selection": "layer_local"}),
            }
        ),
        method=method,
        learner=TimingLearner(shape),
        policy=_AtPlayedMean(
            Oracle(ask=ask, expected_time=fleet.expected_seconds),
            rows.groupby("round")["prune_ratio_target"].mean().to_dict(),
        ),
        reward=RewardModel(config.reward, fleet.clients),
        ask=ask,
        clients=fleet.clients,
        participants=participants_per_round(config, fleet.clients),
        panel=np.zeros(0, dtype=np.int64),
    )
    return fleet, ask, Federation(parts)


class _AtPlayedMean:
    """The oracle at the run's own mean ratio of each round, where that is not the schedule itself."""

    def __init__(self, oracle: Policy, mean_ratio: dict[int, float]) -> None:
        self._oracle = oracle
        self._mean_ratio = mean_ratio

    def select(self, context: RoundContext) -> Arms:
        """The oracle's arms."""
        mean = self._mean_ratio[context.round_index]
        reachable = np.clip(context.schedule_ratio, context.ratio_low.mean(), context.ratio_high.mean())
        # What only rounding tells apart must not move the oracle's deadline from one step of the ratios to the next.
        if abs(mean - reachable) > _ON_SCHEDULE:
            context = replace(context, schedule_ratio=mean)
        return self._oracle.select(context)

    def update(self, feedback: Feedback) -> None:
        """Nothing to learn."""

    def state(self) -> State:
        """No state."""
        return {}

    def restore(self, state: State) -> None:
        """No state."""


def _expected(
    fleet: Fleet, plan: RoundPlan, quota: int, deadline_s: float | None
) -> tuple[tuple[Trips, Timeline], FloatArray, float]:
    """A round from second 0 on the fleet without jitter: its course, each client's seconds uncut, its duration."""
    work = plan.work
    columns = {one.name: np.broadcast_to(getattr(work, one.name), plan.clients.shape) for one in fields(work)}
    trips = trips_of(fleet, replace(plan, work=replace(work, **columns)))
    timeline = ArrayRounds().play(trips, 0.0, quota, deadline_s, Trace())
    time_s = trips.download_s + np.where(trips.fits_memory, trips.compute_s + trips.upload_s, 0.0)
    return (trips, timeline), time_s, timeline.end_s


def _by_round(rows: pd.DataFrame) -> Iterator[tuple[int, pd.DataFrame]]:
    """Each round's rows, clients ascending."""
    for index, own in rows.groupby("round", sort=True):
        yield int(str(index)), own.sort_values("client")
