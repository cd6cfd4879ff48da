"""Warnings on a comparison whose numbers are right and mislead: they measure something else than a reader expects."""

from __future__ import annotations

import pandas as pd

MANY_LOST = 0.1
"""From this share of lost updates on a row is named."""
ABOVE_CHANCE = 0.05
"""A target less than this above guessing says nothing of learning."""
SHOWN = 3


def caveats(rows: pd.DataFrame, runs: pd.DataFrame, target: float | None, classes: int) -> list[str]:
    """Sentences without a full stop.

    Args:
        rows, runs: of the comparison.
        target: accuracy that times are taken to; None where nothing was evaluated.
        classes: labels to guess among; 0 where there are none.
    """
    return [*_lost(rows), *_unequal_rounds(rows), *_weak_target(runs, target, classes)]


def _lost(rows: pd.DataFrame) -> list[str]:
    many = rows[rows["lost_fraction"] >= MANY_LOST]
    if not len(many):
        return []
    named = [f"{row['method']} {row['lost_fraction']:.0%}" for _, row in many.iterrows()]
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    return [
        f"updates were lost (late, dropped, out of memory or not finite): {', '.join(named[:SHOWN])}{more}; "
        "their rounds are short because they did not wait, and their idle shares leave the lost work out"
    ]


def _unequal_rounds(rows: pd.DataFrame) -> list[str]:
    low, high = rows["rounds"].min(), rows["rounds"].max()
    if low == high:
        return []
    return [f"the rows hold {low:g} to {high:g} rounds: their total times, traffic and energy are not of equal work"]


def _weak_target(runs: pd.DataFrame, target: float | None, classes: int) -> list[str]:
    found = []
    if target is not None and classes > 1 and target < 1.0 / classes + ABOVE_CHANCE:
        found.append(
            f"the target {target:.4g} is hardly above guessing among {classes} labels: times to it say nothing of "
            "learning (--target-accuracy sets another)"
        )
    several = runs["method"].nunique() > 1 and runs["evaluations"].max() > 1
    if target is not None and several and bool(runs["reached_at_once"].all()):
        found.append(
            "every run is at the target at its first evaluation: times to it, and speedups, compare nothing but the "
            "times of first evaluations (--target-accuracy sets a higher one; evaluate.every_rounds a finer grid)"
        )
    return found
