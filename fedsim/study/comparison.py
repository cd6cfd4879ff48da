"""What a comparison holds: a record, as a plain table and as JSON values too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fedsim.text import seconds_text

PANEL = (
    "Accuracy: mean over a panel of clients, each with its own structure; their ratios need not average to the "
    "fleet's. Consensus: one model cut to the fleet-mean ratio, so that rows of one sparsity compare."
)
UNEVEN = 0.02
"""Ratios of devices this far apart are told."""
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
        speedup_of: ``time_to_target_s``; where nothing was evaluated (timing only) ``simulated_s``, or ``round_s``
            where the runs hold different numbers of rounds.
        fastest_class: device class of `idle_fastest_fraction`; None where no run has client records.
        clock: the sentence on the clock's workload that belongs under every table.
        labels: how far the numbers may be trusted.
        warnings: what makes the runs unequal.
        is_surrogate: whether accuracies come from a fitted model instead of training.
        baseline_is_default: whether the baseline was chosen by rule.
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
    baseline_is_default: bool = False

    def as_dict(self) -> dict[str, Any]:
        """JSON values only; a missing number is null."""
        return {
            "target_accuracy": self.target_accuracy,
            "target_is_default": self.target_is_default,
            "target_is_provisional": self.target_is_provisional,
            "time_to_target_is": TIME_TO_TARGET,
            "baseline": self.baseline,
            "baseline_is_default": self.baseline_is_default,
            "speedup_of": self.speedup_of,
            "fastest_class": self.fastest_class,
            "clock": self.clock,
            "labels": list(self.labels),
            "surrogate": self.is_surrogate,
            "warnings": list(self.warnings),
            "rows": _records(self.rows),
            "runs": _records(self.runs),
        }

    def speedup_of_text(self) -> str:
        """What is compared, such as "time to accuracy 0.9"."""
        if self.target_accuracy is not None:
            return f"time to accuracy {self.target_accuracy:.4g}"
        return "total simulated time" if self.speedup_of == "simulated_s" else "mean simulated time of a round"

    def speedup_title(self) -> str:
        """`speedup_of_text` for a figure: it says so where the target may still move."""
        return self.speedup_of_text() + (" (provisional)" if self.target_is_provisional else "")

    def as_text(self) -> str:
        """Aligned table with units in its header, rows by sparsity, and everything a reader must know below it."""
        return _text(self)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): _plain(value) for name, value in row.items()} for row in table.to_dict("records")]


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(comparison: Comparison) -> str:
    header, units, cells = _cells(comparison)
    widths = [max(len(line[column]) for line in (header, units, *cells)) for column in range(len(header))]

    def line(row: list[str]) -> str:
        return "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()

    title = ["SURROGATE: accuracies are a fitted model's, none was measured", ""] if comparison.is_surrogate else []
    lines = [*title, line(header), line(units), "-" * (sum(widths) + 2 * (len(widths) - 1))]
    previous = None
    for (_, row), cell in zip(comparison.rows.iterrows(), cells, strict=True):
        if row["sparsity_group"] != previous:
            previous = row["sparsity_group"]
            lines.append(_group_title(comparison, previous))
        lines.append(line(cell))
    return "\n".join([*lines, "", *_notes(comparison)])


def _group_title(comparison: Comparison, group: int) -> str:
    members = comparison.rows[comparison.rows["sparsity_group"] == group]["sparsity"]
    if group == 0:
        return "[unpruned: references, not rivals of the pruned]"
    low, high = f"{members.min():.2f}", f"{members.max():.2f}"
    return f"[fleet-mean sparsity {low if low == high else f'{low} to {high}'}]"


def _cells(comparison: Comparison) -> tuple[list[str], list[str], list[list[str]]]:
    rows = comparison.rows
    timed = comparison.target_accuracy is not None
    byte_unit, byte_scale = scale(rows["traffic_bytes"].max(), "B")
    joule_unit, joule_scale = scale(rows["energy_j"].max(), "J")
    header = ["method", "runs", "sparsity", "accuracy"]
    units = ["", "", "mean (devices)", "final, SURROGATE" if comparison.is_surrogate else "final"]
    uneven = devices_differ(rows)
    header += ["consensus"] if uneven else []
    units += ["final"] if uneven else []
    if comparison.target_accuracy is not None:
        header += [f"time to {comparison.target_accuracy:.4g}", "known to"]
        units += ["s, provisional" if comparison.target_is_provisional else "s", "s"]
    header += ["speedup", "total time", "idle"]
    units += ["[95%]", "s", "share"]
    if comparison.fastest_class is not None:
        header.append("idle, fastest")
        units.append("share")
    unequal, lossy = columns_in_need(rows)
    header += ["traffic", "energy", *(["rounds"] if unequal else []), *(["lost"] if lossy else [])]
    units += [byte_unit, joule_unit, *([""] if unequal else []), *(["updates"] if lossy else [])]
    cells = []
    for _, row in rows.iterrows():
        cell = [
            row["method"],
            str(row["runs"]),
            sparsity_text(row),
            number_text(row["accuracy_final"], ".3f") + _plus_minus(row["accuracy_final_sd"]),
            *([number_text(row["accuracy_consensus_final"], ".3f")] if uneven else []),
        ]
        if timed:
            cell += [time_text(row), _seconds(row["time_known_to_s"])]
        cell += [
            speedup_text(row, comparison.baseline),
            _seconds(row["simulated_s"]),
            number_text(row["idle_fraction"], ".1%"),
        ]
        if comparison.fastest_class is not None:
            cell.append(number_text(row["idle_fastest_fraction"], ".1%"))
        cell.append(number_text(row["traffic_bytes"] / byte_scale, ".2f"))
        cell.append(number_text(row["energy_j"] / joule_scale, ".2f"))
        cell += [f"{row['rounds']:g}"] if unequal else []
        cell += [number_text(row["lost_fraction"], ".1%")] if lossy else []
        cells.append(cell)
    return header, units, cells


def columns_in_need(rows: pd.DataFrame) -> tuple[bool, bool]:
    """Whether the rows differ in their numbers of rounds, and whether updates were lost in any."""
    return rows["rounds"].nunique() > 1, bool((rows["lost_fraction"] > 0).any())


def devices_differ(rows: pd.DataFrame) -> bool:
    """Whether devices of a row were tested at unlike ratios, so that a panel's mean is not at the fleet's ratio."""
    spread = rows["sparsity_high"] - rows["sparsity_low"]
    return bool(((spread > UNEVEN) & rows["accuracy_consensus_final"].notna()).any())


def target_text(comparison: Comparison) -> list[str]:
    """What the target is, how firm it is, and how exactly times to it are known; a line for each."""
    target = comparison.target_accuracy
    if target is None:
        return [f"No accuracy was evaluated: speedups are of the {comparison.speedup_of_text()}."]
    lines = [f"Target accuracy {target:g}, as asked."]
    if comparison.target_is_default:
        lines = [
            f"Target accuracy {target:.4f}: the highest that every run reaches (--target-accuracy sets another).",
        ]
    if comparison.target_is_provisional:
        lines.append(
            "PROVISIONAL: runs are missing or unfinished; this target, and times and speedups with it, may move when "
            "they finish (--target-accuracy fixes it)."
        )
    return [
        *lines,
        f"Time to target: of the first evaluation at or above it; evaluations are {_every_text(comparison)}. Known to: "
        "simulated seconds since the evaluation before, in which the crossing lies.",
    ]


def _notes(comparison: Comparison) -> list[str]:
    lines = target_text(comparison)
    lines += reached_text(comparison)
    chosen = " (by default; --baseline sets another)" if comparison.baseline_is_default else ""
    lines.append(
        f"Speedup over {comparison.baseline}{chosen}, paired by seed, geometric mean; 95% bootstrap interval over "
        "seeds; fewer than three pairs have no interval, and of fewer than six it is little more than their range."
    )
    lines += [PANEL] if devices_differ(comparison.rows) else []
    lines.append("Idle: mean over rounds of idle seconds over client seconds.")
    if comparison.fastest_class is not None:
        lines.append(
            f"Fastest class: {comparison.fastest_class} (least compute time in the runs of {comparison.baseline})."
        )
    lines += [f"Warning: {warning}." for warning in comparison.warnings]
    lines.append(comparison.clock)
    return lines


def _every_text(comparison: Comparison) -> str:
    """Such as "every 2 rounds", or "every 2 to 5 rounds"."""
    gaps = comparison.runs["evaluated_every_rounds"].dropna()
    low, high = f"{gaps.min():.0f}", f"{gaps.max():.0f}"
    if low == high:
        return "after every round" if low == "1" else f"every {low} rounds"
    return f"every {low} to {high} rounds"


def scale(largest: float, unit: str) -> tuple[str, float]:
    """A decimal unit in which the largest value is at least 1."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if largest >= scale:
            return f"{prefix}{unit}", scale
    return unit, 1.0


