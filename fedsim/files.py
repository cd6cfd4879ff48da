"""How a file gets to disk whole or not at all.

Every file is written under a temporary name in the same folder, forced to disk, and renamed: a reader sees the old file
or the new one, never a half of it.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedsim.errors import RunError
from fedsim.places import temporary_name

TEMPORARY_SUFFIX = ".tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF, errno.EISDIR)
"""What systems say that cannot force a folder (CIFS), or anything, to disk; unlike EIO no sign of lost data."""
_said: set[str] = set()


def warn_once(sentence: str) -> None:
    """A warning on standard error, the same one once in a process."""
    if sentence not in _said:
        _said.add(sentence)
        print(f"fedsim: warning: {sentence}", file=sys.stderr, flush=True)


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
    """Force a folder's entries (names made or replaced in it) to disk, where the file system can."""
    flag = getattr(os, "O_DIRECTORY", None)
    if flag is None:
        return  # Windows opens no folders
    descriptor = os.open(folder, os.O_RDONLY | flag)
    try:
        force(descriptor)
    finally:
        os.close(descriptor)


def force(descriptor: int) -> None:
    """``fsync``; a file system that has none is warned of once, and what it holds may not outlast a power cut."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        warn_once(
            f"this file system cannot be told to write to disk at once ({error.strerror or error}): after a power cut "
            "the newest checkpoint may be missing"
        )


@contextmanager
def replacing(path: Path, need_bytes: int | None = None) -> Iterator[Path]:
    """Give a temporary path to write to; on success force it to disk and rename it to `path`.

    The temporary file is removed when anything fails.

    Raises:
        RunError: as `writing`.
    """
    temporary = temporary_name(path, TEMPORARY_SUFFIX)
    with writing(path, need_bytes):
        try:
            yield temporary
            descriptor = os.open(temporary, os.O_RDWR)
            try:
                force(descriptor)
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


def parse_json(text: str | bytes) -> Any:
    """``json.loads``; whatever is wrong, a nesting too deep for it included, is a ValueError.

    Raises:
        ValueError: not JSON, or a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_text(value: object) -> str:
    """JSON with sorted keys and a final newline; NaN and infinity are refused (they are not JSON)."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def atomic_write_json(path: Path, value: object) -> None:
    """`atomic_write_text` of `json_text`."""
    atomic_write_text(path, json_text(value))
