"""What arms demand of the clients of one dispatch: the method's work at that time, and the download really made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from fedsim.contracts.common import IntArray
from fedsim.contracts.control import Ask, Work
from fedsim.federation.broadcast import Broadcast


class FlightAsk:
    """Implements `Ask` for given participants: arguments' first axis is theirs, or 1 for all alike.

    Args:
        ask: of the program that the participants play.
        broadcast: as it stands before the round.
        clients: participants, (P,).
    """

    def __init__(self, ask: Ask, broadcast: Broadcast, clients: IntArray) -> None:
        self._ask = ask
        self._broadcast = broadcast
        self._clients = clients

    @property
    def ranks(self) -> IntArray:
        """The LoRA ranks on offer, ascending."""
        return self._ask.ranks

    def work(self, ratio_before: ArrayLike, ratio: ArrayLike, rank: ArrayLike) -> Work:
        """Work of the participants' jobs; fields broadcast to one shape."""
        return self._priced(rank, lambda ranks: self._ask.work(ratio_before, ratio, ranks))

    def work_of_counts(
        self,
        heads_start: ArrayLike,
        channels_start: ArrayLike,
        heads_end: ArrayLike,
        channels_end: ArrayLike,
        rank: ArrayLike,
    ) -> Work:
        """The same for jobs whose layers keep unequal counts, (P, layers) each."""
        counts = (heads_start, channels_start, heads_end, channels_end)
        return self._priced(rank, lambda ranks: self._ask.work_of_counts(*counts, ranks))

    def _priced(self, rank: ArrayLike, work_at: Callable[[ArrayLike], Work]) -> Work:
        """Work at `rank`, with the download of what the participants receive."""
        work = work_at(rank)
        wanted = np.asarray(rank, dtype=np.int64)
        received = self._broadcast.received_rank(self._clients, wanted)
        if received is wanted:
            return work
        column = received.reshape(received.shape + (1,) * (np.ndim(work.flops) - 1))
        return replace(work, download_bytes=work_at(column).download_bytes)
