"""The learner of timing-only runs: it follows pruning ratios and trains nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray, Outcome, State
from fedsim.contracts.learning import Cohorts, Evaluation, LocalRequests, LocalResults
from fedsim.learn.standins.pending import PendingJobs, PendingRows
from fedsim.structure import ModelShape, achieved_ratio, kept_counts


class TimingLearner:
    """Implements `fedsim.contracts.learning.Learner` without weights: losses are NaN, and nothing can be evaluated.

    Its only state is the jobs that wait: under ``layer_local`` selection counts follow from the ratio alone.
    """

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        self._pending = PendingJobs()

    def submit(self, requests: LocalRequests) -> IntArray:
        """Remember the requests."""
        return self._pending.add(requests)

    def result(self, tickets: IntArray) -> LocalResults:
        """The ratios that whole heads and channels allow; no losses."""
        return self._results(self._pending.take(tickets))

    def peek(self, tickets: IntArray) -> LocalResults:
        """As `result`, and the tickets stay good."""
        return self._results(self._pending.read(tickets))

    def _results(self, rows: PendingRows) -> LocalResults:
        count = len(rows.clients)
        heads, channels = kept_counts(self._shape, rows.ratio_asked)
        # Every layer keeps as many: one column stands for all of them, without a copy.
        kept = (
            np.broadcast_to(heads[:, None], (count, self._shape.layers)),
            np.broadcast_to(channels[:, None], (count, self._shape.layers)),
        )
        nothing = np.full(count, np.nan)
        return LocalResults(
            clients=rows.clients,
            ratio=achieved_ratio(self._shape, heads[:, None], channels[:, None]),
            loss_before=nothing,
            loss_after=nothing,
            lora_importance=nothing,
            outcome=np.full(count, Outcome.OK, dtype=np.int64),
            kept_before=kept,
            kept_after=kept,
            payload=None,
        )

    def discard(self, tickets: IntArray) -> None:
        """Forget the requests."""
        self._pending.take(tickets)

    def aggregate(self, results: LocalResults, mix: float = 1.0, weights: FloatArray | None = None) -> None:
        """There is nothing to merge."""

    def cut(self, clients: IntArray, ratios: FloatArray) -> FloatArray:
        """Achieved ratios of the asked ones."""
        return self._achieved(ratios)

    def evaluate(self, panel: IntArray, consensus_ratio: float) -> Evaluation | None:
        """There is nothing to test."""
        return None

    def cohorts(self) -> Cohorts | None:
        """Nothing is trained."""
        return None

    def export(self, folder: Path) -> None:
        """There is no adapter."""

    def state(self) -> State:
        """The jobs that wait."""
        return self._pending.state()

    def restore(self, state: State) -> None:
        """Take what `state` gave."""
        self._pending.restore(state)

    def _achieved(self, ratios: FloatArray) -> FloatArray:
        heads, channels = kept_counts(self._shape, ratios)
        return achieved_ratio(self._shape, heads[..., None], channels[..., None])