def number_text(value: float, form: str) -> str:
    """The number, or "-" where there is none."""
    return "-" if math.isnan(value) else format(value, form)


def _seconds(value: float) -> str:
    return "-" if math.isnan(value) else seconds_text(value)


def _plus_minus(deviation: float) -> str:
    return "" if math.isnan(deviation) else f" ± {deviation:.3f}"


def sparsity_text(row: Any) -> str:
    """Fleet mean of the achieved ratio, with its range over devices where it is pruned."""
    text = number_text(row["sparsity"], ".2f")
    if math.isnan(row["sparsity_low"]) or row["is_reference"]:
        return text
    return f"{text} ({row['sparsity_low']:.2f} to {row['sparsity_high']:.2f})"


def time_text(row: Any) -> str:
    """A row's time to the target and how many of its runs reached it, or that none did."""
    if row["reached"] == 0:
        return "not reached"
    partly = "" if row["reached"] == row["runs"] else f" ({row['reached']} of {row['runs']})"
    return f"{seconds_text(row['time_to_target_s'])}{partly}"


def speedup_text(row: Any, baseline: str) -> str:
    """A row's speedup with its interval, or that there is none; "-" without any pair."""
    if row["method"] == baseline:
        return "baseline"
    if math.isnan(row["speedup"]):
        return "-"
    text = f"{row['speedup']:.2f}x"
    if math.isnan(row["speedup_low"]):
        text += " [no interval]"
    else:
        text += f" [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"
    pairs, left_out = int(row["speedup_pairs"]), int(row["speedup_pairs_missed"]) + int(row["speedup_unpaired"])
    return f"{text} ({pairs} of {pairs + left_out})" if left_out else text


def reached_text(comparison: Comparison) -> list[str]:
    """Which methods missed the target, and how often; what that does to their times and speedups."""
    rows = comparison.rows
    if comparison.target_accuracy is None or (rows["reached"] == rows["runs"]).all():
        return []
    if not rows["reached"].any():
        best = rows["accuracy_best"].max()
        return [f"No run reached {comparison.target_accuracy:g}: the best mean over seeds is {best:.4f}."]
    missed = ", ".join(
        f"{row['method']} ({row['runs'] - row['reached']} of {row['runs']} runs)"
        for _, row in rows.iterrows()
        if row["reached"] < row["runs"]
    )
    return [f"Not reached by {missed}: times and speedups are over those that reached it; nothing is filled in."]
