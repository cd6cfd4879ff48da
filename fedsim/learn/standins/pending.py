"""Local jobs that wait to be read, in columns: for learners that train nothing."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from fedsim.contracts.common import FloatArray, IntArray, State
from fedsim.contracts.learning import LocalRequests


@dataclass(frozen=True, eq=False)
class PendingRows:
    """Jobs of one or more submissions, shape (P,) each. Fields as in `fedsim.contracts.learning.LocalRequests`."""

    round_index: IntArray
    clients: IntArray
    ratio_target: FloatArray
    rank: IntArray
    prune: NDArray[np.bool_]
    learning_rate: FloatArray


class PendingJobs:
    """Remembers submitted jobs by ticket until they are taken, each once."""

    def __init__(self) -> None:
        self._tickets = np.empty(0, dtype=np.int64)  # ascending
        self._columns: dict[str, np.ndarray] = {}
        self._given = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def add(self, requests: LocalRequests) -> IntArray:
        """Remember jobs; returns their tickets, shape (P,), ascending and never given before."""
        count = len(requests.clients)
        tickets = np.arange(self._given + 1, self._given + 1 + count, dtype=np.int64)
        self._given += count
        columns = {
            "round_index": np.full(count, requests.round_index, dtype=np.int64),
            "clients": requests.clients,
            "ratio_target": requests.ratio_target,
            "rank": requests.rank,
            "prune": np.full(count, requests.prune),
            "learning_rate": np.full(count, requests.learning_rate, dtype=np.float64),
        }
        if len(self._tickets):
            columns = {name: np.concatenate([self._columns[name], column]) for name, column in columns.items()}
        self._tickets = np.concatenate([self._tickets, tickets])
        self._columns = columns
        return tickets

    def read(self, tickets: IntArray) -> PendingRows:
        """The jobs of `tickets`, in their order, which stay. Raises KeyError as `take`."""
        return self._rows(self._places(tickets))

    def take(self, tickets: IntArray) -> PendingRows:
        """The jobs of `tickets`, in their order, which are then forgotten.

        Raises:
            KeyError: a ticket that was taken already or never given, or that is named twice.
        """
        places = self._places(tickets)
        rows = self._rows(places)
        left = np.ones(len(self._tickets), dtype=bool)
        left[places] = False
        self._tickets = self._tickets[left]
        self._columns = {name: column[left] for name, column in self._columns.items()}
        return rows

    def state(self) -> State:
        """Arrays of the jobs that wait; none where none does."""
        if not len(self):
            return {}
        columns = {f"pending.{name}": column.copy() for name, column in self._columns.items()}
        return {"pending.given": np.array([self._given]), "pending.tickets": self._tickets.copy(), **columns}

    def restore(self, state: State) -> None:
        """Take what `state` gave."""
        self._tickets, self._columns = np.empty(0, dtype=np.int64), {}
        if "pending.given" not in state:
            return
        self._given, self._tickets = int(state["pending.given"][0]), np.array(state["pending.tickets"])
        for field in fields(PendingRows):
            self._columns[field.name] = np.array(state[f"pending.{field.name}"])

    def _rows(self, places: IntArray) -> PendingRows:
        return PendingRows(**{name: column[places] for name, column in self._columns.items()})

    def _places(self, tickets: IntArray) -> IntArray:
        places = np.searchsorted(self._tickets, tickets)
        known = places < len(self._tickets)
        known[known] = self._tickets[places[known]] == np.asarray(tickets)[known]
        if not known.all():
            raise KeyError(int(tickets[int(np.argmin(known))]))
        named = np.zeros(len(self._tickets), dtype=bool)
        named[places] = True
        if np.count_nonzero(named) != len(tickets):
            raise KeyError("a ticket is named twice")
        return places
