"""The ledger of a sweep: ``sweep.json`` in its folder says what each cell is and how far it came.

It is replaced whole at each change of state, so that a sweep stopped in whatever way leaves a readable one. Where it
and a run directory disagree, the run directory is right: a finished run is finished.
"""

from __future__ import annotations

import sys
import uuid
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedsim.errors import RunError
from fedsim.files import TEMPORARY_SUFFIX, atomic_write_json, atomic_write_text, parse_json, writing
from fedsim.locks import acquire, release
from fedsim.records.folder import LOCK, MANIFEST, SWEEP_LEDGER, read_manifest
from fedsim.runner.identity import check_same, identity
from fedsim.settings import Config
from fedsim.sweeps.cell_jobs import Done
from fedsim.sweeps.cells import SweepPlan

LEDGER = SWEEP_LEDGER
ERROR = "error.txt"
"""In a cell's directory: the traceback of an error that nobody foresaw, until the cell starts again."""
PENDING, RUNNING, FINISHED, FAILED, INTERRUPTED = "pending", "running", "finished", "failed", "interrupted"
STATES = (PENDING, RUNNING, FINISHED, FAILED, INTERRUPTED)


class SweepLedger:
    """The ledger, held for writing by one process at a time; made by `open_ledger`.

    Attributes:
        path: the sweep's folder.
        identity: a name of its own, by which a process on another machine recognises the folder.
        cells: one record per cell, in the plan's order.
    """

    def __init__(self, path: Path, lock: int, name: str, identity: str, cells: list[dict[str, Any]]) -> None:
        self.path, self.identity, self.cells = path, identity, cells
        self._lock: int | None = lock
        self._name = name
        self._unwritten = False

    def count(self) -> dict[str, int]:
        """Cells by state, states without any left out."""
        counted = Counter(str(cell["state"]) for cell in self.cells)
        return {state: counted[state] for state in STATES if counted[state]}

    def due(self, rerun_failed: bool) -> list[int]:
        """Cells that remain to be run."""
        skipped = (FINISHED,) if rerun_failed else (FINISHED, FAILED)
        return [index for index, cell in enumerate(self.cells) if cell["state"] not in skipped]

    def begin(self, index: int) -> None:
        """A cell starts."""
        self.cells[index] |= {"state": RUNNING, "error": None}
        self.cells[index].pop("traceback", None)
        with suppress(OSError):  # a run would refuse to begin in a directory that holds this alone
            self._error_file(index).unlink(missing_ok=True)
        self.write()

    def end(self, done: Done) -> None:
        """A cell ended."""
        cell = self.cells[done.index]
        cell |= {"state": FAILED if done.error else FINISHED, "error": done.error}
        cell |= {"host_s": round(done.host_s, 3), "worker": done.worker, "summary": done.summary}
        if done.trace:
            cell["traceback"] = done.trace
            # Here and not in the cell's process: a node of a cluster may have sent back no directory at all.
            with suppress(OSError, RunError):  # a full disk: the ledger's own warning says so
                self._error_file(done.index).parent.mkdir(exist_ok=True)
                atomic_write_text(self._error_file(done.index), done.trace)
        self.write()

    def interrupt(self) -> None:
        """Whatever runs is stopped."""
        for cell in self.cells:
            if cell["state"] == RUNNING:
                cell["state"] = INTERRUPTED
        self.write()

    def write(self) -> None:
        """Replace the file. A disk without space must not stop cells that need none: said once, tried again later."""
        try:
            atomic_write_json(
                self.path / LEDGER,
                {"sweep": self._name, "id": self.identity, "counts": self.count(), "cells": self.cells},
            )
            self._unwritten = False
        except RunError as error:
            if not self._unwritten:
                print(f"fedsim: warning: {error}; the sweep goes on", file=sys.stderr, flush=True)
            self._unwritten = True

    def _error_file(self, index: int) -> Path:
        return self.path / str(self.cells[index]["directory"]) / ERROR

    def close(self) -> None:
        """Release the folder. Closing twice does nothing."""
        if self._lock is not None:
            release(self._lock)
            self._lock = None


