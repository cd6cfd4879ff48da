"""Cells on this computer: several processes at a time, forked by a host (`fedsim.sweeps.fork_host`)."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Pipe
from typing import Protocol

from fedsim.errors import RunError
from fedsim.sweeps.cell_jobs import Done, Job, Setup
from fedsim.sweeps.fork_host import READY
from fedsim.sweeps.ledger import SweepLedger

_CODE = "import sys; sys.path[:] = {path!r}; from fedsim.sweeps.fork_host import main; main({descriptor})"
# torch takes its number from train.threads; these keep other libraries from starting a thread per core and cell.
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_PATIENCE_S = 5.0


class Pool(Protocol):
    """Where cells run. `start` is allowed while `idle` is above 0."""

    def check(self) -> None:
        """See that its processes know what cells go by, before anything is written.

        Raises:
            RunError: a module of the user's cannot be imported, or does not bring what cells need.
        """

    def serve(self, ledger: SweepLedger) -> None:
        """The sweep's folder is open: get ready for its cells. Called once, before any cell."""

    @property
    def idle(self) -> int:
        """Cells that can be started now."""

    def start(self, job: Job) -> None:
        """Begin a cell."""

    def wait(self, patience_s: float) -> list[Done]:
        """Wait until something changed, or `patience_s` have passed; the cells that ended (perhaps none)."""

    def close(self) -> None:
        """Stop whatever still runs; a run stopped so goes on later from its last checkpoint."""


class CellHost:
    """The host process and the connection to it."""

    def __init__(self, setup: Setup) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            code = _CODE.format(path=list(setup.sys_path), descriptor=theirs.fileno())
            environment = {**dict.fromkeys(_ONE_THREAD, "1"), **os.environ}
            self._process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=environment
            )
        self._ready = False
        self._connection.send(setup)

    def check(self) -> None:
        """Wait until the host is ready; one that dies without a word shows at the next `receive`.

        Raises:
            RunError: a module of the user's cannot be imported, or does not bring what cells need.
        """
        with suppress(EOFError):
            while not self._ready:
                self.receive()

    def start(self, job: Job) -> None:
        """Begin a cell; it waits until the host is ready.

        Raises:
            OSError: the host is gone.
        """
        self._connection.send(job)

    def receive(self, patience_s: float | None = None) -> Done | None:
        """Wait for the next message: a cell that ended, or None (the host is ready, or `patience_s` have passed).

        Raises:
            RunError: a module of the user's cannot be imported, or does not bring what cells need.
            EOFError: the host is gone, and the cells with it.
        """
        try:
            if not self._connection.poll(patience_s):
                return None
            message = self._connection.recv()
        except OSError as error:
            raise EOFError from error
        if isinstance(message, Done):
            return message
        if message != READY:
            raise RunError(str(message))
        self._ready = True
        return None

    def close(self) -> None:
        """End the host and its cells."""
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            if self._ready:  # else it is still importing, and has no cell to stop
                self._process.wait(_PATIENCE_S)
        self._process.kill()
        self._process.wait()


class LocalPool:
    """At most `workers` cells at a time on this computer."""

    def __init__(self, setup: Setup, workers: int) -> None:
        self._setup, self._workers = setup, workers
        self._host = CellHost(setup)
        self._running: set[int] = set()
        self._deaths_in_a_row = 0

    def check(self) -> None:
        """Wait for the host."""
        self._host.check()

    def serve(self, ledger: SweepLedger) -> None:
        """Nothing to do: a job says all that the host needs."""

    @property
    def idle(self) -> int:
        """Workers without a cell."""
        return self._workers - len(self._running)

    def start(self, job: Job) -> None:
        """Begin a cell."""
        self._running.add(job.index)
        with suppress(OSError):  # a host that is gone shows at the next wait
            self._host.start(job)

    def wait(self, patience_s: float) -> list[Done]:
        """Wait for the next cell that ends. Where the host died, its cells have failed and a new one takes over.

        Raises:
            RunError: a host cannot start at all.
        """
        try:
            done = self._host.receive(patience_s)
        except EOFError:
            return self._lost()
        if done is None:
            return []
        self._deaths_in_a_row = 0
        self._running.discard(done.index)
        return [done]

    def _lost(self) -> list[Done]:
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > 2:
            raise RunError("the process that starts cells ends at once, again and again; its last words stand above")
        lost = [Done(index, "the process that started it was killed") for index in sorted(self._running)]
        self._running.clear()
        self._host.close()
        self._host = CellHost(self._setup)
        return lost

    def close(self) -> None:
        """Stop the host and its cells."""
        self._host.close()


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
