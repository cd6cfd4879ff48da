"""Power modes that change at any moment: each device draws a new one every so many seconds, each from its own start."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.rng import Stream, uniforms


@dataclass(frozen=True, eq=False)
class ModeClock:
    """Draws by time. A client's draws are a function of the seed, of the client and of their number alone.

    Attributes:
        cumulative, line_of: as in the fleet's modes.
    """

    period_s: float
    cumulative: FloatArray
    line_of: IntArray
    seed: int

    def _phase(self, clients: IntArray) -> FloatArray:
        return uniforms(self.seed, Stream.MODE_CLOCK, clients)

    def epoch(self, clients: IntArray, now_s: FloatArray) -> IntArray:
        """How many times each client has drawn anew, shape (P,)."""
        phase = self._phase(clients)
        epoch: IntArray = np.floor(now_s / self.period_s + phase).astype(np.int64)
        # Rounding must not put a client on the other side of the change at which it stands.
        epoch += (epoch + 1 - phase) * self.period_s <= now_s
        epoch -= (epoch - phase) * self.period_s > now_s
        return epoch

    def change_s(self, clients: IntArray, epoch: IntArray) -> FloatArray:
        """When each client draws its mode number `epoch`."""
        change_s: FloatArray = (epoch - self._phase(clients)) * self.period_s
        return change_s

    def modes(self, clients: IntArray, epoch: IntArray) -> IntArray:
        """Index of the mode in an epoch among the profile's, shape (P,)."""
        draws = uniforms(self.seed, Stream.POWER_MODE, clients, epoch)
        modes: IntArray = (draws[:, None] >= self.cumulative[self.line_of[clients]]).sum(axis=1)
        return modes

    def changes(self, clients: IntArray, after_s: float, until_s: float) -> tuple[FloatArray, IntArray, IntArray]:
        """Time, client and new mode of every draw with another outcome in (after_s, until_s]."""
        first = self.epoch(clients, np.full(len(clients), after_s))
        last = self.epoch(clients, np.full(len(clients), until_s))
        counts = last - first
        who = np.repeat(clients, counts)
        ahead = np.arange(len(who)) - np.repeat(np.cumsum(counts) - counts, counts)
        epoch = np.repeat(first, counts) + 1 + ahead
        modes = self.modes(who, epoch)
        new = modes != self.modes(who, epoch - 1)
        return self.change_s(who, epoch)[new], who[new], modes[new]
