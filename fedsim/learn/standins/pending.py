"""Local jobs that wait to be read, in columns: for learners that train nothing."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray, State
from fedsim.contracts.learning import LocalRequests


@dataclass(frozen=True, eq=False)
class PendingRows:
    """Jobs of one or more submissions, shape (P,) each. Fields as in `fedsim.contracts.learning.LocalRequests`."""

    clients: IntArray
    flight: IntArray
    version: IntArray
    ratio_asked: FloatArray
    rank: IntArray


class PendingJobs:
    """Remembers submitted jobs by ticket until they are taken, each once."""

    def __init__(self) -> None:
        self._tickets = np.empty(0, dtype=np.int64)  # ascending; room for more behind the first `_filled`
        self._there = np.empty(0, dtype=bool)
        self._columns: dict[str, np.ndarray] = {}
        self._filled = self._count = self._given = 0

    def __len__(self) -> int:
        return self._count

    def add(self, requests: LocalRequests) -> IntArray:
        """Remember jobs; returns their tickets, shape (P,), ascending and never given before."""
        count = len(requests.clients)
        tickets = np.arange(self._given + 1, self._given + 1 + count, dtype=np.int64)
        columns = {
            "clients": requests.clients,
            "flight": requests.flight,
            "version": np.full(count, requests.version, dtype=np.int64),
            "ratio_asked": requests.ratio_asked,
            "rank": requests.rank,
        }
        self._given += count
        self._make_room(count, columns)
        places = slice(self._filled, self._filled + count)
        self._tickets[places], self._there[places] = tickets, True
        for name, column in columns.items():
            self._columns[name][places] = column
        self._filled += count
        self._count += count
        return tickets

    def _make_room(self, count: int, like: dict[str, np.ndarray]) -> None:
        """Let `count` more fit: what was taken goes, so that a job costs the same however many wait."""
        if not self._columns:
            self._columns = {name: np.empty(0, dtype=column.dtype) for name, column in like.items()}
        if self._filled + count <= len(self._tickets):
            return
        kept = np.flatnonzero(self._there[: self._filled])
        room = max(2 * (len(kept) + count), 16)

        def moved(column: np.ndarray) -> np.ndarray:
            wider = np.zeros(room, dtype=column.dtype)
            wider[: len(kept)] = column[kept]
            return wider

        self._tickets, self._there = moved(self._tickets), moved(self._there)
        self._columns = {name: moved(column) for name, column in self._columns.items()}
        self._filled = len(kept)

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
        self._there[places] = False
        self._count -= len(places)
        return rows

    def state(self) -> State:
        """Arrays of the jobs that wait; none where none does."""
        if not len(self):
            return {}
        waiting = np.flatnonzero(self._there[: self._filled])
        columns = {f"pending.{name}": column[waiting] for name, column in self._columns.items()}
        return {"pending.given": np.array([self._given]), "pending.tickets": self._tickets[waiting], **columns}

    def restore(self, state: State) -> None:
        """Take what `state` gave."""
        self._tickets, self._there, self._columns = np.empty(0, dtype=np.int64), np.empty(0, dtype=bool), {}
        self._filled = self._count = 0
        if "pending.given" not in state:
            return
        self._given, self._tickets = int(state["pending.given"][0]), np.array(state["pending.tickets"])
        self._filled = self._count = len(self._tickets)
        self._there = np.ones(self._filled, dtype=bool)
        for field in fields(PendingRows):
            self._columns[field.name] = np.array(state[f"pending.{field.name}"])

    def _rows(self, places: IntArray) -> PendingRows:
        return PendingRows(**{name: column[places] for name, column in self._columns.items()})

    def _places(self, tickets: IntArray) -> IntArray:
        wanted = np.asarray(tickets, dtype=np.int64)
        places: IntArray = np.searchsorted(self._tickets[: self._filled], wanted)
        known = places < self._filled
        known[known] = (self._tickets[places[known]] == wanted[known]) & self._there[places[known]]
        if not known.all():
            raise KeyError(int(wanted[int(np.argmin(known))]))
        if len(np.unique(places)) != len(wanted):
            raise KeyError("a ticket is named twice")
        return places
