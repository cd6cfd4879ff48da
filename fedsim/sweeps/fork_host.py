"""A process that loads the heavy libraries once and forks a fresh one for each cell.

A cell gets a process of its own, so that no state passes from one to the next and a crash takes nothing else along,
without paying seconds of imports each time. What forks has run no arithmetic: no thread pool has begun, no device is in
use. It ends, and its cells with it, when the sweep that started it closes the connection or dies.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from fedsim.errors import ConfigError, FedsimError
from fedsim.places import user_path
from fedsim.runner.identity import note_module
from fedsim.sweeps.cell_jobs import Done, Job, Setup, run_cell

READY = "ready"
_FOR_RUNS = ("fedsim.runner.run",)
# The last three are what loading a model would import: about 3 s for each cell otherwise.
_FOR_TRAINING = (
    "fedsim.learn.assemble",
    "transformers.modeling_utils",
    "transformers.models.bert.modeling_bert",
    "transformers.models.roberta.modeling_roberta",
)
_PR_SET_PDEATHSIG = 1
_importing: list[str] = []
"""What `import_user_modules` is at, the innermost last."""


def main(descriptor: int) -> None:
    """Serve the connection with this descriptor: a `Setup`, then `Job` after `Job`; `Done` goes back for each.

    The first answer is `READY`, or a sentence on what cannot be imported or is not known here.
    """
    # Ctrl-C reaches every process of the terminal; the sweep alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection: Connection = Connection(descriptor)
    setup: Setup = connection.recv()
    for name in (*_FOR_RUNS, *(_FOR_TRAINING if setup.trains else ())):
        with suppress(ImportError):  # the cell that needs it will say so
            importlib.import_module(name)
    try:
        import_user_modules(setup.imports)
        _check_own(setup)
    except FedsimError as error:
        connection.send(str(error))
        return
    with suppress(BrokenPipeError):  # the sweep ended meanwhile
        connection.send(READY)
        _serve(connection)


def import_user_modules(names: Sequence[str]) -> None:
    """Import modules, by name or by path of a file; each registers what it brings.

    A file that this process runs or has imported already, under whatever name, is left alone.

    Raises:
        ConfigError: one cannot be imported.
    """
    for name in names:
        if name.endswith(".py") and _is_loaded(Path(name)):
            continue
        _importing.append(name)
        try:
            if not name.endswith(".py"):
                importlib.import_module(name)
                note_module(name, name)
                continue
            module = f"fedsim_user_{Path(name).stem}"
            if module not in sys.modules:
                spec = importlib.util.spec_from_file_location(module, user_path(name))
                assert spec is not None  # a path that ends in .py always has a loader
                assert spec.loader is not None
                loaded = importlib.util.module_from_spec(spec)
                sys.modules[module] = loaded
                spec.loader.exec_module(loaded)
            note_module(name, module)
        except Exception as error:
            sys.modules.pop(f"fedsim_user_{Path(name).stem}", None)
            raise ConfigError(f"--import '{name}' cannot be imported ({type(error).__name__}: {error})") from error
        finally:
            _importing.pop()


def being_imported() -> str | None:
    """What `import_user_modules` is importing at this moment, if anything."""
    return _importing[-1] if _importing else None


def _is_loaded(path: Path) -> bool:
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    return path.resolve() in {Path(file).resolve() for file in files if file and file.endswith(path.name)}


def _check_own(setup: Setup) -> None:
    """Refuse cells that go by a name which this process does not know, though the one that planned them did.

    Raises:
        ConfigError: with the way out.
    """
    from fedsim.runner.names import CATALOGUES

    for key, name in setup.names:
        if name not in CATALOGUES[key]:
            raise ConfigError(
                f"{key} '{name}' is registered in the process that started the sweep, and not in those that run its "
                "cells: register it in a Python file or module, and name that with imports=['FILE.py'] "
                "(--import FILE.py on the command line)"
            )


def _serve(connection: Connection) -> None:
    running: dict[Connection, tuple[int, int, float]] = {}
    try:
        while True:
            for readable in wait([connection, *running]):
                assert isinstance(readable, Connection)
                if readable is connection:
                    job = connection.recv()
                    reader, pid = _fork(job, (connection, *running))
                    running[reader] = pid, job.index, time.perf_counter()
                    continue
                pid, index, began_s = running.pop(readable)
                done = _received(readable)
                _, status = os.waitpid(pid, 0)
                done = done or Done(index, _ending(os.waitstatus_to_exitcode(status)))
                connection.send(replace(done, host_s=time.perf_counter() - began_s))
    except (EOFError, OSError):
        for pid, _, _ in running.values():  # the sweep has gone
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _fork(job: Job, others: Sequence[Connection]) -> tuple[Connection, int]:
    """Start the cell's process; returns the end of the pipe on which its `Done` comes, and its id."""
    reader, writer = Pipe(duplex=False)
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        writer.close()
        return reader, pid
    code = 1
    try:
        for inherited in (reader, *others):  # held open here they would hide from the sweep that the host died
            inherited.close()
        _die_with(parent)
        writer.send(run_cell(job))
        code = 0
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _die_with(parent: int) -> None:
    """Ask the system to kill this process when its parent ends, where it can (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _received(reader: Connection) -> Done | None:
    """What the cell sent; None where it ended without a word."""
    try:
        done: Done = reader.recv()
        return done
    except (EOFError, OSError):
        return None
    finally:
        reader.close()


def _ending(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code} before the run did"
    name = signal.Signals(-code).name
    why = " (the system does so when memory runs out: use fewer workers)" if name == "SIGKILL" else ""
    return f"its process was killed by {name}{why}"
