"""How a file gets to disk whole or not at all.

Every file is written under a temporary name in the same folder, forced to disk, and renamed: a reader sees the old file
or the new one, never a half of it.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedsim.errors import RunError

TEMPORARY_SUFFIX = ".tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing(path: Path, need_bytes: int | None = None) -> Iterator[None]:
    """Turn an `OSError` met while writing `path` into one sentence.

    Args:
        need_bytes: size of what was to be written, for the message.
    Raises:
        RunError: the disk is full, the folder cannot be written, or the system refused for another reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            need = "" if need_bytes is None else f" ({need_bytes:,} bytes were to be written)"
            raise RunError(
                f"cannot write '{path}': the disk is full{need}; "
                "free some space and try again (a run goes on with --resume)"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise RunError(
                f"cannot write '{path}': no permission to write there; give a folder that you may write to (--out)"
            ) from error
        raise RunError(f"cannot write '{path}': {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Force a folder's entries (names made or replaced in it) to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, need_bytes: int | None = None) -> Iterator[Path]:
    """Give a temporary path to write to; on success force it to disk and rename it to `path`.

    The temporary file is removed when anything fails.

    Raises:
        RunError: as `writing`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    with writing(path, need_bytes):
        try:
            yield temporary
            descriptor = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all.

    Raises:
        RunError: full disk or a folder that cannot be written.
    """
    with replacing(path, len(content)) as temporary, temporary.open("wb") as stream:
        stream.write(content)


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text."""
    atomic_write_bytes(path, text.encode("utf-8"))


def json_text(value: object) -> str:
    """JSON with sorted keys and a final newline; NaN and infinity are refused (they are not JSON)."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def atomic_write_json(path: Path, value: object) -> None:
    """`atomic_write_text` of `json_text`."""
    atomic_write_text(path, json_text(value))
