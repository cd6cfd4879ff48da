"""What a run says of itself: ``manifest.json`` as a typed record, with the version of the records' schema.

Keys that are not known here are kept: a newer version, or a tracker, may have more to say. Every key but the status may
be missing, as older versions wrote fewer.
"""

from __future__ import annotations

from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fedsim.errors import RunError

SCHEMA_VERSION = 1
"""Of the records. 0: no version was written; ``client_rounds`` had no flights and no terms of the reward, and files had
no digests."""

PACKAGE = "fedspine-sim"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class FileDigest(_Part):
    """A file as it was closed."""

    sha256: str
    bytes: int


class FinalRatio(_Part):
    """Achieved pruning ratios over the fleet after the final cut."""

    mean: float
    low: float
    high: float


class Manifest(_Part):
    """A run's manifest.

    Attributes:
        schema_version: of the records, see `SCHEMA_VERSION`.
        engine: how it trained; ``none`` for timing only.
        versions: of fedsim, Python and libraries, by name.
        profile_draw: number of the draw of device profiles; None: the profiles themselves.
        fleet, clock, model, data: what stands for these keys.
        rounds, trace_hash, simulated_s, final_prune_ratio, final_whole_model_sparsity: of finished runs.
        files: joined tables, last checkpoint and adapter of a finished run, by path within the run's folder.
    """

    status: Literal["running", "stopped", "finished"]
    schema_version: int = 0
    method: str | None = None
    seed: int | None = None
    config_hash: str | None = None
    engine: str | None = None
    labels: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    versions: dict[str, str | None] = {}
    host: dict[str, Any] = {}
    git: dict[str, Any] | None = None
    profile_draw: int | None = None
    fleet: dict[str, Any] | None = None
    clock: dict[str, Any] | None = None
    model: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    rounds: int | None = None
    trace_hash: str | None = None
    simulated_s: float | None = None
    host_s: float | None = None
    controller_host_s: float | None = None
    final_prune_ratio: FinalRatio | None = None
    final_whole_model_sparsity: float | None = None
    files: dict[str, FileDigest] = {}

    @classmethod
    def of(cls, tree: object, file: str | Path) -> Manifest:
        """Check what was read from `file`.

        Raises:
            RunError: it is no manifest, or a value is not of its kind.
        """
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "the whole"
            said = (
                "no status of running, stopped or finished"
                if key in ("status", "the whole")
                else f"'{key}': {first['msg'].lower()}"
            )
        raise RunError(f"'{file}' is damaged ({said}): restore it, or start afresh with --force")

    def tree(self) -> dict[str, Any]:
        """As JSON values: what was given, and nothing else."""
        return self.model_dump(mode="json", exclude_unset=True)

    @cached_property
    def is_of_this_version(self) -> bool:
        """Whether this version of fedsim wrote it, with this schema."""
        return self.schema_version == SCHEMA_VERSION and self.versions.get("fedsim") in (None, installed_version())

    @property
    def origin(self) -> str:
        """Such as "written by fedsim 0.0.9 (records' schema 0), read by fedsim 0.1.0 (schema 1)"."""
        wrote = self.versions.get("fedsim") or "of a version it does not say"
        return (
            f"written by fedsim {wrote} (records' schema {self.schema_version}), read by fedsim {installed_version()} "
            f"(schema {SCHEMA_VERSION})"
        )


def installed_version() -> str:
    """Version of the installed package."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return "(not installed)"
