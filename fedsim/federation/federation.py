"""The strategy behind the server process: one federated round after another, whatever the method.

The round (FedSpine, arXiv 2501.02438): choose arms, freeze the jobs, let the clock run, train what arrived, aggregate,
reward, teach the policy, evaluate. Methods differ in their settings, not in this code.

Unspecified in the paper; we chose: a client whose update did not arrive (late, out of memory, not finite) keeps the
ratio it had before; before the last evaluation every device, sampled lately or not, is cut to its target:
`prune.target` under ``every_device``; under ``fleet_mean`` the ratios as they stand, shifted together so that their
mean is the target. A run that ends at `server.time_budget_s` is cut and evaluated in that round; one that ends at
`server.target_accuracy` is not cut: the accuracy that ended it is that of the devices as they stood. Under ``global``
selection a job's cost is known only once it is trained, so its participants are trained at dispatch, whether or not
their updates arrive. A cut of the whole fleet (`Method.cuts_after`) takes no simulated time, as the last one does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim.contracts.common import FloatArray, IntArray, Outcome, State
from fedsim.contracts.control import Arms, Ask, Feedback, Policy, RoundContext
from fedsim.contracts.flights import RoundLearning, RoundPlan, RoundReport
from fedsim.contracts.learning import Evaluation, Learner, LocalRequests, LocalResults
from fedsim.control.policies import recentre
from fedsim.control.reward import RewardModel
from fedsim.control.schedule import default_step_max, feasible_bounds, ratio_cap
from fedsim.errors import ConfigError
from fedsim.federation.broadcast import Broadcast, broadcast_of
from fedsim.federation.round_ask import RoundAsk
from fedsim.methods.base import Method
from fedsim.methods.rates import learning_rate
from fedsim.settings import Config

_RATIO_SLACK = 1e-6
"""Rounding that a policy's bisections may leave; what is beyond a bound by less is clipped."""


@dataclass(frozen=True)
class Parts:
    """What a federation is made of.

    Attributes:
        quiet_ask: what a job asks in rounds in which the method estimates no importance; None where there are none.
    """

    config: Config
    method: Method
    learner: Learner
    policy: Policy
    reward: RewardModel
    ask: Ask
    clients: int
    participants: int
    panel: IntArray
    quiet_ask: Ask | None = None


@dataclass(frozen=True)
class FinalSparsity:
    """Achieved pruning ratios over the whole fleet after the final cut."""

    mean: float
    low: float
    high: float


