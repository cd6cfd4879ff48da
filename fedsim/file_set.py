"""Files that a command writes where the user says: never over a file that fedsim did not make, and whole or not at all.

A set of files (figures with their tables) is written into a hidden folder beside them and moved into place once it is
whole. ``.fedsim-files.json`` then says which files are ours, by their hashes: one that somebody changed is theirs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedsim.errors import RunError
from fedsim.files import TEMPORARY_SUFFIX, atomic_write_json, parse_json, sync_folder, writing

INDEX = ".fedsim-files.json"
_HEAD_BYTES = 4096


@contextmanager
def publishing(out: Path) -> Iterator[Path]:
    """Give a folder to write a set of files to; afterwards they are in `out`, and those of the last set with it.

    Raises:
        RunError: a file of one of the names is there that fedsim did not make; or the folder cannot be written.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    staging = out / f".fedsim.{os.getpid()}{TEMPORARY_SUFFIX}"
    try:
        with writing(out):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
        yield staging
        _publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):  # nothing was written: a folder that is empty now was made here
            out.rmdir()


def _publish(staging: Path, out: Path) -> None:
    known = _index(out)
    fresh = {file.name: _digest(file) for file in sorted(staging.iterdir())}
    for name in fresh:
        target = out / name
        if (target.exists() or target.is_symlink()) and (target.is_dir() or _digest(target) not in known.get(name, ())):
            raise RunError(
                f"'{target}' is there and is no file of fedsim's, or was changed: nothing is overwritten; move it "
                "away, or give another --out"
            )
    # Old and new hashes first: wherever this is stopped, every file in place is known as ours.
    both = {name: sorted({*known.get(name, ()), *([fresh[name]] if name in fresh else ())}) for name in known | fresh}
    atomic_write_json(out / INDEX, both)
    with writing(out):
        for name in fresh:
            os.replace(staging / name, out / name)
        sync_folder(out)
    atomic_write_json(out / INDEX, {**known, **{name: [digest] for name, digest in fresh.items()}})


def _index(out: Path) -> dict[str, list[str]]:
    try:
        kept = parse_json((out / INDEX).read_text(encoding="utf-8"))
        return {str(name): [str(digest) for digest in digests] for name, digests in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_replaceable(path: Path, kinds: tuple[str, ...], mark: bytes, what: str) -> None:
    """Refuse an ``--out`` of a single file that would replace something else.

    Args:
        kinds: suffixes that such a file may have.
        mark: what the first 4,096 bytes of such a file hold.
        what: such a file in words, such as "report".
    Raises:
        RunError: another suffix, a folder, or a file that is there without the mark.
    """
    if path.is_dir():
        raise RunError(f"--out: '{path}' is a folder; give the name of a file, such as {path / ('out' + kinds[0])}")
    if path.suffix.lower() not in kinds:
        raise RunError(f"--out: '{path}' does not end in {' or '.join(kinds)}; give such a name for a {what}")
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"--out: '{path}' cannot be read ({error.strerror or error}), so it is not replaced") from None
    if mark not in head:
        raise RunError(
            f"--out: '{path}' is there and is no {what} that fedsim wrote: nothing is overwritten; move it away, or "
            "give another --out"
        )
