"""Local jobs between submit and result: frozen, perhaps trained, each until it is read once or given up.

Nothing is trained before a result is wanted; then everything that waits is, as one cohort, whatever version each job
starts from. A job that is discarded before is never trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, replace

import numpy as np

from fedsim.contracts.common import IntArray, State
from fedsim.contracts.learning import Cohorts
from fedsim.contracts.program import Objective
from fedsim.learn.in_flight import InFlight, flights_from, flights_state
from fedsim.learn.model.adapter import Adapter
from fedsim.learn.train.importance import GroupScores
from fedsim.learn.train.jobs import Job, Update
from fedsim.structure import ModelShape


class JobQueue:
    """Jobs by ticket.

    Args:
        train: one update per job, in order.
    """

    def __init__(self, train: Callable[[Sequence[Job]], Sequence[Update]]) -> None:
        self._train = train
        self._pending: dict[int, Job] = {}  # by ticket, in the order of dispatch
        self._trained: dict[int, tuple[Job, Update]] = {}
        self._last_ticket = 0
        self.cohorts = Cohorts()

    def add(self, jobs: Sequence[Job]) -> IntArray:
        """Let jobs wait; returns their tickets, shape (P,)."""
        first = self._last_ticket + 1
        self._last_ticket += len(jobs)
        tickets = np.arange(first, self._last_ticket + 1, dtype=np.int64)
        self._pending.update(zip(tickets.tolist(), jobs, strict=True))
        return tickets

    def read(self, tickets: IntArray) -> list[tuple[Job, Update]]:
        """The jobs of `tickets` with what came of them; they stay.

        Raises:
            KeyError: an unknown ticket.
        """
        wanted = tickets.tolist()
        if any(ticket not in self._trained for ticket in wanted):
            waiting, jobs = list(self._pending), list(self._pending.values())
            self._pending.clear()
            updates = [replace(update, start=job.adapter) for job, update in zip(jobs, self._train(jobs), strict=True)]
            self._trained.update(zip(waiting, zip(jobs, updates, strict=True), strict=True))
        return [self._trained[ticket] for ticket in wanted]

    def take(self, tickets: IntArray) -> list[tuple[Job, Update]]:
        """As `read`, and they are forgotten."""
        self.read(tickets)
        return [self._trained.pop(ticket) for ticket in tickets.tolist()]

    def discard(self, tickets: IntArray) -> None:
        """Forget jobs; those that have not been trained yet never are. Raises KeyError as `read`."""
        for ticket in tickets.tolist():
            if self._pending.pop(ticket, None) is None:
                del self._trained[ticket]
                self.cohorts = replace(self.cohorts, in_vain=self.cohorts.in_vain + 1)

    def state(self, present: Adapter, shape: ModelShape) -> State:
        """Arrays of all that is here; none where nothing is.

        Args:
            present: the global adapter, which is in the checkpoint anyway.
        """
        counts = {"cohorts": np.array(astuple(self.cohorts), dtype=np.int64)}
        waiting = [InFlight(ticket, job, None) for ticket, job in self._pending.items()]
        waiting += [InFlight(ticket, job, update) for ticket, (job, update) in self._trained.items()]
        if not waiting:
            return counts
        tickets = {"flights.last_ticket": np.array([self._last_ticket])}
        return {**counts, **tickets, **flights_state(waiting, present, shape)}

    def restore(
        self,
        state: State,
        present: Adapter,
        shape: ModelShape,
        guide: Callable[[int], GroupScores | None],
        objective_at: Callable[[int], Objective | None],
    ) -> None:
        """Take what `state` gave.

        Args:
            present: the global adapter, restored before.
            guide: a static criterion's scores by client, which are not stored.
            objective_at: objectives by version, which are not either.
        """
        self._pending, self._trained = {}, {}
        if "cohorts" in state:
            self.cohorts = Cohorts(*state["cohorts"].tolist())
        if "flights.last_ticket" not in state:
            return
        self._last_ticket = int(state["flights.last_ticket"][0])
        for one in flights_from(state, present, shape, guide, objective_at):
            if one.update is None:
                self._pending[one.ticket] = one.job
            else:
                self._trained[one.ticket] = one.job, one.update
