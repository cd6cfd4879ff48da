"""`balanced`: level every round with times learned from the devices' own past; and `oracle`, which is told them.

[ours, beyond FedSpine] Neither reads a device profile. `balanced` knows what an arm asks (shapes) and what was
measured; `oracle` is the bound: the same solver with the true expected times of the round.
"""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray, State
from fedsim.contracts.control import Arms, Ask, ExpectedTime, Feedback, RoundContext, Work
from fedsim.control.solver import level
from fedsim.control.time_model import TimeModel
from fedsim.state import take

PROBE_ROUNDS = 4
"""Warm-up rounds in which a device's rank is varied, so that the price of traffic shows."""
_PROBE_PLACES = (0.0, 1.0, 1.0 / 3.0, 2.0 / 3.0)


class Balanced:
    """Learns T = a FLOPs + b bytes + c per device and levels each round with it.

    In warm-up (no participant may prune) a device heard of fewer than four times plays ranks spread over those on
    offer. Afterwards a device's rank rises by at most one step a participation, so that a link that has worsened
    unseen, while little was sent over it, shows before it costs much, and a larger rank is taken only where it meets
    the deadline with two standard deviations to spare. A device whose update never arrives teaches
    nothing: a deadline that always cuts it, or memory that never suffices, stays unknown here.
    """

    def __init__(self, *, clients: int, ask: Ask) -> None:
        self._ask = ask
        self._model = TimeModel(clients)
        self._rank_index = np.full(clients, (ask.ranks.size - 1) // 2, dtype=np.int64)

    def select(self, context: RoundContext) -> Arms:
        """Choose arms that are expected to end together."""
        highest = np.minimum(self._rank_index[context.clients] + 1, self._ask.ranks.size - 1)
        arms = level(
            context,
            self._ask,
            self._model.predict,
            cautious_times=self._model.cautious,
            highest_rank=highest,
        )
        if context.ratio_high.max(initial=0.0) > 0.0:
            return arms
        heard = self._model.observations[context.clients]
        places = np.rint(np.asarray(_PROBE_PLACES) * (self._ask.ranks.size - 1)).astype(np.int64)
        probe = self._ask.ranks[places[np.minimum(heard, PROBE_ROUNDS - 1)]]
        return Arms(ratio=arms.ratio, rank=np.where(heard < PROBE_ROUNDS, probe, arms.rank))

    def update(self, feedback: Feedback) -> None:
        """Learn the measured times of those that arrived."""
        here = feedback.arrived & np.isfinite(feedback.time_s) & (feedback.time_s > 0)
        self._rank_index[feedback.clients[here]] = np.searchsorted(self._ask.ranks, feedback.rank[here])
        self._model.update(feedback.clients[here], _rows(feedback.work, here), feedback.time_s[here])

    def parameters(self, clients: IntArray) -> FloatArray:
        """Learned (s per tera-FLOP, s per megabyte, s) of each client, shape (P, 3)."""
        return self._model.parameters(clients)

    def state(self) -> State:
        """Arrays for the checkpoint."""
        return {**self._model.state(), "rank_index": self._rank_index.copy()}

    def restore(self, state: State) -> None:
        """Take the arrays of a checkpoint. Raises RunError where they do not fit."""
        self._model.restore(state)
        self._rank_index = take(state, "rank_index", self._rank_index)


class Oracle:
    """The same solver, told the true expected times of the round (not its jitter): what `balanced` could reach."""

    def __init__(self, *, ask: Ask, expected_time: ExpectedTime) -> None:
        self._ask = ask
        self._expected_time = expected_time

    def select(self, context: RoundContext) -> Arms:
        """Choose arms that end together but for jitter."""

        def times(clients: IntArray, work: Work) -> FloatArray:
            return self._expected_time(context.round_index, clients, work)

        return level(context, self._ask, times)

    def update(self, feedback: Feedback) -> None:
        """Nothing to learn."""

    def state(self) -> State:
        """No state."""
        return {}

    def restore(self, state: State) -> None:
        """No state."""


def _rows(work: Work, keep: np.ndarray) -> Work:
    """The work of some of the participants."""
    fields = {name: np.broadcast_to(np.asarray(value), keep.shape)[keep] for name, value in vars(work).items()}
    return Work(**fields)
