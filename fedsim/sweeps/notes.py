"""What the ledgers of sweeps say of cells that left no finished run: a comparison without them must not look whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fedsim.files import parse_json
from fedsim.places import user_path

LEDGER = "sweep.json"
MANIFEST = "manifest.json"
SHOWN = 3
"""Cells named one by one; the others are counted."""


def sweep_notes(paths: Iterable[str | Path]) -> list[str]:
    """One sentence for each folder that is a sweep with cells missing; nothing for any other folder.

    A sweep may be given by its ledger as well: ``SWEEP/*`` names it beside the runs.
    """
    notes = []
    folders = [path.parent if path.name == LEDGER and path.is_file() else path for path in map(user_path, paths)]
    for path in dict.fromkeys(folders):
        try:
            cells = parse_json((path / LEDGER).read_text(encoding="utf-8"))["cells"]
            missing = [cell for cell in cells if cell["state"] != "finished" or _is_gone(path, cell)]
            said = [_cell_text(path, cell) for cell in missing[:SHOWN]]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError):
            notes.append(f"'{path / LEDGER}' cannot be read: cells without a run are not known")
            continue
        if missing:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            notes.append(f"sweep '{path}' lacks {len(missing)} of {len(cells)} cells: {'; '.join(said)}{more}")
    return notes


def _is_gone(path: Path, cell: dict[str, object]) -> bool:
    """Whether the run directory was removed since the ledger was written."""
    return "directory" in cell and not (path / str(cell["directory"]) / MANIFEST).is_file()


def _cell_text(path: Path, cell: dict[str, object]) -> str:
    if cell["state"] == "finished":
        return f"{cell.get('label') or cell['directory']} (its directory is gone: '{path / str(cell['directory'])}')"
    error = f", {str(cell['error']).splitlines()[0]}" if cell.get("error") else ""
    return f"{cell.get('label') or cell.get('directory') or '?'} ({cell['state']}{error})"