def open_ledger(path: Path, plan: SweepPlan) -> SweepLedger:
    """Make or re-open the folder of a sweep, and lock it.

    Cells that an earlier sweep in the folder has and `plan` has not are refused: that is another sweep. The other way
    round (more seeds, more values) the sweep grows. A sweep of which no cell ever began is replaced.

    Raises:
        RunError: the folder holds another sweep or other files, is in use, or cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"sweep folder '{path}' is a file; give another folder (--out)")
    if not (path / LEDGER).exists():
        _refuse_foreign(path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    lock = _acquire(path)
    try:
        fresh: dict[str, Any] = {"cells": [], "id": uuid.uuid4().hex}
        old = read_ledger(path) if (path / LEDGER).exists() else fresh
        known = {str(cell["config_hash"]): cell for cell in old["cells"]}
        asked = {cell.config_hash for cell in plan.cells}
        lost = [cell for digest, cell in known.items() if digest not in asked]
        if lost and any(_has_begun(path, cell) for cell in known.values()):
            raise RunError(
                f"'{path}' holds another sweep: {len(lost)} of its {len(known)} cells are not among those asked for "
                f"(first: {lost[0]['label']}); give another --out, or the same grid and seeds, or more of them"
            )
        cells = []
        for cell in plan.cells:
            record = {"host_s": None, "error": None, "state": PENDING, **known.get(cell.config_hash, {})}
            record |= {
                "index": cell.index,
                "label": cell.label,
                "overrides": dict(cell.overrides),
                "method": cell.config.method,
                "seed": cell.config.seed,
                "config_hash": cell.config_hash,
                "directory": cell.directory,
            }
            record["state"] = _state(path / cell.directory, cell.config_hash, str(record["state"]))
            if record["state"] != PENDING:
                _check_same_inputs(path / cell.directory, cell.config)
            cells.append(record)
        ledger = SweepLedger(path, lock, plan.name, str(old["id"]), cells)
        with writing(path / LEDGER):  # here, unlike later, a folder that cannot be written ends it
            atomic_write_json(path / LEDGER, {"sweep": plan.name, "id": ledger.identity, "counts": {}, "cells": cells})
        return ledger
    except BaseException:
        release(lock)
        raise


def anything_due(path: Path, plan: SweepPlan, rerun_failed: bool) -> bool:
    """Whether a cell of `plan` remains to be run in this folder; nothing is made or locked."""
    if not (path / LEDGER).exists():
        return True
    states = {str(cell["config_hash"]): str(cell["state"]) for cell in read_ledger(path)["cells"]}
    settled = (FINISHED,) if rerun_failed else (FINISHED, FAILED)
    return any(
        _state(path / cell.directory, cell.config_hash, states.get(cell.config_hash, PENDING)) not in settled
        for cell in plan.cells
    )


def read_ledger(path: Path) -> dict[str, Any]:
    """``sweep.json`` of a sweep's folder.

    Raises:
        RunError: there is none, or it is damaged.
    """
    file = path / LEDGER
    try:
        ledger = parse_json(file.read_text(encoding="utf-8"))
        if not all(
            isinstance(cell[key], str) for cell in ledger["cells"] for key in ("config_hash", "directory", "state")
        ):
            raise ValueError
        str(ledger["id"])
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"'{path}' is not the folder of a sweep: it has no {LEDGER}") from None
    except OSError as error:
        raise RunError(f"cannot read '{file}': {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError):
        raise RunError(
            f"'{file}' is damaged: remove it, and the same command makes it again from the runs beside it"
        ) from None
    return dict(ledger)


def error_text(folder: Path, cell: Mapping[str, Any]) -> str:
    """The error of a cell that failed, with the file that holds its traceback where there is one."""
    file = folder / str(cell["directory"]) / ERROR
    return f"{cell['error']} (traceback: {file})" if cell.get("traceback") and file.is_file() else str(cell["error"])


def _has_begun(path: Path, cell: Mapping[str, Any]) -> bool:
    return cell["state"] != PENDING or (path / str(cell["directory"])).exists()


def _state(directory: Path, digest: str, recorded: str) -> str:
    """A cell's state before the sweep goes on: finished where its run is, and never running."""
    if (directory / MANIFEST).exists():
        try:
            manifest = read_manifest(directory)
        except RunError:
            return recorded if recorded == FAILED else INTERRUPTED  # the cell itself will say what is wrong
        if manifest["status"] == "finished" and manifest.get("config_hash") == digest:
            return FINISHED
        return FAILED if recorded == FAILED else INTERRUPTED
    return FAILED if recorded == FAILED else PENDING


def _check_same_inputs(directory: Path, config: Config) -> None:
    """Refuse to grow a sweep whose cells were made of other files than those that are there now.

    Raises:
        RunError: names what changed.
    """
    try:
        kept = read_manifest(directory).get("identity")
    except RunError:
        return  # the cell itself will say what is wrong
    check_same(f"cell '{directory}' of this sweep", kept, identity(config))


def _refuse_foreign(path: Path) -> None:
    """A folder without a ledger may hold runs of a sweep whose ledger was removed, and nothing else."""
    if not path.is_dir():
        return
    foreign = sorted(
        entry.name
        for entry in path.iterdir()
        if entry.name != LOCK and not entry.name.endswith(TEMPORARY_SUFFIX) and "-seed" not in entry.name
    )
    if foreign or (path / MANIFEST).exists():
        raise RunError(
            f"'{path}' is not empty and holds no {LEDGER} (first entry: '{foreign[0]}'): give another folder (--out)"
        )


def _acquire(path: Path) -> int:
    return acquire(path / LOCK, f"another sweep is at work in '{path}': wait for its end, or give another --out")
