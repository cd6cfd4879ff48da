"""Which files of a folder a run made, so that nothing else is ever removed or replaced, by ``--force`` neither.

A run's folder is known by its manifest; before that is written, by the first line of its ``config.yaml``. In the
folders of a run only files of the names that it gives are its own.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fedsim.errors import RunError
from fedsim.files import TEMPORARY_SUFFIX, parse_json, sync_folder, writing

CONFIG_MARK = "# The resolved configuration of this run, written by fedsim.\n"
"""First line of a run's ``config.yaml``."""

_TABLES = r"(rounds|client_rounds|events)"
_TOP = re.compile(rf"manifest\.json|config\.yaml|{_TABLES}\.parquet")
_INSIDE = {
    "parts": re.compile(r"[a-z_]+-\d+.*\.parquet|digests-\d+.*\.json"),
    "checkpoint": re.compile(r"round-\d{6,}|\.round-\d{6,}.*"),
    "adapter": re.compile(r"adapter_model\.safetensors|adapter_config\.json|head\.safetensors"),
    "tensorboard": re.compile(r"events\.out\.tfevents\..*"),
    "wandb": re.compile(r".*"),  # the library's own, in names that change with its versions
}
_LEFTOVER = re.compile(rf"\..+\.\d+{re.escape(TEMPORARY_SUFFIX)}|\.round-\d+.*{re.escape(TEMPORARY_SUFFIX)}")


def is_config_of_run(file: Path) -> bool:
    """Whether a ``config.yaml`` begins as those do that a run writes."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(CONFIG_MARK)) == CONFIG_MARK.encode()
    except OSError:
        return False


def is_leftover(name: str) -> bool:
    """Whether a name is that of a file or folder that was not whole yet when its process was killed."""
    return _LEFTOVER.fullmatch(name) is not None


def remove_leftovers(path: Path) -> None:
    """Remove what a killed process left half written, from a run directory that is locked."""
    with suppress(OSError):  # a file that stays does no harm
        for folder in (path, *(path / name for name in _INSIDE)):
            for entry in list(folder.iterdir()) if folder.is_dir() else ():
                if is_leftover(entry.name):
                    _remove(entry)


def refuse_foreign_run(path: Path) -> None:
    """Refuse to overwrite a folder's run where no run is, and files stand where a run's would.

    Raises:
        RunError: names the first of them.
    """
    if _is_run(path):
        return
    for name in sorted(entry.name for entry in path.iterdir()):
        if _TOP.fullmatch(name) or name in _INSIDE:
            raise RunError(
                f"'{path / name}' was not made by a run of fedsim, and one writes there: nothing is overwritten; "
                "give another folder (--out), or move it away"
            )


def remove_run(path: Path) -> None:
    """Remove a run's own files; the manifest first, so that what is left by a kill never looks like a run.

    Raises:
        RunError: a file cannot be removed.
    """
    with writing(path):
        for entry in sorted(path.iterdir(), key=lambda one: (one.name != "manifest.json", one.name)):
            if _TOP.fullmatch(entry.name) and not entry.is_dir():
                entry.unlink()
        for name in _INSIDE:
            for entry in _own(path / name):
                _remove(entry)
            with suppress(OSError):  # a file of somebody else's keeps the folder
                (path / name).rmdir()
        remove_leftovers(path)
        sync_folder(path)


def _own(folder: Path) -> Iterator[Path]:
    for entry in list(folder.iterdir()) if folder.is_dir() else ():
        if _INSIDE[folder.name].fullmatch(entry.name):
            yield entry


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)


def _is_run(path: Path) -> bool:
    """Whether a run is, or was about to be, in a folder; a damaged manifest counts with the run's own configuration."""
    if is_config_of_run(path / "config.yaml"):
        return True
    try:
        manifest = parse_json((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, json.JSONDecodeError):
        return False
    return isinstance(manifest, dict) and "status" in manifest and "config_hash" in manifest
