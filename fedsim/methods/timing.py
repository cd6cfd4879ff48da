"""The learner of timing-only runs: it follows pruning ratios and trains nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedsim.specs import Evaluation, FloatArray, IntArray, LocalRequest, LocalResult, Outcome, State, Ticket
from fedsim.structure import ModelShape, achieved_ratio, kept_counts

_NOTHING = float("nan")


class TimingLearner:
    """Implements `fedsim.specs.Learner` without weights: losses are NaN, and nothing can be evaluated.

    It holds no state: under ``layer_local`` selection the structure's counts follow from the ratio alone.
    """

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        self._pending: dict[Ticket, LocalRequest] = {}
        self._next_ticket = 0

    def submit(self, request: LocalRequest) -> Ticket:
        """Remember the request."""
        self._next_ticket += 1
        self._pending[self._next_ticket] = request
        return self._next_ticket

    def result(self, ticket: Ticket) -> LocalResult:
        """The ratio that whole heads and channels allow; no losses."""
        request = self._pending.pop(ticket)
        kept = kept_counts(self._shape, np.full(self._shape.layers, request.ratio_target))
        return LocalResult(
            client=request.client,
            ratio=float(self._achieved(np.array([request.ratio_target]))[0]),
            loss_before=_NOTHING,
            loss_after=_NOTHING,
            lora_importance=_NOTHING,
            outcome=Outcome.OK,
            kept_before=kept,
            kept_after=kept,
            payload=None,
        )

    def discard(self, ticket: Ticket) -> None:
        """Forget the request."""
        del self._pending[ticket]

    def aggregate(self, results: Sequence[LocalResult]) -> None:
        """There is nothing to merge."""

    def cut(self, clients: IntArray, ratios: FloatArray) -> FloatArray:
        """Achieved ratios of the asked ones."""
        return self._achieved(ratios)

    def evaluate(self, panel: IntArray, consensus_ratio: float) -> Evaluation | None:
        """There is nothing to test."""
        return None

    def export(self, folder: Path) -> None:
        """There is no adapter."""

    def state(self) -> State:
        """Nothing to keep."""
        return {}

    def restore(self, state: State) -> None:
        """Nothing to take."""

    def _achieved(self, ratios: FloatArray) -> FloatArray:
        heads, channels = kept_counts(self._shape, ratios)
        return achieved_ratio(self._shape, heads[..., None], channels[..., None])
