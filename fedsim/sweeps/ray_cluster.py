"""Cells on a Ray cluster: one actor per core, each with a host of its own that forks a process per cell.

The actor only starts cells, by the same code as on one computer, so that the records are the same. A node that sees the
sweep's folder (a shared file system) writes the run directory in place, and an unfinished cell goes on from its last
checkpoint. Elsewhere the run directory travels with the job: whole, and only once the cell has ended. fedsim must be
installed on every node, in the same version; paths in a configuration must be right there too.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fedsim.errors import FedsimError, RunError
from fedsim.files import TEMPORARY_SUFFIX, writing
from fedsim.records.folder import LOCK, MANIFEST
from fedsim.sweeps.cell_jobs import Done, Job, Setup
from fedsim.sweeps.ledger import SweepLedger, read_ledger
from fedsim.sweeps.local import CellHost

LOCAL = "local"
_ONE_COMPUTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's switch between this computer's address in the network and its loopback (its default on Windows and macOS)."""
_KNOCK_S = 3.0
_PROBE_S = 15.0
_PATIENCE_S = 15.0
_PROBE = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"


class CellActor:
    """What runs on a node: a host, and the cells that it is sent one by one.

    Args:
        folder, identity: the sweep's folder and its name, by which a node knows whether it sees that folder.
        home: directory that relative paths start from; taken where the node has it.
    """

    def __init__(self, setup: Setup, folder: str, identity: str, home: str) -> None:
        with suppress(OSError):
            os.chdir(home)
        self._setup = replace(setup, sys_path=tuple(dict.fromkeys([*sys.path, *setup.sys_path])))
        self._folder, self._identity = Path(folder), identity
        self._host: CellHost | None = None

    def version(self) -> str:
        """Of fedsim, on this node; the host begins to load."""
        self._host = self._host or CellHost(self._setup)
        return _version()

    def run(self, job: Job, packed: bytes | None) -> tuple[Done, bytes | None]:
        """Run a cell.

        Args:
            packed: the run directory as the sweep has it, for a node that does not see it.
        Returns:
            How the cell ended, and its run directory where the sweep cannot see it.
        """
        if self._sees_folder():
            return self._run(job), None
        with tempfile.TemporaryDirectory(prefix="fedsim-") as scratch:
            path = Path(scratch) / Path(job.path).name
            if packed:
                unpack(packed, path)
            done = self._run(replace(job, path=str(path)))
            return done, pack(path)

    def _run(self, job: Job) -> Done:
        where = f"{socket.gethostname()} ({os.environ.get('RAY_NODE_ID', _node_id())[:8]})"
        try:
            self._host = self._host or CellHost(self._setup)
            self._host.start(job)
            while (done := self._host.receive()) is None:
                pass
        except FedsimError as error:
            self._drop_host()
            done = Done(job.index, str(error))
        except (EOFError, OSError):
            self._drop_host()
            done = Done(job.index, "the process that started it was killed")
        return replace(done, worker=where)

    def _drop_host(self) -> None:
        if self._host is not None:
            self._host.close()
        self._host = None

    def _sees_folder(self) -> bool:
        try:
            return bool(read_ledger(self._folder)["id"] == self._identity)
        except RunError:
            return False


