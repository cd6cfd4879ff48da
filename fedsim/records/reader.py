"""Reading runs: finished ones from their joined files, unfinished ones from the parts closed so far."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fedsim.errors import RunError
from fedsim.places import user_path
from fedsim.records.columns import TABLES, schema_of
from fedsim.records.folder import CONFIG, MANIFEST, PARTS, SWEEP_LEDGER, read_manifest
from fedsim.records.integrity import list_part_digests, read_part_digests, verify
from fedsim.records.lost import LostUpdates, lost_updates
from fedsim.records.manifest import FileDigest, Manifest
from fedsim.records.writer import list_parts
from fedsim.text import seconds_text
from fedsim.yaml_text import YamlError, read_yaml

_AFRESH = "delete the folder and run it again; for a sweep's cell the same sweep command runs it again"


_OTHER = "restore it from a copy, or read it with the version that wrote it"


@dataclass(frozen=True, eq=False)
class Run:
    """A run on disk. Tables are read when first asked for, and compared with the digests taken when they were closed.

    See `fedsim.records.columns` for their columns: one that a run of another version lacks is null throughout, one that
    is not known here is left out.

    Attributes:
        path: the run directory.
        config: ``config.yaml``, resolved.
        manifest: ``manifest.json``.
    """

    path: Path
    config: dict[str, Any] = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.manifest.get("method", self.config.get("method", "?")))

    @property
    def seed(self) -> int:
        """Root seed."""
        return int(self.manifest.get("seed", self.config.get("seed", 0)))

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.manifest["status"] == "finished")

    @cached_property
    def stated(self) -> Manifest:
        """The manifest as a typed record."""
        return Manifest.of(self.manifest, Path(self.path) / MANIFEST)

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """One row per round."""
        return self._read("rounds")

    @cached_property
    def client_rounds(self) -> pd.DataFrame:
        """One row per round and dispatched client; RunError where ``records.client_rounds`` was false."""
        return self._read("client_rounds")

    @cached_property
    def events(self) -> pd.DataFrame:
        """One row per change of state; RunError where ``records.events`` was false."""
        return self._read("events")

    @property
    def is_surrogate(self) -> bool:
        """Whether losses and accuracies come from a fitted model instead of training."""
        return self.manifest.get("engine") == "surrogate"

    @property
    def is_timing_only(self) -> bool:
        """Whether nothing was trained, so that there are times and no accuracies (``train.engine: none``)."""
        return self.manifest.get("engine") == "none"

    @property
    def is_language_model(self) -> bool:
        """Whether responses were learned (``data.task: causal_lm``): accuracy and loss are then those of tokens."""
        return (self.config.get("data") or {}).get("task") == "causal_lm"

    @property
    def perplexity(self) -> pd.Series:
        """``exp(loss)`` by round, NaN between evaluations: of response tokens, so for language models alone.

        Raises:
            RunError: the run classified.
        """
        if not self.is_language_model:
            raise RunError(f"run '{self.path}' has no perplexity: its data.task is not causal_lm")
        return np.exp(self.rounds["loss"]).rename("perplexity")

    def has(self, table: str) -> bool:
        """Whether the run records the table (``rounds``, ``client_rounds``, ``events``)."""
        records = self.config.get("records") or {}
        return bool(table == "rounds" or records.get(table, True))

    def summary(self) -> str:
        """One line: method, seed, rounds, simulated seconds, last accuracy, path."""
        rounds = self.rounds
        facts = [f"{self.method} seed {self.seed}", f"{len(rounds)} rounds"]
        if len(rounds):
            facts.append(f"{seconds_text(rounds['end_s'].iloc[-1])} simulated s")
            facts.append(f"idle {rounds['idle_fraction'].mean():.1%}")
        tested = rounds["accuracy"].dropna()
        if len(tested):
            kind = "surrogate " if self.is_surrogate else "token " if self.is_language_model else ""
            facts.append(f"{kind}accuracy {tested.iloc[-1]:.3f}")
            if self.is_language_model:
                facts.append(f"perplexity {self.perplexity.dropna().iloc[-1]:.1f}")
        lost = int(rounds["dropped"].sum())
        if lost:
            counted = lost_updates(self) or LostUpdates(int(rounds["participants"].sum()), lost, {})
            facts.append(counted.text)
        if not self.finished:
            facts.append("unfinished")
        return f"{', '.join(facts)}: {self.path}"

    def outcome_counts(self) -> dict[str, int]:
        """Jobs by how they ended, in the order of the names; of records not read so far this column alone is read.

        Raises:
            RunError: the run does not record its clients, or records missing or damaged.
        """
        table = self.client_rounds if "client_rounds" in vars(self) else self._columns("client_rounds", ["outcome"])
        counts = table["outcome"].value_counts()
        return {str(name): int(counts[name]) for name in sorted(counts.index)}

    def _read(self, table: str) -> pd.DataFrame:
        return self._columns(table)

    def _columns(self, table: str, only: list[str] | None = None) -> pd.DataFrame:
        """A table from its files, or these columns `only`."""
        if not self.has(table):
            raise RunError(f"run '{self.path}' has no {table}: it ran with records.{table}: false")
        schema = schema_of(table) if only is None else pa.schema([schema_of(table).field(name) for name in only])
        joined = Path(self.path) / f"{table}.parquet"
        parts = [joined] if self.finished else self._closed_parts(table)
        try:
            for path in parts:
                self._verify(path)
            tables = [_read_columns(path, schema) for path in parts]
        except FileNotFoundError as error:
            raise RunError(
                f"records file '{error.filename or joined}' of run '{self.path}' is missing: {_AFRESH}"
            ) from None
        except (pa.ArrowException, OSError, ValueError) as error:
            why = next(iter(str(error).splitlines()), type(error).__name__)[:200]
            if not self.stated.is_of_this_version:
                raise RunError(
                    f"records '{table}' of run '{self.path}' cannot be read ({why}), {self.stated.origin}: {_OTHER}"
                ) from None
            raise RunError(f"records '{table}' of run '{self.path}' are damaged ({why}): {_AFRESH}") from None
        return (pa.concat_tables(tables) if tables else schema.empty_table()).to_pandas()

    def _verify(self, path: Path) -> None:
        """Compare a file with its digest, once."""
        if path in self._verified:
            return
        ours = self.stated.is_of_this_version
        cure, origin = (_AFRESH, "") if ours else (_OTHER, self.stated.origin)
        try:
            verify(path, self._digests.get(path.name), cure, origin)
        except RunError:
            if read_manifest(self.path) != self.manifest:
                raise RunError(f"run '{self.path}' was written anew since it was loaded: load it again") from None
            raise
        self._verified.add(path)

    @cached_property
    def _digests(self) -> Mapping[str, FileDigest]:
        """By name: of joined tables, or of the parts of an unfinished run."""
        return self.stated.files if self.finished else read_part_digests(self.path / PARTS, _AFRESH)

    @cached_property
    def _verified(self) -> set[Path]:
        return set()

    def _closed_parts(self, table: str) -> list[Path]:
        """Parts of rounds that every table has: a run stopped while closing a part holds only some of its tables."""
        parts = list_parts(self.path / PARTS)
        reached = {name: 0 for name in TABLES if self.has(name)}
        for _, name, _, end in parts:
            reached[name] = max(reached.get(name, 0), end)
        if self.stated.schema_version > 0:
            # Digests come last: parts without are still being closed, by a process at work or by one that was killed.
            reached["digests"] = max((end for _, end in list_part_digests(self.path / PARTS)), default=0)
        return [path for path, name, _, end in parts if name == table and end <= min(reached.values())]


def _read_columns(path: Path, schema: pa.Schema) -> pa.Table:
    """The columns of `schema`; those that the file lacks are null."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        held = file.read(columns=[name for name in schema.names if name in file.schema_arrow.names])
        rows = file.metadata.num_rows
    columns = [
        held[field.name].cast(field.type) if field.name in held.column_names else pa.nulls(rows, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def load(path: str | Path) -> Run:
    """Open a run directory, finished or not.

    Raises:
        RunError: no such directory, not a run (a sweep's folder is told apart), or a damaged manifest or configuration.
    """
    path = user_path(path)
    if not path.is_dir():
        raise RunError(f"no such run directory: '{path}'")
    if is_sweep_folder(path):
        raise RunError(f"'{path}' is a sweep's folder, not a run{_choice_of_cell(path)}")
    manifest = read_manifest(path)
    file = path / CONFIG
    try:
        config = read_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot read '{file}': {error.strerror or error}") from None
    except (YamlError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise RunError(f"'{file}' is damaged (not a YAML mapping)")
    return Run(path, config, manifest)


def find_runs(paths: Iterable[str | Path], damaged: list[str] | None = None) -> list[Run]:
    """All runs at or below the given folders, in the order given, then by path; each once.

    Of several folders (``SWEEP/*``) those of a sweep that hold no runs, such as its figures, are passed over.

    Args:
        damaged: where it is given, a run that cannot be opened among others adds a sentence to it and is left out.
    Raises:
        RunError: no such directory, or no run below it.
    """
    found: dict[Path, Run] = {}
    given = [user_path(path) for path in paths]
    for path in given:
        if path.name == SWEEP_LEDGER and path.is_file():
            continue  # "SWEEP/*" names it beside the runs
        if not path.is_dir():
            raise RunError(f"no such run directory: '{path}'")
        below = list(_run_folders(path))
        if not below and is_sweep_folder(path):
            raise RunError(f"sweep '{path}' has no finished cell: none of its cells has begun")
        if not below and len(given) > 1 and is_sweep_folder(path.parent):
            continue
        if not below:
            raise RunError(f"no run in '{path}': neither it nor a folder below it has a {MANIFEST}")
        for folder in below:
            try:
                found.setdefault(folder.resolve(), load(folder))
            except RunError as error:
                if damaged is None or len(given) == len(below) == 1:
                    raise
                damaged.append(f"run '{folder}' is left out: {error}")
    if damaged and not found:
        raise RunError(damaged[0])
    return list(found.values())


def is_sweep_folder(path: Path) -> bool:
    """Whether a folder holds the ledger of a sweep, and is no run itself."""
    return (path / SWEEP_LEDGER).is_file() and not (path / MANIFEST).exists()


def _choice_of_cell(sweep: Path) -> str:
    """What to open in a sweep's place, with an example; or that there is nothing."""
    for folder in _run_folders(sweep):
        with suppress(RunError):
            if read_manifest(folder)["status"] == "finished":
                return f": choose one of its cells' folders, such as '{folder}', or open all with fedsim.load_sweep"
    return ", and has no finished cell yet"


def _run_folders(top: Path) -> Iterable[Path]:
    for folder, names, files in os.walk(top):
        if MANIFEST in files:
            names.clear()  # a run holds no other run
            yield Path(folder)
        names.sort()
