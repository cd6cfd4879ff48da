"""What the server keeps of every client: ratios as asked and as achieved, ranks, flights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray, State


@dataclass(frozen=True)
class FinalSparsity:
    """Achieved pruning ratios over the whole fleet after the final cut."""

    mean: float
    low: float
    high: float


class Standing:
    """Arrays over the fleet, shape (clients,).

    Two views of pruning: what was asked (the arm, which policies reason about) and what whole heads allow.

    Attributes:
        asked, achieved: cumulative pruning ratios.
        rank_limit: a client may give up LoRA components of its own accord (rank self-pruning); it is offered no more
            since.
        flights: how many times each client was sent off.
    """

    def __init__(self, clients: int, rank_max: int) -> None:
        self.asked = np.zeros(clients)
        self.achieved = np.zeros(clients)
        self.rank_limit = np.full(clients, rank_max, dtype=np.int64)
        self.flights = np.zeros(clients, dtype=np.int64)
        # How far each client's last arm stood from the fleet's schedule of that time, and the sum: a policy that
        # re-centres ratios does so against the standing fleet, of which a dispatch may be a small part.
        self._offset = np.zeros(clients)
        self._offset_sum = 0.0

    def sent_off(self, clients: IntArray, ratio_asked: FloatArray, schedule: float) -> IntArray:
        """Count a dispatch; the flight number of each client, shape (P,)."""
        flight: IntArray = self.flights[clients]
        self.flights[clients] += 1
        offset = ratio_asked - schedule
        self._offset_sum += float(np.sum(offset - self._offset[clients]))
        self._offset[clients] = offset
        return flight

    def others(self, clients: IntArray) -> tuple[int, float]:
        """How many clients are not among these, and the sum of their offsets from the schedule."""
        count = len(self.asked) - len(clients)
        return count, (self._offset_sum - float(np.sum(self._offset[clients])) if count else 0.0)

    def final_sparsity(self) -> FinalSparsity:
        """Achieved pruning ratios over all clients, as they stand."""
        return FinalSparsity(float(self.achieved.mean()), float(self.achieved.min()), float(self.achieved.max()))

    def state(self) -> State:
        """Arrays for the checkpoint."""
        return {
            "asked": self.asked,
            "achieved": self.achieved,
            "rank_limit": self.rank_limit,
            "flights": self.flights,
            "offset": self._offset,
            "offset_sum": np.array([self._offset_sum]),
        }

    def restore(self, state: State) -> None:
        """Take what `state` gave."""
        self.asked, self.achieved = np.array(state["asked"]), np.array(state["achieved"])
        self.rank_limit, self.flights = np.array(state["rank_limit"]), np.array(state["flights"])
        self._offset, self._offset_sum = np.array(state["offset"]), float(state["offset_sum"][0])
