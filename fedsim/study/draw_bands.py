"""What draws of devices and links leave of a comparison: each method's time with its band, and how often order held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedsim.contracts.common import FloatArray
from fedsim.cost.bands import band
from fedsim.records.reader import Run
from fedsim.study.profile_error import read_draws


def draw_bands(runs: Sequence[Run], target_accuracy: float | None = None) -> dict[str, Any] | None:
    """Bands of the runs' times over their draws; None where fewer than one has any.

    Seeds of one method are averaged within each draw. Methods are ordered by time to the target where one is given and
    reached by all, else by total time.

    Returns:
        ``draws``, ``by`` (what orders), ``order`` (methods, fastest first, as recorded), ``order_held`` (of the draws),
        ``rows`` (method -> ``total_s`` and ``time_to_target_s`` as [low, high], ``same_arms``).
    """
    found = [(run, draws) for run in runs if run.finished and (draws := read_draws(run)) is not None]
    if not found:
        return None
    count = min(len(draws.end_s) for _, draws in found)
    totals: dict[str, list[FloatArray]] = {}
    targets: dict[str, list[FloatArray | None]] = {}
    recorded: dict[str, list[float]] = {}
    same: dict[str, list[float]] = {}
    reached = {run.path: _crossing(run, target_accuracy) for run, _ in found}
    by_target = target_accuracy is not None and all(place is not None for place in reached.values())
    for run, draws in found:
        place = reached[run.path]
        totals.setdefault(run.method, []).append(draws.end_s[:count, -1])
        targets.setdefault(run.method, []).append(None if place is None else draws.end_s[:count, place])
        ends = run.rounds["end_s"].to_numpy()
        recorded.setdefault(run.method, []).append(float(ends[place if by_target and place is not None else -1]))
        same.setdefault(run.method, []).append(float(draws.same_arms[:count].mean()))
    chosen = {
        method: np.mean([one for one in (targets if by_target else totals)[method] if one is not None], axis=0)
        for method in totals
    }
    order = sorted(chosen, key=lambda method: float(np.mean(recorded[method])))
    table = np.stack([chosen[method] for method in order])
    held = int((np.diff(table, axis=0) >= 0).all(axis=0).sum()) if len(order) > 1 else count
    rows = {}
    for method in order:
        timed = [one for one in targets[method] if one is not None]
        rows[method] = {
            "total_s": list(band(np.mean(totals[method], axis=0))),
            "time_to_target_s": list(band(np.mean(timed, axis=0))) if timed else None,
            "same_arms": float(np.mean(same[method])),
        }
    by = "time to the target" if by_target else "total time"
    return {"draws": count, "by": by, "order": order, "order_held": held, "rows": rows}


def _crossing(run: Run, target: float | None) -> int | None:
    """Place of the first evaluation at or above the target."""
    if target is None:
        return None
    places = np.flatnonzero(run.rounds["accuracy"].to_numpy(dtype=float) >= target)
    return int(places[0]) if len(places) else None


def draw_text(bands: dict[str, Any]) -> str:
    """`draw_bands` in sentences."""
    lines = [f"Devices and links drawn from their bands, {bands['draws']} times (95%):"]
    for method, row in bands["rows"].items():
        low, high = row["total_s"]
        text = f"  {method}: total {low:.4g} to {high:.4g} simulated s"
        if row["time_to_target_s"] is not None:
            low, high = row["time_to_target_s"]
            text += f", to the target {low:.4g} to {high:.4g} s"
        if row["same_arms"] < 1.0:
            text += f" (policy played again, timing only; {100 * row['same_arms']:.0f}% of its arms are the run's)"
        lines.append(text)
    if len(bands["order"]) > 1:
        lines.append(
            f"  the order of methods by {bands['by']} held in {bands['order_held']} of {bands['draws']} draws: "
            f"{', '.join(bands['order'])}"
        )
    return "\n".join(lines)
