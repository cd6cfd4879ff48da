"""What a run was made of, by content: everything beside the configuration that decides its results.

The seed's draws aside, two runs of one configuration and one identity end alike. Weights and samples have hashes of
their own in the manifest, as they are known only once they are loaded.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path

from fedsim.errors import RunError
from fedsim.fleet.fleet_file import fleet_path, profile_paths, world_files
from fedsim.model_folder import deciding_files
from fedsim.places import user_path
from fedsim.settings import Config

_PACKAGE = Path(__file__).resolve().parent.parent
_MODULE = "imported module"
USER_MODULES: dict[str, Path] = {}
"""Files of what ``--import`` named, by that name; whoever imports them adds to it."""


def note_module(name: str, module: str) -> None:
    """Remember the file of an imported user's module."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file:
        USER_MODULES[Path(name).name] = Path(file)


def identity(config: Config) -> dict[str, str]:
    """SHA-256 by what it is of, in words. A file that is not there is left out: reading it will say so."""
    fleet = fleet_path(config.fleet.name)
    files = {f"fleet file '{fleet.name}'": fleet}
    files |= {f"device profile '{reference}'": path for reference, path in profile_paths(fleet).items()}
    files |= {f"fleet's file '{one.name}'": one for one in world_files(fleet)}
    if config.train.surrogate is not None:
        files["surrogate file"] = user_path(config.train.surrogate)
    trains = config.train.engine not in ("none", "surrogate")
    for key, path in (("data.path", config.data.path), ("data.test_path", config.data.test_path)):
        if trains and path is not None:
            files[f"{key} '{path}'"] = user_path(path)
    files |= {f"{_MODULE} '{name}'": path for name, path in USER_MODULES.items()}
    found = {what: digest for what, path in files.items() if (digest := _digest(path)) is not None}
    models = {config.model.name, config.cost.model} if trains else {config.cost.model or config.model.name}
    for model in sorted(name for name in models if name):
        found |= {f"model '{model}', {name}": digest for name, digest in deciding_files(model).items()}
    return {**found, "code of fedsim": code_digest()}


def fleet_texts(config: Config) -> dict[str, str]:
    """The fleet file and its device profiles themselves, for a run to be read when the files are gone."""
    fleet = fleet_path(config.fleet.name)
    return {path.name: path.read_text(encoding="utf-8") for path in (fleet, *profile_paths(fleet).values())}


def check_same(what: str, kept: object, now: Mapping[str, str]) -> None:
    """Refuse to go on with something else than a run began with.

    Args:
        what: the run or sweep, such as "run 'runs/x'".
        kept: ``identity`` of its manifest; anything else, as older versions left it, is passed over.
    Raises:
        RunError: names what changed.
    """
    if not isinstance(kept, Mapping):
        return
    # What is imported beside may differ: a module that is needed and missing is refused where its names are looked up.
    loose = {name for name in {*kept, *now} if name.startswith(_MODULE) and not (name in kept and name in now)}
    changed = sorted(name for name in {*kept, *now} - loose if kept.get(name) != now.get(name))
    if changed:
        told = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        raise RunError(
            f"{what} was started with another {told} (changed, or no longer the same file): restore it, or start "
            "afresh with --force or another --out"
        )


@functools.cache
def code_digest() -> str:
    """SHA-256 over the package's own source files, by name and content."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(f"{file.relative_to(_PACKAGE).as_posix()}\n".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _digest(path: Path) -> str | None:
    try:
        status = path.stat()
        return _hashed(path, status.st_mtime_ns, status.st_size)
    except OSError:
        return None


@functools.lru_cache(maxsize=256)
def _hashed(path: Path, changed_ns: int, size: int) -> str:
    """A sweep asks for the same files cell by cell."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
