"""The records of a run: from a round to rows, and the writer that puts them into Parquet.

Rows go to parts that are closed at checkpoints, so that a crash loses nothing closed, and whenever many rows wait, so
that memory does not grow with the rounds; at the end the parts are joined part by part. Equal rows give equal bytes: no
time stamps, and row groups of a fixed size wherever the parts were cut.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from fedsim.contracts.common import OUTCOME_LABELS, FloatArray, Labels, Outcome
from fedsim.contracts.flights import Arrivals, Learned
from fedsim.errors import RunError
from fedsim.files import replacing, sync_folder, writing
from fedsim.records.columns import TABLES, columns_by_code, schema_of
from fedsim.records.folder import PARTS
from fedsim.records.integrity import digest_of, list_part_digests, read_part_digests, verify, write_part_digests
from fedsim.records.manifest import FileDigest
from fedsim.records.own_columns import own_values
from fedsim.settings import RecordSettings
from fedsim.sim.accounting import client_seconds, idle_fraction

ROW_GROUP = 65_536
"""Rows of a row group in a joined file."""

PART_ROWS = 524_288
"""Waiting rows (of all tables) at which a part is closed without a checkpoint."""

PART_ROUNDS = 1000
"""Waiting rounds at which a part is closed without a checkpoint: a row that waits alone costs kilobytes."""


class EventBlock(Protocol):
    """The trace of one round, as the writer takes it."""

    def columns(self) -> Mapping[str, np.ndarray | Labels]:
        """Arrays of one length, by the names of `EVENTS`."""


def client_round_rows(arrivals: Arrivals, learned: Learned) -> pa.Table:
    """Rows of ``client_rounds``: one per flight that ended, in the order of the arrivals.

    Every phase is the difference of two timestamps; idle is one too, not what the others leave over.

    Raises:
        ValueError: a flight's timestamps run backwards.
    """
    _check_clocks(arrivals)
    flights = arrivals.flights
    return _table(
        "client_rounds",
        {
            "round": np.full(len(arrivals), arrivals.merge_index),
            "flight": flights.flight,
            "client": flights.clients,
            "version": flights.version,
            "staleness": arrivals.staleness,
            "dispatch_s": flights.dispatch_s,
            "device": arrivals.device,
            "mode": arrivals.mode,
            "ratio_before": flights.ratio_before,
            "prune_ratio": learned.ratio,
            "prune_ratio_target": flights.ratio_asked,
            "lora_rank": flights.rank,
            "local_steps": flights.steps,
            **client_seconds(arrivals),
            "bytes_down": arrivals.bytes_down,
            "bytes_up": arrivals.bytes_up,
            "energy_j": arrivals.energy_joules,
            "peak_memory_bytes": flights.work.peak_memory_bytes,
            "outcome": Labels(learned.outcome, np.array(OUTCOME_LABELS)),
            "loss_before": learned.loss_before,
            "loss_after": learned.loss_after,
            "lora_importance": learned.lora_importance,
            "reward_loss": learned.rewards.loss,
            "reward_progress": learned.rewards.progress,
            "reward_importance": learned.rewards.importance,
            "reward_time": learned.rewards.time,
            "reward": learned.rewards.reward,
            **own_values("client_rounds", arrivals, learned),
        },
    )


def round_row(arrivals: Arrivals, learned: Learned, host_s: float) -> pa.Table:
    """The one row of ``rounds``.

    Args:
        host_s: seconds this computer took for the round.
    Raises:
        ValueError: as `client_round_rows`.
    """
    _check_clocks(arrivals)
    duration_s = arrivals.end_s - arrivals.start_s
    participants = len(arrivals)
    values: dict[str, float | int | None] = {
        "round": arrivals.merge_index,
        "start_s": arrivals.start_s,
        "end_s": arrivals.end_s,
        "duration_s": duration_s,
        "idle_fraction": idle_fraction(arrivals) if participants * duration_s > 0 else None,
        "participants": participants,
        "dropped": int(np.count_nonzero(learned.outcome != Outcome.OK)),
        "bytes_down": float(np.sum(arrivals.bytes_down)),
        "bytes_up": float(np.sum(arrivals.bytes_up)),
        "energy_j": float(np.sum(arrivals.energy_joules)),
        "prune_ratio_mean": _mean(learned.ratio),
        "lora_rank_mean": _mean(arrivals.flights.rank),
        "accuracy": learned.accuracy,
        "loss": learned.loss,
        "accuracy_consensus": learned.accuracy_consensus,
        "host_s": host_s,
    }
    columns: dict[str, Sequence[Any]] = {name: [value] for name, value in values.items()}
    return _table("rounds", {**columns, **own_values("rounds", arrivals, learned)})


class RecordWriter:
    """Writes the records of one run.

    Rows wait in memory until `close_part`, or until there are `part_rows` of them. On a resumed run, parts that reach
    beyond the checkpoint are deleted: their rounds are played again.

    Args:
        directory: the run directory.
        records: which tables to write beside ``rounds``.
        next_round: the round that comes next (a checkpoint's), 0 for a new run.
        part_rows: see `PART_ROWS`.
    Raises:
        RunError: parts before `next_round` are missing, or the folder cannot be written.
    """

    def __init__(
        self, directory: Path, records: RecordSettings, next_round: int = 0, part_rows: int = PART_ROWS
    ) -> None:
        self._directory = directory
        self._parts = directory / PARTS
        wanted = {"rounds": True, "client_rounds": records.client_rounds, "events": records.events}
        self._tables = tuple(table for table in TABLES if wanted[table])
        self._next_round = next_round
        self._part_rows = part_rows
        self._waiting: dict[str, list[pa.Table]] = {table: [] for table in self._tables}
        self._waiting_rows = 0
        self._is_open = False
        with writing(self._parts):
            self._parts.mkdir(exist_ok=True)
            for path, _, _, end in list_parts(self._parts):
                if end > next_round:
                    path.unlink()
            for path, end in list_part_digests(self._parts):
                if end > next_round:
                    path.unlink()
            for leftover in self._parts.glob(".*.tmp"):
                leftover.unlink()
            sync_folder(self._parts)
        for table in self._tables:
            self._check_complete(table)
        self._is_open = True

    def append_round(self, arrivals: Arrivals, learned: Learned, block: EventBlock, host_s: float) -> None:
        """Take the rows of one round; written now only if many wait.

        Raises:
            ValueError: not the round that comes next, or as `client_round_rows`.
            RunError: as `close_part`.
        """
        expected = self._next_round + len(self._waiting["rounds"])
        if arrivals.merge_index != expected:
            raise ValueError(f"round {arrivals.merge_index} appended where round {expected} comes next")
        self._waiting["rounds"].append(round_row(arrivals, learned, host_s))
        if "client_rounds" in self._waiting:
            self._waiting["client_rounds"].append(client_round_rows(arrivals, learned))
        if "events" in self._waiting:
            self._waiting["events"].append(_table("events", block.columns()))
        self._waiting_rows += sum(len(tables[-1]) for tables in self._waiting.values())
        if self._waiting_rows >= self._part_rows or len(self._waiting["rounds"]) >= PART_ROUNDS:
            self.close_part(arrivals.merge_index + 1)

    def close_part(self, next_round: int) -> None:
        """Write the waiting rows as ``parts/<table>-<first>-<next_round>.parquet`` (the last round not included).

        Call it just before the checkpoint of the same round: killed in between, the parts are deleted at resume.

        Raises:
            ValueError: `next_round` is not the round that comes next.
            RunError: full disk, or a folder that cannot be written.
        """
        waiting = len(self._waiting["rounds"])
        if next_round != self._next_round + waiting:
            raise ValueError(f"part closed at round {next_round} where round {self._next_round + waiting} comes next")
        if not waiting:
            return
        digests = {}
        for table, rows in self._waiting.items():
            path = self._parts / f"{table}-{self._next_round:06d}-{next_round:06d}.parquet"
            part = pa.concat_tables(rows)
            with replacing(path, part.nbytes) as temporary:
                # Read once and deleted: what is quick to write and read, not what is smallest.
                pq.write_table(
                    part,
                    temporary,
                    compression="lz4",
                    row_group_size=ROW_GROUP,
                    use_dictionary=columns_by_code(table),
                    write_statistics=False,
                    write_page_checksum=True,
                )
                digests[path.name] = digest_of(temporary)
        write_part_digests(self._parts, self._next_round, next_round, digests)
        self._waiting = {table: [] for table in self._tables}
        self._waiting_rows = 0
        self._next_round = next_round

    def join(self) -> dict[str, FileDigest]:
        """Join the parts into ``<table>.parquet``, streaming; the parts stay until `remove_parts`.

        Returns:
            The digests of the joined files, by name.
        Raises:
            ValueError: rows are waiting that no part holds yet.
            RunError: a part is missing or damaged, full disk, or a folder that cannot be written.
        """
        if self._waiting["rounds"]:
            raise ValueError("close_part must come before join")
        digests = {}
        for table in self._tables:
            self._check_complete(table)
            paths = [path for path, name, _, _ in list_parts(self._parts) if name == table]
            with replacing(self._directory / f"{table}.parquet") as temporary:
                _join(paths, temporary, table)
                digests[f"{table}.parquet"] = digest_of(temporary)
        return digests

    def remove_parts(self) -> None:
        """Delete the parts, once they are joined and the manifest says so."""
        with writing(self._parts):
            shutil.rmtree(self._parts)

    def finish(self) -> dict[str, FileDigest]:
        """`join`, then `remove_parts`; returns the digests."""
        digests = self.join()
        self.remove_parts()
        return digests

    def _check_complete(self, table: str) -> None:
        reached = 0
        # Of what this process closed, page checksums are compared as it is joined: to hash it again takes time.
        digests = {} if self._is_open else read_part_digests(self._parts, _CURE)
        for path, name, start, end in list_parts(self._parts):
            if name != table:
                continue
            if start != reached:
                raise RunError(
                    f"records of rounds {reached} to {start - 1} are missing before '{path}': "
                    "start the run afresh with --force"
                )
            verify(path, digests.get(path.name), _CURE)
            _check_readable(path, end - start if table == "rounds" else None)
            reached = end
        if reached != self._next_round:
            raise RunError(
                f"records '{table}' of rounds {reached} to {self._next_round - 1} are missing in '{self._parts}': "
                "start the run afresh with --force"
            )


_CURE = "start afresh with --force"
_PART_NAME = re.compile(r"([a-z_]+)-(\d{6,})-(\d{6,})\.parquet")


def list_parts(folder: Path) -> list[tuple[Path, str, int, int]]:
    """Parts in `folder` as ``(path, table, first round, round after the last)``, by table and round."""
    if not folder.is_dir():
        return []
    matches = [(entry, match) for entry in folder.iterdir() if (match := _PART_NAME.fullmatch(entry.name))]
    found = [(entry, match[1], int(match[2]), int(match[3])) for entry, match in matches]
    return sorted(found, key=lambda part: part[1:])


def write_joined(directory: Path, table: str, rows: pa.Table) -> FileDigest:
    """Write a whole table as `RecordWriter.join` would; returns its digest.

    Raises:
        RunError: full disk, or a folder that cannot be written.
    """
    with replacing(directory / f"{table}.parquet") as temporary:
        pq.write_table(rows.cast(schema_of(table)), temporary, row_group_size=ROW_GROUP, **_joined_options(table))
        return digest_of(temporary)


def _joined_options(table: str) -> dict[str, Any]:
    return {"compression": "zstd", "use_dictionary": columns_by_code(table), "write_page_checksum": True}


def _damaged(path: Path, why: Exception) -> RunError:
    return RunError(f"records file '{path}' is missing or damaged ({why}): {_CURE}")


def _check_readable(path: Path, rows: int | None) -> None:
    """Refuse a part whose footer cannot be read, before more rounds are spent on a run that could not be joined.

    Args:
        rows: how many it must have, where its name tells.
    """
    try:
        found = pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None
    if rows is not None and found != rows:
        raise RunError(f"records file '{path}' has {found} rows where its name says {rows} rounds: {_CURE}")


def _join(paths: Sequence[Path], target: Path, table: str) -> None:
    """Stream parts into one file of row groups of `ROW_GROUP` rows, wherever the parts end."""
    schema = schema_of(table)
    waiting, count = [schema.empty_table()], 0
    with pq.ParquetWriter(target, schema, **_joined_options(table)) as writer:
        for path in paths:
            try:
                part = pq.ParquetFile(path, page_checksum_verification=True)
                for batch in part.iter_batches(batch_size=ROW_GROUP):
                    waiting.append(pa.Table.from_batches([batch]).cast(schema))
                    count += len(batch)
                    while count >= ROW_GROUP:
                        rows = pa.concat_tables(waiting)
                        writer.write_table(rows.slice(0, ROW_GROUP).combine_chunks(), row_group_size=ROW_GROUP)
                        waiting, count = [rows.slice(ROW_GROUP)], count - ROW_GROUP
            except (pa.ArrowException, OSError) as error:
                raise _damaged(path, error) from None
        if count:
            writer.write_table(pa.concat_tables(waiting).combine_chunks(), row_group_size=ROW_GROUP)


def _table(name: str, values: Mapping[str, ArrayLike | Labels | Sequence[Any]]) -> pa.Table:
    """Arrays as a table in the declared order; NaN becomes null. The numbers are copied: they wait to be written."""
    arrays = []
    for column in TABLES[name]:
        data = values[column.name]
        if isinstance(data, Labels):
            arrays.append(pa.array(data.names, pa.string()).take(pa.array(data.codes)))
        elif column.dtype == "string":
            arrays.append(pa.array(np.asarray(data), pa.string()))
        elif column.dtype == "float64":
            numbers = np.array(data, dtype=np.float64)  # None becomes NaN
            arrays.append(pa.array(numbers, pa.float64(), from_pandas=True))
        else:
            arrays.append(pa.array(np.array(data, dtype=np.int64), pa.int64()))
    return pa.Table.from_arrays(arrays, schema=schema_of(name))


def _mean(values: NDArray[Any]) -> float | None:
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else None


def _check_clocks(arrivals: Arrivals) -> None:
    steps: list[FloatArray | float] = [
        arrivals.flights.dispatch_s,
        arrivals.download_start_s,
        arrivals.download_end_s,
        arrivals.compute_end_s,
        arrivals.upload_end_s,
        arrivals.released_s,
        arrivals.end_s,
    ]
    for before, after in pairwise(steps):
        ordered = np.asarray(after) >= np.asarray(before)  # False for NaN, too
        if not ordered.all():
            client = arrivals.clients[int(np.argmin(ordered))]
            raise ValueError(
                f"round {arrivals.merge_index}: timestamps of client {client} are missing or run backwards"
            )
