"""What passes between a sweep and the processes that run its cells, and what one of them does."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.errors import FedsimError


@dataclass(frozen=True)
class Setup:
    """What a process loads before it starts cells.

    Attributes:
        trains: whether any cell trains, so that torch is worth loading once for all.
        imports: modules, or paths of Python files, that register the user's own methods, policies and so on.
        sys_path: where modules are looked for.
        names: the user's own methods, policies and so on that cells go by: pairs of configuration key and name.
    """

    trains: bool
    imports: tuple[str, ...]
    sys_path: tuple[str, ...]
    names: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Job:
    """One cell to run: its place in the sweep, resolved configuration and run directory."""

    index: int
    config: Mapping[str, Any]
    path: str


@dataclass(frozen=True)
class Done:
    """How a cell ended.

    Attributes:
        error: one sentence, or None where it finished.
        trace: the traceback of an error that nobody foresaw.
        summary: one line on a finished run.
        host_s: seconds of this computer, from the start of the cell's process to its end.
        worker: the node that ran it, where there are several.
    """

    index: int
    error: str | None = None
    trace: str | None = None
    summary: str | None = None
    host_s: float = 0.0
    worker: str | None = None


def run_cell(job: Job) -> Done:
    """Run one cell, from its last checkpoint where it has one. Whatever goes wrong is in the record returned."""
    began_s = time.perf_counter()
    error = trace = summary = None
    try:
        from fedsim.runner.run import run

        finished = run(job.config, out=Path(job.path), resume=True, quiet=True)
        summary = finished.summary().removesuffix(f": {finished.path}")
    except FedsimError as fault:
        error = str(fault)
    except MemoryError:
        error = "this computer has no memory left for the cell; use fewer workers"
    except BaseException as fault:
        error = f"{type(fault).__name__}: {' '.join(str(fault).split()) or 'no message'}"
        trace = traceback.format_exc()
    return Done(job.index, error, trace, summary, time.perf_counter() - began_s)
