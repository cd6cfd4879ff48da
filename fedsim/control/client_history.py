"""What the server remembers of every client: what rules that choose clients by their past go by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsim.contracts.common import FloatArray, IntArray, State
from fedsim.state import take


class ClientHistory:
    """Arrays over the fleet, shape (clients,).

    Attributes:
        loss: on the client's probe batch, of the global state that it was sent last; NaN where none is known.
        time_s: from dispatch to the end of upload, of the last update that was merged; NaN where none was.
        heard: number of the merge that the last update was part of; -1: never.
    """

    def __init__(self, clients: int) -> None:
        self.loss = np.full(clients, np.nan)
        self.time_s = np.full(clients, np.nan)
        self.heard = np.full(clients, -1, dtype=np.int64)

    def merged(self, clients: IntArray, loss: FloatArray, time_s: FloatArray, merge_index: int) -> None:
        """Remember updates of a merge, shape (P,) each; of two of one client the later."""
        self.loss[clients], self.time_s[clients], self.heard[clients] = loss, time_s, merge_index

    def is_known(self, clients: IntArray) -> NDArray[np.bool_]:
        """Which of these clients have been heard of, (P,)."""
        known: NDArray[np.bool_] = self.heard[clients] >= 0
        return known

    def state(self) -> State:
        """Arrays for the checkpoint."""
        return {"loss": self.loss.copy(), "time_s": self.time_s.copy(), "heard": self.heard.copy()}

    def restore(self, state: State) -> None:
        """Take the arrays of a checkpoint. Raises RunError where they do not fit."""
        self.loss = take(state, "loss", self.loss)
        self.time_s = take(state, "time_s", self.time_s)
        self.heard = take(state, "heard", self.heard)
