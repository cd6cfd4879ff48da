"""The learner of surrogate runs: losses and accuracies drawn from a model fitted to one real run.

See `fedsim.learn.standins.surrogate_model` for the formulas. Nothing is trained; every output of such a run says so.
Each draw belongs to a client, or a client and a flight: another client's coming or going leaves it as it was.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray, Outcome, State
from fedsim.contracts.learning import Cohorts, Evaluation, LocalRequests, LocalResults
from fedsim.learn.standins.pending import PendingJobs, PendingRows
from fedsim.learn.standins.surrogate_model import Local, PanelFit, SurrogateModel, spread
from fedsim.rng import Stream, normals
from fedsim.state import take
from fedsim.structure import ModelShape, achieved_ratio, kept_counts

_BEFORE, _AFTER, _IMPORTANCE = 0, 1, 2
"""Last key of the draws of one flight."""


class SurrogateLearner:
    """Implements `fedsim.contracts.learning.Learner` by a fitted loss model.

    Ratios go as under ``layer_local`` selection: the structure's counts follow from the ratio alone. Memory: 16 bytes
    a client.
    """

    def __init__(self, model: SurrogateModel, shape: ModelShape, clients: int, seed: int) -> None:
        self._model, self._shape, self._seed = model, shape, seed
        self._progress = np.zeros(1)
        self._ratio = np.zeros(clients)
        offsets = normals(seed, Stream.SURROGATE_CLIENT, np.arange(clients))
        self._offset = model.noise.client * offsets
        self._pending = PendingJobs()
        # Progress and dose at dispatch, by version: what a job is frozen against.
        self._dispatched: dict[int, tuple[float, float]] = {}

    def submit(self, requests: LocalRequests) -> IntArray:
        """Freeze the jobs against the present progress."""
        dose = requests.program.dose / self._model.first_dose
        self._dispatched[requests.version] = (float(self._progress[0]), dose)
        return self._pending.add(requests)

    def result(self, tickets: IntArray) -> LocalResults:
        """Drawn losses and importance; the ratios that whole heads and channels allow."""
        results = self._results(self._pending.take(tickets))
        self._forget()
        return results

    def peek(self, tickets: IntArray) -> LocalResults:
        """As `result`, and the tickets stay good."""
        return self._results(self._pending.read(tickets))

    def _results(self, rows: PendingRows) -> LocalResults:
        versions, number = np.unique(rows.version, return_inverse=True)
        frozen = np.array([self._dispatched[int(version)] for version in versions]).reshape(-1, 2)
        progress, dose = frozen[number, 0], frozen[number, 1]

        model, clients, count = self._model, rows.clients, len(rows.clients)
        heads, channels = kept_counts(self._shape, rows.ratio_asked)
        kept = tuple(np.broadcast_to(kind[:, None], (count, self._shape.layers)) for kind in (heads, channels))
        ratio = achieved_ratio(self._shape, heads[:, None], channels[:, None])
        ratio_start = np.minimum(self._ratio[clients], ratio)  # groups that come back are there from the start
        contribution = dose * model.contribution.of(rows.rank)

        log_before = model.curve.log_loss(progress, ratio_start) + spread(model.curve.learned(progress)) * (
            self._offset[clients] + model.noise.before * self._draws(rows.flight, clients, _BEFORE)
        )
        log_before = np.clip(log_before, *np.log(model.seen.loss_before))
        local = model.local
        columns, width = Local.columns(
            model.curve, local.advance, local.least_spread, progress, contribution, log_before, ratio_start, ratio
        )
        change = columns @ np.array([local.level, local.change, local.deviation, local.cut])
        noise = model.noise.after * width * self._draws(rows.flight, clients, _AFTER)
        log_after = np.clip(log_before + change + noise, *np.log(model.seen.loss_after))
        return LocalResults(
            clients=clients,
            ratio=ratio,
            loss_before=np.exp(log_before),
            loss_after=np.exp(log_after),
            lora_importance=self._importance(rows.flight, clients, rows.rank, ratio, log_before),
            outcome=np.full(count, Outcome.OK, dtype=np.int64),
            kept_before=(kept[0], kept[1]),
            kept_after=(kept[0], kept[1]),
            payload=contribution.tolist(),
        )

    def discard(self, tickets: IntArray) -> None:
        """Forget the requests."""
        self._pending.take(tickets)
        self._forget()

    def aggregate(self, results: LocalResults, mix: float = 1.0, weights: FloatArray | None = None) -> None:
        """Progress by the mean contribution, weighted; keep the new ratios."""
        if not len(results.clients):
            return
        contribution = np.array(results.payload, dtype=np.float64)
        if weights is not None:
            contribution = contribution * weights
        self._progress = self._progress + mix * np.mean(contribution)
        self._ratio[results.clients] = results.ratio

    def cut(self, clients: IntArray, ratios: FloatArray) -> FloatArray:
        """Achieved ratios of the asked ones."""
        heads, channels = kept_counts(self._shape, ratios)
        self._ratio[clients] = achieved_ratio(self._shape, heads[..., None], channels[..., None])
        return self._ratio[clients]

    def evaluate(self, panel: IntArray, consensus_ratio: float) -> Evaluation:
        """The fitted functions of progress and of the whole fleet's ratios (not of the panel's alone)."""
        curve, progress = self._model.curve, float(self._progress[0])
        square = float(np.mean(self._ratio**2))
        tests = self._model.tests

        def accuracy(fitted: PanelFit) -> float:
            return float(1.0 / (1.0 + np.exp(-fitted.level - fitted.gain(curve, progress, square))))

        return Evaluation(
            accuracy=accuracy(tests.accuracy),
            loss=float(np.exp(tests.loss.level - tests.loss.gain(curve, progress, square))),
            accuracy_consensus=accuracy(tests.accuracy_consensus),
        )

    def cohorts(self) -> Cohorts | None:
        """Nothing is trained."""
        return None

    def export(self, folder: Path) -> None:
        """There is no adapter."""

    def state(self) -> State:
        """Progress, shape (1,), each client's ratio, shape (C,), and the jobs that wait."""
        arrays: dict[str, np.ndarray] = {"progress": self._progress.copy(), "ratio": self._ratio.copy()}
        if len(self._pending):
            arrays["dispatched"] = np.array(list(self._dispatched), dtype=np.int64)
            arrays["dispatched_at"] = np.array(list(self._dispatched.values()))
        return {**arrays, **self._pending.state()}

    def restore(self, state: State) -> None:
        """Take what `state` gave. Raises RunError where it does not fit."""
        self._progress = take(state, "progress", self._progress)
        self._ratio = take(state, "ratio", self._ratio)
        self._pending.restore(state)
        self._dispatched = {}
        if len(self._pending):
            at = [(float(progress), float(dose)) for progress, dose in state["dispatched_at"]]
            self._dispatched = dict(zip(state["dispatched"].tolist(), at, strict=True))

    def _importance(
        self, flight: IntArray, clients: IntArray, rank: IntArray, ratio: FloatArray, log_before: FloatArray
    ) -> FloatArray:
        fitted = self._model.importance
        if fitted is None:
            return np.full(len(clients), np.nan)
        ranks = np.log2(rank / self._model.contribution.rank_reference)
        noise = fitted.noise * self._draws(flight, clients, _IMPORTANCE)
        return np.exp(fitted.rank * ranks + fitted.ratio * ratio + fitted.loss * log_before + noise)

    def _draws(self, flight: IntArray, clients: IntArray, what: int) -> FloatArray:
        """Standard normal numbers, a function of seed, client, flight and `what` alone."""
        drawn = np.empty(len(clients))
        for index in np.unique(flight):
            here = flight == index
            drawn[here] = normals(self._seed, Stream.SURROGATE_NOISE, clients[here], int(index), what)
        return drawn

    def _forget(self) -> None:
        if not len(self._pending):
            self._dispatched.clear()
