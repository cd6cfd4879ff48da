"""The strategy behind the server: flights are priced and sent off, arrivals are merged, whatever the method.

The round (FedSpine, arXiv 2501.02438): choose arms, freeze the jobs, let the clock run, train what arrived, aggregate,
reward, teach the policy, evaluate. Methods differ in their records, not in this code.

Unspecified in the paper; we chose: a client whose update did not arrive (late, out of memory, not finite) keeps the
ratio it had before; before the last evaluation every device, sampled lately or not, is cut to its target:
`prune.target` under ``every_device``; under ``fleet_mean`` the ratios as they stand, shifted together so that their
mean is the target. A run that ends at `server.time_budget_s` is cut and evaluated in that round; one that ends at
`server.target_accuracy` is not cut: the accuracy that ended it is that of the devices as they stood. Under ``global``
selection a job's cost is known only once it is trained, so its flights are trained at dispatch, whether or not their
updates arrive. A cut of the whole fleet (`Method.cuts_after`) takes no simulated time, as the last one does not.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim.contracts.common import FloatArray, IntArray, Outcome, State
from fedsim.contracts.control import Policy, Work
from fedsim.contracts.flights import Arrivals, Flights, Learned
from fedsim.contracts.learning import Cohorts, Learner, LocalRequests, LocalResults
from fedsim.contracts.program import LocalProgram
from fedsim.control.reward import RewardModel
from fedsim.federation.broadcast import Broadcast, broadcast_of
from fedsim.federation.dispatch import context_of, taken_arms
from fedsim.federation.parts import Parts
from fedsim.federation.pricing import FlightAsk
from fedsim.federation.settlement import feedback_of, rewards_of, settled
from fedsim.federation.staleness import merge_weights
from fedsim.federation.standing import FinalSparsity, Standing
from fedsim.federation.yardstick import cut_to_target, evaluation_of, is_last

__all__ = ["Federation", "FinalSparsity", "Parts"]


class Federation:
    """Implements `fedsim.contracts.flights.Strategy` for every method."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._standing = Standing(parts.clients, parts.config.model.lora_rank_max)
        self._broadcast = broadcast_of(parts.config.aggregate.rule, parts.clients)

    # -- the two calls of the server --------------------------------------------------------------------------------

    def dispatch(self, clients: IntArray, version: int, now_s: float) -> Flights:
        """Choose arms within the feasible bounds, and freeze every job."""
        parts, standing = self._parts, self._standing
        context = context_of(parts, standing, version, clients)
        ratio, rank = taken_arms(parts, standing, context)
        flight = standing.sent_off(clients, ratio, context.schedule_ratio)
        program = parts.method.local_program(version, parts.config)
        ask = self._priced(program, clients)
        tickets = parts.learner.submit(
            LocalRequests(
                clients=clients,
                flight=flight,
                version=version,
                ratio_asked=ratio,
                rank=rank,
                program=program,
            )
        )
        if program.cuts and parts.config.prune.selection == "global":
            results = parts.learner.peek(tickets)  # the kept groups cannot be known without training
            work = ask.work_of_counts(*results.kept_before, *results.kept_after, rank)
        else:
            work = ask.work(context.ratio_before, ratio, rank)
        count = len(clients)
        return Flights(
            flight=flight,
            clients=clients,
            version=np.full(count, version, dtype=np.int64),
            dispatch_s=np.full(count, now_s),
            ratio_before=context.ratio_before,
            ratio_asked=ratio,
            rank=rank,
            steps=np.full(count, program.steps, dtype=np.int64),
            work=_columns(work, count),
            ticket=tickets,
        )

    def merge(self, arrivals: Arrivals) -> Learned:
        """Train what arrived; the rest is forgotten untrained."""
        parts, standing, flights = self._parts, self._standing, arrivals.flights
        settlement = settled(arrivals, self._results_of(flights.ticket, arrivals.outcome == Outcome.OK))
        good, trained = settlement.good, settlement.trained
        parts.learner.aggregate(good, *merge_weights(parts.config.server, arrivals.staleness[trained]))
        standing.achieved[good.clients] = good.ratio
        standing.asked[flights.clients[trained]] = flights.ratio_asked[trained]
        self._follow_ranks(good, flights.rank[trained])
        rewards = rewards_of(parts, settlement)
        parts.policy.update(feedback_of(settlement, rewards.reward))
        last = is_last(parts, arrivals)
        if parts.method.prunes and (last or parts.method.cuts_after(arrivals.merge_index, parts.config)):
            cut_to_target(parts, standing)
        evaluation = evaluation_of(parts, standing, arrivals.merge_index, last)
        outcome = arrivals.outcome.copy()
        outcome[settlement.arrived] = settlement.results.outcome
        return Learned(
            ratio=standing.achieved[flights.clients],
            loss_before=settlement.spread(settlement.results.loss_before),
            loss_after=settlement.spread(settlement.results.loss_after),
            lora_importance=settlement.spread(settlement.results.lora_importance),
            rewards=rewards,
            outcome=outcome,
            accuracy=evaluation.accuracy if evaluation else None,
            loss=evaluation.loss if evaluation else None,
            accuracy_consensus=evaluation.accuracy_consensus if evaluation else None,
        )

    # -- what the run and the regret need -----------------------------------------------------------------------------

    @property
    def parts(self) -> Parts:
        """What it is made of: another policy in its place makes another federation of the same run."""
        return self._parts

    def round_ask(self, version: int, clients: IntArray) -> FlightAsk:
        """What arms demand of these clients in the dispatch that comes next: as their jobs will be priced."""
        return self._priced(self._parts.method.local_program(version, self._parts.config), clients)

    def final_sparsity(self) -> FinalSparsity:
        """Achieved pruning ratios over all clients, as they stand."""
        return self._standing.final_sparsity()

    def cohorts(self) -> Cohorts | None:
        """How full the cohorts were in which jobs were trained; None where nothing is trained."""
        return self._parts.learner.cohorts()

    def export(self, folder: Path) -> None:
        """Write the global adapter as a PEFT folder."""
        self._parts.learner.export(folder)

    def state(self) -> State:
        """Everything a later process needs to go on from a merge."""
        state: dict[str, np.ndarray] = {}
        for name, part in self._stateful():
            state.update({f"{name}.{key}": value for key, value in part.state().items()})
        return state

    def restore(self, state: State) -> None:
        """Take what `state` gave."""
        for name, part in self._stateful():
            prefix = f"{name}."
            part.restore({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})

    # -- parts of a merge ---------------------------------------------------------------------------------------------

    def _stateful(self) -> tuple[tuple[str, Standing | Learner | Policy | RewardModel | Broadcast], ...]:
        parts = self._parts
        return (
            ("federation", self._standing),
            ("learner", parts.learner),
            ("policy", parts.policy),
            ("reward", parts.reward),
            ("broadcast", self._broadcast),
        )

    def _priced(self, program: LocalProgram, clients: IntArray) -> FlightAsk:
        """What arms demand of these clients when they play a program."""
        return FlightAsk(self._parts.ask_of(program), self._broadcast, clients)

    def _follow_ranks(self, results: LocalResults, asked: IntArray) -> None:
        """Note what was merged, and who came back with fewer components than asked."""
        rank = asked if results.rank is None else results.rank
        fewer = rank < asked
        self._standing.rank_limit[results.clients[fewer]] = rank[fewer]
        self._broadcast.merged(results.clients, rank)

    def _results_of(self, tickets: IntArray, arrived: NDArray[np.bool_]) -> LocalResults:
        """Results of the flights whose updates arrived; jobs of the others are forgotten, untrained if they can be."""
        if not arrived.all():
            self._parts.learner.discard(tickets[~arrived])
        return self._parts.learner.result(tickets[arrived])


def _columns(work: Work, count: int) -> Work:
    """Every field as an array of shape (count,)."""

    def column(value: FloatArray) -> FloatArray:
        return np.broadcast_to(np.asarray(value, dtype=np.float64), (count,))

    return Work(**{one.name: column(getattr(work, one.name)) for one in fields(Work)})
