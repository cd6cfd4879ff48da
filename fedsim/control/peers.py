"""The last updates that a server saw: what a flight is measured against where a merge is of one flight or few.

A synchronous round is its own measure: a device is slow or quick beside those that took part with it. Under a server
that does not wait a merge may hold a single update, which would always be as quick as its mean. There the measure is
the last so many updates, this merge's included: as many as are at work at a time, 1000 at most [ours].
"""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import FloatArray, State
from fedsim.state import take


class Peers:
    """Times and LoRA importance of the last `room` updates; a room of 0 remembers nothing."""

    def __init__(self, room: int) -> None:
        self._kept = np.full((2, room), np.nan)
        self._written = np.zeros(1, dtype=np.int64)

    def with_those_before(self, time_s: FloatArray, importance: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Take in a merge's, shape (K,) each, and return the last so many, at least this merge's; (N,) each.

        Args:
            time_s: finite.
            importance: NaN where there is none.
        """
        room, count = self._kept.shape[1], len(time_s)
        if count >= room:
            self._kept = np.stack([time_s, importance])[:, count - room :]
            self._written[0] = room
            return time_s, importance
        places = (int(self._written[0]) + np.arange(count)) % room
        self._kept[:, places] = time_s, importance
        self._written += count
        known = self._kept[:, : min(int(self._written[0]), room)]
        return known[0], known[1]

    def state(self) -> State:
        """Arrays for the checkpoint; none where nothing is remembered."""
        if not self._kept.shape[1]:
            return {}
        return {"peers": self._kept.copy(), "peers_written": self._written.copy()}

    def restore(self, state: State) -> None:
        """Take the arrays of a checkpoint. Raises RunError where they do not fit."""
        if self._kept.shape[1]:
            self._kept = take(state, "peers", self._kept)
            self._written = take(state, "peers_written", self._written)
