"""``docs/fidelity.md``: how far the cost model is from what others measured, a page made from the rows themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedsim.cost.describe import CHECKED_HEADER, checked_cells, summary_cells
from fedsim.cost.validate import Checked, Validation
from fedsim.files import atomic_write_bytes
from fedsim.plots.fidelity import draw_fidelity

_INTRODUCTION = """\
# How close the simulated clock is

Every measurement by others that the cost model can state, predicted beside measured. Made by
`fedsim validate --page docs/fidelity.md`; the rows are `device_profiles/measurements/*.csv`, each with source,
conditions and licence. *Fitted*: the model's numbers were made from this row, so that its error says little. *Unseen*:
they were not. *In band*: the measured number lies within the 95% band over the device's joint samples
(`fedsim.cost.bands`).
"""


def write_fidelity_page(result: Validation, path: Path) -> list[Path]:
    """Write the page and, beside it, its figure; returns the paths."""
    folder = path.parent / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw_fidelity(result, folder, path.stem)
    parts = [_INTRODUCTION]
    if drawn:
        parts.append(f"![predicted over measured](figures/{path.stem}.png)\n")
    header = ["rows", "n", "MAPE", "bias", "worst", "Spearman", "Kendall", "in band", "median half-width"]
    parts += ["## Summary\n", _table(header, [summary_cells(one) for one in result.summaries])]
    if result.silent:
        parts.append(
            f"No measurement describes: {', '.join(result.silent)}. Their numbers are data sheets and analogy.\n"
        )
    counted = [one for one in result.checked if one.row.counted]
    shown = [one for one in result.checked if not one.row.counted]
    for title, rows in (
        ("Unseen rows", [one for one in counted if not one.fitted]),
        ("Fitted rows", [one for one in counted if one.fitted]),
    ):
        if rows:
            parts += [f"## {title}\n", _table(CHECKED_HEADER, [checked_cells(one) for one in rows])]
    if shown:
        parts += ["## Shown and not counted\n", _context_table(shown)]
    sources = dict.fromkeys((one.row.source, one.row.licence) for one in result.checked if one.row.source)
    if sources:
        parts += ["## Sources\n", _table(["source", "licence"], [list(one) for one in sources])]
    atomic_write_bytes(path, "\n".join(parts).encode())
    return [path, *drawn]


def _context_table(rows: Sequence[Checked]) -> str:
    return _table([*CHECKED_HEADER, "why"], [[*checked_cells(one), one.row.conditions] for one in rows])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines) + "\n"
