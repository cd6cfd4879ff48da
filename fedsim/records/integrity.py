"""Digests of a run's files: taken when a file is closed, compared whenever one is read.

Joined tables, the last checkpoint and the adapter have theirs in the manifest of the finished run; parts have theirs in
``parts/digests-<first>-<next>.json``, written after the parts of the same rounds and before their checkpoint. Runs of
schema 0 have none, and are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedsim.errors import RunError
from fedsim.files import atomic_write_json
from fedsim.records.manifest import FileDigest

_MISSING = "it is missing"
_DIGESTS_NAME = re.compile(r"digests-(\d{6,})-(\d{6,})\.json")


def digest_of(path: Path) -> FileDigest:
    """Of a file as it lies on disk."""
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return FileDigest(sha256=sha256, bytes=stream.tell())


def digests_of(root: Path, folders: Iterable[str]) -> dict[str, FileDigest]:
    """Of all files in these folders of `root`, by path within `root`; a folder that is not there has none."""
    files = [file for name in folders for file in sorted((root / name).rglob("*")) if file.is_file()]
    return {file.relative_to(root).as_posix(): digest_of(file) for file in files}


def fault_of(path: Path, recorded: FileDigest) -> str | None:
    """What is wrong with a file: in a few words; None where it is as it was closed."""
    try:
        found = path.stat().st_size
        if found != recorded.bytes:
            return f"it has {found:,} bytes where {recorded.bytes:,} were written"
        return None if digest_of(path) == recorded else "its SHA-256 is not the recorded one"
    except FileNotFoundError:
        return _MISSING
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"


def verify(path: Path, recorded: FileDigest | None, cure: str, origin: str = "") -> None:
    """Compare a file with its digest; nothing to compare with where there is none.

    Args:
        cure: what to do, for the message.
        origin: who wrote it, where that is another version than this.
    Raises:
        RunError: it is not as it was closed.
    """
    fault = None if recorded is None else fault_of(path, recorded)
    if fault:
        what = "is missing" if fault == _MISSING else f"is {'not as it was closed' if origin else 'damaged'} ({fault})"
        raise RunError(f"records file '{path}' {what}{f', {origin}' if origin else ''}: {cure}")


def write_part_digests(folder: Path, first: int, after: int, digests: Mapping[str, FileDigest]) -> None:
    """Write the digests of the parts of rounds `first` to `after` - 1, by name."""
    tree = {name: digest.model_dump() for name, digest in digests.items()}
    atomic_write_json(folder / f"digests-{first:06d}-{after:06d}.json", tree)


def list_part_digests(folder: Path) -> list[tuple[Path, int]]:
    """Files of digests in a folder of parts, with the round after their last, by round."""
    if not folder.is_dir():
        return []
    found = [(entry, match) for entry in folder.iterdir() if (match := _DIGESTS_NAME.fullmatch(entry.name))]
    return sorted(((entry, int(match[2])) for entry, match in found), key=lambda pair: pair[1])


def read_part_digests(folder: Path, cure: str) -> dict[str, FileDigest]:
    """Digests of all parts in a folder, by name.

    Raises:
        RunError: a file of digests is damaged.
    """
    digests: dict[str, FileDigest] = {}
    for path, _ in list_part_digests(folder):
        try:
            tree: dict[str, Any] = json.loads(path.read_bytes())
            digests.update({name: FileDigest.model_validate(value) for name, value in tree.items()})
        except (OSError, ValueError, AttributeError):
            raise RunError(f"records file '{path}' is damaged (no digests of parts in it): {cure}") from None
    return digests
