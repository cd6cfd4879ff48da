"""What a server may do with the mean difference of a merge, beyond adding it."""

from __future__ import annotations

from typing import Protocol

from fedsim.contracts.common import State
from fedsim.contracts.program import Tensor


class ServerOptimizer(Protocol):
    """Answers the mean difference of each merged tensor with what is added to the global adapter.

    Called once for each tensor of a merge, by names that are the same every time (`fedsim.learn.merge.differences`);
    it may remember what it saw by name.
    """

    def __call__(self, name: str, difference: Tensor) -> Tensor:
        """What is added, of the shape of `difference`."""

    def state(self) -> State:
        """Arrays for the checkpoint."""

    def restore(self, state: State) -> None:
        """Take the arrays of a checkpoint."""
