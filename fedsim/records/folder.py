"""The folder of one run: who may write in it, and how a file gets there whole or not at all.

A writer holds an exclusive lock (`fedsim.locks`). Every file is written under a temporary name in the same folder,
forced to disk, and renamed: a reader sees the old file or the new one, never a half of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from fedsim.errors import RunError
from fedsim.files import atomic_write_json, atomic_write_text, parse_json, writing
from fedsim.locks import acquire, release
from fedsim.places import user_path
from fedsim.records.manifest import Manifest
from fedsim.records.own_files import (
    CONFIG_MARK,
    is_config_of_run,
    is_leftover,
    refuse_foreign_run,
    remove_leftovers,
    remove_run,
)

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
PARTS = "parts"
CHECKPOINT = "checkpoint"
LOCK = ".lock"
SWEEP_LEDGER = "sweep.json"
"""In a folder of runs that a sweep made."""


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the run directory `path`.

    Raises:
        RunError: there is none, or it is damaged.
    """
    file = path / MANIFEST
    try:
        manifest = parse_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"'{path}' is not a run directory: it has no {MANIFEST}") from None
    except OSError as error:
        raise RunError(f"cannot read '{file}': {error.strerror or error}") from error
    except ValueError:
        raise RunError(f"'{file}' is damaged (not valid JSON): restore it, or start afresh with --force") from None
    Manifest.of(manifest, file)
    return dict(manifest)


class RunDirectory:
    """A run directory held for writing, as a context manager. Made by `create` or `open_for_resume`.

    Attributes:
        path: the folder.
        manifest: the manifest as last written or read; empty before the first.
    """

    def __init__(self, path: Path, lock: int, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self._lock: int | None = lock
        self._manifest = dict(manifest)

    @classmethod
    def create(cls, path: str | Path, force: bool) -> RunDirectory:
        """Make and lock the folder of a new run.

        Args:
            force: remove the run that is there. Only what a run writes is removed, never a foreign file.
        Raises:
            RunError: another process writes there, a run or foreign files are there and not `force`, or the folder
                cannot be written.
        """
        path = user_path(path)
        if path.exists() and not path.is_dir():
            raise RunError(f"run directory '{path}' is a file; give another folder (--out)")
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        lock = _acquire(path)
        try:
            if force:
                refuse_foreign_run(path)
                remove_run(path)
            else:
                _refuse_used(path)
                remove_leftovers(path)
        except BaseException:
            release(lock)
            raise
        return cls(path, lock, {})

    @classmethod
    def open_for_resume(cls, path: str | Path) -> RunDirectory:
        """Lock the folder of a run to go on with it. A finished run opens too: see ``manifest["status"]``.

        Raises:
            RunError: no run is there, it never began, it is damaged, or another process writes there.
        """
        path = user_path(path)
        if not path.is_dir():
            raise RunError(f"run directory '{path}' does not exist: nothing to resume; start it without --resume")
        if not (path / MANIFEST).exists():
            raise RunError(f"'{path}' has no {MANIFEST}: the run never began; start it without --resume")
        lock = _acquire(path)
        try:
            manifest = read_manifest(path)
            remove_leftovers(path)
        except BaseException:
            release(lock)
            raise
        return cls(path, lock, manifest)

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as last written or read (a copy)."""
        return dict(self._manifest)

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Replace ``manifest.json``."""
        self._check_held()
        atomic_write_json(self.path / MANIFEST, dict(manifest))
        self._manifest = dict(manifest)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of the run; ``config.yaml`` with the line by which it is known as ours."""
        self._check_held()
        atomic_write_text(self.path / name, CONFIG_MARK + text if name == CONFIG else text)

    def remove_folder(self, name: str) -> None:
        """Remove a folder of the run, if it is there."""
        self._check_held()
        folder = self.path / name
        if folder.is_dir():
            with writing(folder):
                shutil.rmtree(folder)

    def close(self) -> None:
        """Release the lock. Closing twice does nothing."""
        if self._lock is not None:
            release(self._lock)
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_held(self) -> None:
        if self._lock is None:
            raise ValueError(f"run directory '{self.path}' is closed")


def check_usable(path: Path, force: bool) -> None:
    """Raise what `RunDirectory.create` would, before slow work is done for nothing; nothing is made or changed."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError(f"run directory '{path}' is a file; give another folder (--out)")
    if (path / LOCK).exists():
        release(_acquire(path))
    if force:
        refuse_foreign_run(path)
    else:
        _refuse_used(path)


def _acquire(path: Path) -> int:
    return acquire(
        path / LOCK, f"run directory '{path}' is in use by another process: wait for its end, or give another --out"
    )


def _refuse_used(path: Path) -> None:
    """Raise unless the folder is empty, or holds only what a run leaves that was stopped before it began."""
    if (path / MANIFEST).exists():
        status = read_manifest(path)["status"]
        if status == "finished":
            raise RunError(
                f"run directory '{path}' holds a finished run: overwrite it with --force, or give another --out"
            )
        raise RunError(
            f"run directory '{path}' holds an unfinished run: go on with --resume, or overwrite it with --force"
        )
    foreign = sorted(
        entry.name
        for entry in path.iterdir()
        if entry.name != LOCK and not (entry.name == CONFIG and is_config_of_run(entry)) and not is_leftover(entry.name)
    )
    if foreign:
        raise RunError(
            f"run directory '{path}' is not empty and holds no {MANIFEST} (first entry: '{foreign[0]}'): "
            "give another folder (--out), or write into it with --force"
        )