class Federation:
    """Implements `fedsim.contracts.flights.Strategy` for every method."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        # Two views of pruning: what was asked (the arm, which policies reason about) and what whole heads allow.
        self._asked = np.zeros(parts.clients)
        self._achieved = np.zeros(parts.clients)
        # Clients may give up LoRA components of their own accord (rank self-pruning); they are offered no more since.
        self._rank_limit = np.full(parts.clients, parts.config.model.lora_rank_max, dtype=np.int64)
        self._broadcast = broadcast_of(parts.config.aggregate.rule, parts.clients)
        self._flights = np.zeros(parts.clients, dtype=np.int64)  # how often each client was sent off
        self._tickets: IntArray | None = None
        self._results: LocalResults | None = None  # trained before the clock needed them (global selection)
        self._plan: RoundPlan | None = None
        self._step_max = _step_max(parts)

    # -- the two calls of the server process ------------------------------------------------------------------------

    def open_round(self, round_index: int, clients: IntArray) -> RoundPlan:
        """Choose arms within the feasible bounds, and freeze every job."""
        parts, before = self._parts, self._asked[clients]
        context = self._context(round_index, clients, before)
        arms = parts.policy.select(context)
        _check_arms(parts.config, context, arms)
        ratio = np.clip(arms.ratio, context.ratio_low, context.ratio_high)
        rank = np.minimum(arms.rank, self._rank_limit[clients])
        ask = self.round_ask(round_index, clients)
        plan = RoundPlan(
            round_index,
            clients,
            before,
            ratio,
            rank,
            ask.work(before, ratio, rank),
            flight=self._flights[clients],
            steps=np.full(len(clients), parts.config.train.local_steps),
        )
        self._flights[clients] += 1
        iterative = parts.method.prunes and parts.method.iterative
        prune = iterative and round_index >= parts.config.prune_warmup_rounds
        self._tickets = parts.learner.submit(
            LocalRequests(
                round_index=round_index,
                clients=clients,
                ratio_target=ratio,
                rank=rank,
                prune=prune,
                local_steps=parts.config.train.local_steps,
                recovery_steps=parts.config.local_recovery_steps if parts.method.prunes else 0,
                learning_rate=learning_rate(parts.method, parts.config, round_index),
                estimate=parts.method.estimates(round_index, parts.config),
            )
        )
        if prune and parts.config.prune.selection == "global":
            results = parts.learner.result(self._tickets)
            kept = (*results.kept_before, *results.kept_after)
            plan = replace(plan, work=ask.work_of_counts(*kept, rank))
            self._tickets, self._results = None, results
        self._plan = plan
        return plan

    def close_round(self, report: RoundReport) -> RoundLearning:
        """Train what arrived; the rest is forgotten untrained."""
        plan = self._plan
        if plan is None or plan.round_index != report.round_index:
            raise RuntimeError(f"round {report.round_index} was closed without having been opened")
        parts = self._parts
        arrived = report.outcome == Outcome.OK
        results = self._results_of(arrived)
        usable = results.outcome == Outcome.OK
        good = results.take(usable)
        parts.learner.aggregate(good)
        self._achieved[good.clients] = good.ratio
        trained = np.zeros(len(plan.clients), dtype=bool)
        trained[arrived] = usable
        self._asked[plan.clients[trained]] = plan.ratio_target[trained]
        self._follow_ranks(good, plan.rank[trained])

        loss_before = _spread(results.loss_before, arrived)
        loss_after = _spread(results.loss_after, arrived)
        time_s = np.where(arrived, report.upload_end_s - report.start_s, np.nan)
        importance = _spread(results.lora_importance, arrived)
        rewards = parts.reward.compute(
            loss_before=loss_before,
            loss_after=loss_after,
            ratio_before=plan.ratio_before,
            ratio=plan.ratio_target,
            lora_importance=importance,
            time_s=time_s,
            arrived=trained,
            step_max=self._step_max,
            target=parts.config.prune.target if parts.method.prunes else 0.0,
        )
        parts.policy.update(
            Feedback(
                round_index=plan.round_index,
                clients=plan.clients,
                ratio_before=plan.ratio_before,
                ratio=plan.ratio_target,
                rank=plan.rank,
                work=plan.work,
                time_s=time_s,
                arrived=arrived,
                reward=rewards.reward,
            )
        )
        last = self._is_last(report)
        if parts.method.prunes and (last or parts.method.cuts_after(plan.round_index, parts.config)):
            self._cut_to_target()
        evaluation = self._evaluate(plan.round_index, last)
        outcome = report.outcome.copy()
        outcome[arrived] = results.outcome
        return RoundLearning(
            ratio=self._achieved[plan.clients],
            loss_before=loss_before,
            loss_after=loss_after,
            lora_importance=importance,
            rewards=rewards,
            outcome=outcome,
            accuracy=evaluation.accuracy if evaluation else None,
            loss=evaluation.loss if evaluation else None,
            accuracy_consensus=evaluation.accuracy_consensus if evaluation else None,
        )

    # -- what the run and the regret ask -------------------------------------------------------------------------------

    @property
    def parts(self) -> Parts:
        """What it is made of: another policy in its place makes another federation of the same run."""
        return self._parts

    def round_ask(self, round_index: int, clients: IntArray) -> RoundAsk:
        """What arms ask of these participants in the round that opens next: as their jobs will be priced."""
        parts = self._parts
        estimates = parts.method.estimates(round_index, parts.config)
        ask = parts.ask if estimates or parts.quiet_ask is None else parts.quiet_ask
        return RoundAsk(ask, self._broadcast, clients)

    def final_sparsity(self) -> FinalSparsity:
        """Achieved pruning ratios over all clients, as they stand."""
        return FinalSparsity(float(self._achieved.mean()), float(self._achieved.min()), float(self._achieved.max()))

    def export(self, folder: Path) -> None:
        """Write the global adapter as a PEFT folder."""
        self._parts.learner.export(folder)

    def state(self) -> State:
        """Everything a later process needs to go on from a round's end."""
        state = {
            "federation.asked": self._asked,
            "federation.achieved": self._achieved,
            "federation.rank_limit": self._rank_limit,
            "federation.flights": self._flights,
        }
        for name, part in self._stateful():
            state.update({f"{name}.{key}": value for key, value in part.state().items()})
        return state

    def restore(self, state: State) -> None:
        """Take what `state` gave."""
        self._asked = np.array(state["federation.asked"])
        self._achieved = np.array(state["federation.achieved"])
        self._rank_limit = np.array(state["federation.rank_limit"])
        self._flights = np.array(state["federation.flights"])
        for name, part in self._stateful():
            prefix = f"{name}."
            part.restore({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})

    # -- parts of a round -------------------------------------------------------------------------------------------

    def _stateful(self) -> tuple[tuple[str, Learner | Policy | RewardModel | Broadcast], ...]:
        parts = self._parts
        return (
            ("learner", parts.learner),
            ("policy", parts.policy),
            ("reward", parts.reward),
            ("broadcast", self._broadcast),
        )

    def _follow_ranks(self, results: LocalResults, asked: IntArray) -> None:
        """Note what was merged, and who came back with fewer components than asked."""
        rank = asked if results.rank is None else results.rank
        fewer = rank < asked
        self._rank_limit[results.clients[fewer]] = rank[fewer]
        self._broadcast.merged(results.clients, rank)

    def _results_of(self, arrived: NDArray[np.bool_]) -> LocalResults:
        """Results of the clients whose updates arrived; jobs of the others are forgotten, untrained if they can be."""
        tickets, results = self._tickets, self._results
        self._tickets, self._results = None, None
        if results is not None:
            return results.take(arrived)
        if tickets is None:
            raise RuntimeError("a round was closed twice")
        if not arrived.all():
            self._parts.learner.discard(tickets[~arrived])
        return self._parts.learner.result(tickets[arrived])

    def _context(self, round_index: int, clients: IntArray, before: FloatArray) -> RoundContext:
        config, method = self._parts.config, self._parts.method
        low = high = before
        if method.prunes and method.iterative:
            low, high = feasible_bounds(
                config.prune,
                round_index=round_index,
                ratio_before=before,
                warmup_rounds=config.prune_warmup_rounds,
                end_round=config.prune_end_round,
                step_max=self._step_max,
            )
        return RoundContext(
            round_index=round_index,
            clients=clients,
            ratio_before=before,
            ratio_low=low,
            ratio_high=high,
            schedule_ratio=method.schedule(round_index, config) if method.prunes else 0.0,
            ratio_max=ratio_cap(config.prune) if method.prunes else 0.0,
            step_max=self._step_max,
        )

    def _is_last(self, report: RoundReport) -> bool:
        """Whether no round follows, whatever the evaluation says."""
        server = self._parts.config.server
        out_of_time = server.time_budget_s is not None and report.end_s >= server.time_budget_s
        return out_of_time or report.round_index == server.rounds - 1

    def _cut_to_target(self) -> None:
        prune = self._parts.config.prune
        if prune.target_scope == "every_device":
            targets = np.full_like(self._asked, prune.target)
        else:
            low = np.zeros_like(self._asked) if prune.reversible else self._asked
            targets = recentre(self._asked, prune.target, low, np.full_like(self._asked, prune.max_ratio))
        # Only shrinking is a cut; a device that stands above its new target keeps what it has where it may not grow.
        clients = np.arange(len(self._asked), dtype=np.int64)
        self._achieved = self._parts.learner.cut(clients, targets)
        self._asked = targets

    def _evaluate(self, round_index: int, last: bool) -> Evaluation | None:
        every = self._parts.config.evaluate.every_rounds
        if not last and (round_index + 1) % every != 0:
            return None
        return self._parts.learner.evaluate(self._parts.panel, float(self._asked.mean()))