class RayPool:
    """Cells on a Ray cluster; as many at a time as it has room for."""

    def __init__(self, setup: Setup, address: str, threads: int) -> None:
        """Connect; nothing is written.

        Args:
            address: ``local`` (a cluster of this computer's own), ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``.
            threads: cores that one cell uses.
        Raises:
            RunError: Ray is not installed, nothing answers at the address, or the cluster has too few cores.
        """
        self._ray = _connect(address)
        self._setup = setup
        self._arguments: tuple[Setup, str, str, str] | None = None
        resources = self._ray.cluster_resources()
        self._cores = int(resources.get("CPU", 0)) // threads
        if self._cores < 1:
            self._ray.shutdown()
            raise RunError(f"the Ray cluster at '{address}' has no {threads} free core(s) for a cell")
        # Without a share of a card Ray hides all cards from an actor; an equal share to each core, as on one computer.
        cards = float(resources.get("GPU", 0)) if setup.trains else 0.0
        self._options = {"num_cpus": threads, "num_gpus": min(1.0, cards / self._cores), "max_restarts": 0}
        self._coming: dict[Any, Any] = {}
        self._free: list[Any] = []
        self._running: dict[Any, tuple[Job, Any]] = {}

    def check(self) -> None:
        """Ask a process of this computer: nodes import the same files."""
        host = CellHost(replace(self._setup, trains=False))
        try:
            host.check()
        finally:
            host.close()

    def serve(self, ledger: SweepLedger) -> None:
        """Ask for actors that run this ledger's cells."""
        self._arguments = (self._setup, str(ledger.path.resolve()), ledger.identity, os.getcwd())
        for _ in range(min(self._cores, len(ledger.cells))):
            self._grow()

    @property
    def idle(self) -> int:
        """Actors that are up and without a cell."""
        return len(self._free)

    def start(self, job: Job) -> None:
        """Begin a cell."""
        actor = self._free.pop()
        path = Path(job.path)
        packed = pack(path) if (path / MANIFEST).exists() else None
        self._running[actor.run.remote(job, packed)] = job, actor

    def wait(self, patience_s: float) -> list[Done]:
        """Wait for a cell that ends or an actor that comes up; says so when the cluster has no room at all.

        Raises:
            RunError: the nodes have another version of fedsim, or none, or the cluster is gone.
        """
        pending = [*self._running, *self._coming]
        ready, _ = self._ray.wait(pending, num_returns=1, timeout=min(patience_s, _PATIENCE_S))
        if not ready and not self._running and not self._free:
            print("fedsim: waiting for a free core on the Ray cluster", file=sys.stderr, flush=True)
        return [done for one in ready if (done := self._reported(one)) is not None]

    def close(self) -> None:
        """Stop the actors (their cells with them) and leave the cluster."""
        actors = [*self._free, *self._coming.values(), *(actor for _, actor in self._running.values())]
        for actor in actors:
            with suppress(Exception):
                self._ray.kill(actor)
        self._ray.shutdown()

    def _grow(self) -> None:
        assert self._arguments is not None  # `serve` comes first
        actor = self._ray.remote(CellActor).options(**self._options).remote(*self._arguments)
        self._coming[actor.version.remote()] = actor

    def _reported(self, reference: Any) -> Done | None:
        if reference in self._coming:
            actor = self._coming.pop(reference)
            try:
                theirs = self._ray.get(reference)
            except Exception as error:
                raise RunError(f"a node of the Ray cluster cannot start cells: {_one_line(error)}") from error
            if theirs != _version():
                raise RunError(f"the nodes of the Ray cluster have fedsim {theirs}, this computer {_version()}")
            self._free.append(actor)
            return None
        job, actor = self._running.pop(reference)
        try:
            done, packed = self._ray.get(reference)
            if packed is not None:
                unpack(packed, Path(job.path))
        except RunError as error:
            self._free.append(actor)
            return Done(job.index, str(error))
        except Exception as error:  # the node or the actor died: a new one takes its place
            self._grow()
            return Done(job.index, f"its node failed: {_one_line(error)}")
        self._free.append(actor)
        finished: Done = done
        return finished


def pack(path: Path) -> bytes | None:
    """A run directory as one archive; None where there is none."""
    if not path.is_dir():
        return None
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for entry in sorted(path.iterdir()):
            if entry.name != LOCK and not entry.name.endswith(TEMPORARY_SUFFIX):
                archive.add(entry, entry.name)
    return buffer.getvalue()


def unpack(packed: bytes, path: Path) -> None:
    """Put a packed run directory in the place of `path`.

    Raises:
        RunError: the folder cannot be written.
    """
    fresh = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    with writing(path, len(packed)):
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
                archive.extractall(fresh, filter="data")
            if path.is_dir():
                shutil.rmtree(path)
            fresh.rename(path)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def _connect(address: str) -> Any:
    """The `ray` module, connected.

    Raises:
        RunError: not installed, or nothing usable answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == LOCAL:
        # Ray's servers then listen on loopback alone: they run what they are sent by whoever reaches them.
        os.environ.setdefault(_ONE_COMPUTER, "0")
    try:
        import ray
    except ImportError as error:
        raise RunError("--ray needs the package 'ray', which is not installed: pip install 'fedspine-sim[ray]'") from (
            error
        )
    try:
        if address == LOCAL:
            ray.init(address=LOCAL, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        else:
            _check_answers(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (Exception, SystemExit) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"--ray '{address}': cannot connect ({_one_line(error)})") from error
    return ray


def _check_answers(address: str) -> None:
    """Refuse an address where no Ray answers, in seconds: Ray itself tries for over a minute, then exits."""
    if address != "auto":
        try:
            parts = urlsplit(address if "//" in address else f"//{address}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or not port:
            raise RunError(f"--ray: address '{address}' is not allowed (auto, HOST:PORT or ray://HOST:PORT)")
        try:
            socket.create_connection((host, port), timeout=_KNOCK_S).close()
        except OSError as error:
            raise RunError(
                f"--ray: nothing answers at '{address}' ({error.strerror or error}); is the cluster up, and its "
                "address right?"
            ) from None
    probe = subprocess.Popen(
        [sys.executable, "-c", _PROBE, address], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, said = probe.communicate(timeout=_PROBE_S)
    except subprocess.TimeoutExpired:
        probe.kill()
        probe.communicate()
        raise RunError(
            f"--ray: what answers at '{address}' is no Ray cluster that can be joined (tried for {_PROBE_S:.0f} s)"
        ) from None
    if probe.returncode:
        last = (said.strip().splitlines() or ["no reason given"])[-1]
        raise RunError(f"--ray: cannot join a Ray cluster at '{address}' ({last})")


def _node_id() -> str:
    try:
        import ray

        return str(ray.get_runtime_context().get_node_id())
    except Exception:
        return "?"


def _version() -> str:
    return metadata.version("fedspine-sim")


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
