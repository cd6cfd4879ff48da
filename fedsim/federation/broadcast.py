"""What the server sends at dispatch, as the rank of a LoRA that takes as many bytes.

Under most rules it is the global adapter at the client's own rank. Under a rule that sends stacks (``stack``, FLoRA,
arXiv 2409.05976) it is the factors that were stacked and merged since the client last took part: their rank is the sum
of the ranks of all who contributed, and each client takes every stack once (in round 0 there is none, and afterwards
its own is among them).

Unspecified in the source; we chose: a client that missed rounds takes the stacks of all of them; one whose update did
not arrive takes its stacks again; stacks have the widths of the client's own structure. Not counted: the client's
product that merges a stack, and its memory. A server could send the dense difference where that is smaller: not done.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from fedsim.contracts.common import IntArray, State
from fedsim.errors import RunError
from fedsim.learn.entries import RULES


class Broadcast(Protocol):
    """Follows what clients have received."""

    def received_rank(self, clients: IntArray, rank: IntArray) -> IntArray:
        """Rank of what clients download whose LoRA has `rank`, shape (P,)."""

    def merged(self, clients: IntArray, rank: IntArray) -> None:
        """The updates of these clients were merged, at these ranks."""

    def state(self) -> State:
        """Arrays for the checkpoint."""

    def restore(self, state: State) -> None:
        """Take the arrays of a checkpoint."""


class AdapterBroadcast:
    """The global adapter, at each client's own rank. Has no state."""

    def received_rank(self, clients: IntArray, rank: IntArray) -> IntArray:
        """The client's own."""
        return rank

    def merged(self, clients: IntArray, rank: IntArray) -> None:
        """Nothing to follow."""

    def state(self) -> State:
        """No state."""
        return {}

    def restore(self, state: State) -> None:
        """No state."""


class StackBroadcast:
    """The stacks that a client has not got yet."""

    def __init__(self, clients: int) -> None:
        self._sent = 0  # sum of the ranks of everything merged so far
        self._received = np.zeros(clients, dtype=np.int64)  # the same, as far as each client has it

    def received_rank(self, clients: IntArray, rank: IntArray) -> IntArray:
        """Sum of the ranks merged since each client last took part."""
        missing: IntArray = self._sent - self._received[clients]
        return missing

    def merged(self, clients: IntArray, rank: IntArray) -> None:
        """These clients hold what was there at dispatch; what they sent is what all will need next."""
        self._received[clients] = self._sent
        self._sent += int(rank.sum())

    def state(self) -> State:
        """Arrays for the checkpoint."""
        return {"sent": np.array([self._sent]), "received": self._received.copy()}

    def restore(self, state: State) -> None:
        """Take the arrays of a checkpoint.

        Raises:
            RunError: it was written by a run of another rule.
        """
        if "received" not in state:
            raise RunError("the checkpoint does not say which stacks clients have: it is of another aggregate.rule")
        self._sent = int(state["sent"][0])
        self._received = np.array(state["received"], dtype=np.int64)


def broadcast_of(rule: str, clients: int) -> Broadcast:
    """What the server of an aggregation rule sends."""
    return StackBroadcast(clients) if RULES.named(rule).sends_stacks else AdapterBroadcast()