def _step_max(parts: Parts) -> float:
    """The largest rise of a device's ratio in one participation."""
    config = parts.config
    if not parts.method.iterative:
        return 0.0
    if config.prune.max_step is not None:
        return config.prune.max_step
    return default_step_max(
        config.prune_warmup_rounds,
        config.prune_end_round,
        config.prune.target,
        clients=parts.clients,
        participants_per_round=parts.participants,
    )


def _check_arms(config: Config, context: RoundContext, arms: Arms) -> None:
    """Refuse what a policy may not choose: a user's own may be wrong, and the clock would run on with nonsense."""
    name, count = config.control.policy, len(context.clients)
    if arms.ratio.shape != (count,) or arms.rank.shape != (count,):
        raise ConfigError(
            f"control.policy '{name}' chose ratios of shape {arms.ratio.shape} and ranks of shape {arms.rank.shape} in "
            f"round {context.round_index}; ({count},) each is needed"
        )
    within = (arms.ratio >= context.ratio_low - _RATIO_SLACK) & (arms.ratio <= context.ratio_high + _RATIO_SLACK)
    highest = config.model.lora_rank_max
    offered = (arms.rank >= 1) & (arms.rank <= highest)
    for good, what, allowed in (
        (within, arms.ratio, "within context.ratio_low and ratio_high"),
        (offered, arms.rank, f"a rank of 1 to {highest}"),
    ):
        if not good.all():  # False for NaN, too
            place = int(np.argmin(good))
            raise ConfigError(
                f"control.policy '{name}' chose {what[place]} for client {context.clients[place]} in round "
                f"{context.round_index}; it must be {allowed}"
            )


def _spread(values: FloatArray, arrived: NDArray[np.bool_]) -> FloatArray:
    """One number per participant from one per arrived client, NaN for the others."""
    column = np.full(len(arrived), np.nan)
    column[arrived] = values
    return column
