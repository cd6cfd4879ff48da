"""Locks on folders: one writer at a time, where the system and the file system can keep others out.

A lock is ``flock`` on a file in the folder, which the kernel releases when the process ends in whatever way, so that a
killed run never stays locked. Some file systems of clusters (Lustre or NFS mounted without it) and Windows have no
``flock``: there a warning is said once, and work goes on unlocked.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from fedsim.errors import RunError
from fedsim.files import warn_once, writing

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_UNABLE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EIO)


def acquire(file: Path, busy: str) -> int:
    """Lock `file`, made if needed, and return its descriptor for `release`.

    The file is never removed: a lock on a file that another process has unlinked would protect nothing.

    Args:
        busy: the sentence where another process holds the lock.
    Raises:
        RunError: another process holds it, or the file cannot be made.
    """
    with writing(file):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    if fcntl is None:
        _warn(file, "this system has no file locks")
        return descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNABLE and error.errno not in _BUSY:
            _warn(file, f"its file system cannot lock ({error.strerror or error})")
            return descriptor
        os.close(descriptor)
        if error.errno in _BUSY:
            raise RunError(busy) from None
        raise RunError(f"cannot lock '{file.parent}': {error.strerror or error}") from error
    return descriptor


def release(descriptor: int) -> None:
    """Give a lock back. By name, not by closing alone: a forked worker may still hold a copy of the descriptor."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _warn(file: Path, why: str) -> None:
    warn_once(
        f"'{file.parent}' is not locked: {why}; never start two processes with the same --out (a folder on a local "
        "disk can be locked)"
    )
