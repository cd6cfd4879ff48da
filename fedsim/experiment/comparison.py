"""What a comparison holds: a record, as JSON values too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

TIME_TO_TARGET = "simulated time of the first evaluation at or above the target; known to time_known_to_s"


@dataclass(frozen=True, eq=False)
class Comparison:
    """A finished comparison.

    Attributes:
        rows: one row per method (and configuration), ordered by sparsity group, then by time to target; beside what
            `compare` explains, ``time_known_to_s`` is the time to target less that of the evaluation before, and
            ``evaluated_every_rounds`` and ``evaluated_every_s`` (simulated) say how often a run was tested.
        runs: one row per run: the numbers that `rows` averages.
        target_accuracy: None where nothing was evaluated.
        target_is_default: whether the target was derived from the runs.
        target_is_provisional: whether it was, while runs were missing or unfinished: it may move as they finish.
        baseline: label of the row that speedups are measured against.
        speedup_of: ``time_to_target_s``, or ``simulated_s`` where nothing was evaluated (timing only).
        fastest_class: device class of `idle_fastest_fraction`; None where no run has client records.
        clock: the sentence on the clock's workload that belongs under every table.
        labels: how far the numbers may be trusted.
        warnings: what makes the runs unequal.
        is_surrogate: whether accuracies come from a fitted model instead of training.
    """

    rows: pd.DataFrame
    runs: pd.DataFrame
    target_accuracy: float | None
    target_is_default: bool
    baseline: str
    speedup_of: str
    fastest_class: str | None
    clock: str
    labels: tuple[str, ...]
    warnings: tuple[str, ...]
    is_surrogate: bool = False
    target_is_provisional: bool = False

    def as_dict(self) -> dict[str, Any]:
        """JSON values only; a missing number is null."""
        return {
            "target_accuracy": self.target_accuracy,
            "target_is_default": self.target_is_default,
            "target_is_provisional": self.target_is_provisional,
            "time_to_target_is": TIME_TO_TARGET,
            "baseline": self.baseline,
            "speedup_of": self.speedup_of,
            "fastest_class": self.fastest_class,
            "clock": self.clock,
            "labels": list(self.labels),
            "surrogate": self.is_surrogate,
            "warnings": list(self.warnings),
            "rows": _records(self.rows),
            "runs": _records(self.runs),
        }


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): _plain(value) for name, value in row.items()} for row in table.to_dict("records")]


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
