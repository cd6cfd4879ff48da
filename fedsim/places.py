"""Paths as people write them: ``~`` is the home folder everywhere, and what no system can open is refused in words."""

from __future__ import annotations

import os
from pathlib import Path

from fedsim.errors import FedsimError, RunError

_NAME_BYTES = 255
"""The longest name of a file or folder on every file system in common use."""
_SPARE_BYTES = 40
"""What a temporary name adds to a file's own."""


def user_path(value: str | os.PathLike[str]) -> Path:
    """A path of the user's, with a leading ``~`` or ``~name`` written out.

    Raises:
        FedsimError: a home folder that is not known, or a name that no file system holds.
    """
    text = os.fspath(value)
    wide = os.path.expanduser(text)
    if text.startswith("~") and wide == text and not Path(text).exists():
        raise FedsimError(f"'{text}': there is no home folder of that name; write the folder out, or ./{text}")
    if "\0" in wide:
        raise FedsimError(f"path {text[:60]!r} holds a null character, which no file name can")
    for part in Path(wide).parts:
        size = len(os.fsencode(part))
        if size > _NAME_BYTES:
            raise FedsimError(f"the name '{part[:40]}...' is {size} bytes long (at most {_NAME_BYTES} is allowed)")
    return Path(wide)


def check_name(kind: str, name: str) -> None:
    """Refuse a name that becomes part of a file's name and would lead somewhere else.

    Raises:
        RunError: it is empty, a folder's separator or a control character is in it, or it begins with a dot.
    """
    if not name.strip() or name.startswith(".") or any(sign in "/\\" or not sign.isprintable() for sign in name):
        raise RunError(
            f"{kind} {name!r} is not allowed as a name: it must not be empty, begin with a dot or hold / or \\ "
            "(folders and files are named after it)"
        )
    if len(os.fsencode(name)) > _NAME_BYTES // 2:
        raise RunError(f"{kind} '{name[:40]}...' is too long for a name (at most {_NAME_BYTES // 2} bytes)")


def temporary_name(path: Path, suffix: str) -> Path:
    """A hidden name beside `path` for what is not whole yet; never too long where the path's own is not."""
    start = path.name[:50]
    while len(os.fsencode(start)) > _NAME_BYTES - _SPARE_BYTES - len(suffix):
        start = start[:-1]
    return path.with_name(f".{start}.{os.getpid()}{suffix}")
