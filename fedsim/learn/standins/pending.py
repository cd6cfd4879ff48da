"""Local jobs that wait to be read, in columns: for learners that train nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.contracts.common import FloatArray, IntArray
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

    def take(self, tickets: IntArray) -> PendingRows:
        """The jobs of `tickets`, in their order, which are then forgotten.

        Raises:
            KeyError: a ticket that was taken already or never given, or that stands twice.
        """
        places = np.searchsorted(self._tickets, tickets)
        known = places < len(self._tickets)
        known[known] = self._tickets[places[known]] == np.asarray(tickets)[known]
        if not known.all():
            raise KeyError(int(tickets[int(np.argmin(known))]))
        left = np.ones(len(self._tickets), dtype=bool)
        left[places] = False
        if len(self._tickets) - np.count_nonzero(left) != len(tickets):
            raise KeyError("a ticket stands twice")
        rows = PendingRows(**{name: column[places] for name, column in self._columns.items()})
        self._tickets = self._tickets[left]
        self._columns = {name: column[left] for name, column in self._columns.items()}
        return rows
