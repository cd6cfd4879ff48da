"""Availability as a file: rows ``client,start_s,end_s`` of CSV or Parquet, each a stretch in which a client is there.

Clients may be numbers or names; the order in which they first appear is theirs. Each client's stretches ascend and do
not overlap.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.errors import ProfileError
from fedsim.fleet.presence import RecordedRhythm

_COLUMNS = ("client", "start_s", "end_s")


def read_availability(path: Path, repeat_s: float | None) -> RecordedRhythm:
    """The stretches of a file.

    Raises:
        ProfileError: the file cannot be read, a column is missing, or a row is not one stretch after the one before.
    """
    names, start_s, end_s = _columns(path)
    first_seen: dict[str, int] = {}
    row = np.array([first_seen.setdefault(name, len(first_seen)) for name in names], dtype=np.int64)
    if not len(row):
        raise ProfileError(f"availability file '{path}' has no rows: nobody would ever be there")
    _check(path, names, row, start_s, end_s, repeat_s)
    order = np.argsort(row, kind="stable")
    counts = np.bincount(row)
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return RecordedRhythm(first, start_s[order], end_s[order], repeat_s)


def _columns(path: Path) -> tuple[list[str], FloatArray, FloatArray]:
    import pyarrow as pa
    import pyarrow.csv as csv
    import pyarrow.parquet as parquet

    try:
        if path.suffix == ".parquet":
            table = parquet.read_table(path)
        elif path.suffix == ".csv":
            options = csv.ConvertOptions(column_types={"client": pa.string()})
            table = csv.read_csv(path, convert_options=options)
        else:
            raise ProfileError(f"availability file '{path}' must end in .csv or .parquet")
    except (OSError, pa.ArrowException) as error:
        raise ProfileError(f"availability file '{path}' cannot be read: {error}") from error
    for name in _COLUMNS:
        if name not in table.column_names:
            have = ", ".join(table.column_names)
            raise ProfileError(f"availability file '{path}' has no column '{name}' (it has: {have})")
    try:
        times = [table[name].cast(pa.float64()).to_numpy() for name in _COLUMNS[1:]]
    except (pa.ArrowException, ValueError) as error:
        raise ProfileError(f"availability file '{path}': start_s and end_s must be numbers: {error}") from error
    return [str(name) for name in table["client"].to_pylist()], times[0], times[1]


def _check(
    path: Path, names: list[str], row: IntArray, start_s: FloatArray, end_s: FloatArray, repeat_s: float | None
) -> None:
    def refuse(place: int, why: str) -> None:
        raise ProfileError(
            f"availability file '{path}', row {place + 1} (client {names[place]}, {start_s[place]:g} to "
            f"{end_s[place]:g} s): {why}"
        )

    bad = ~np.isfinite(start_s) | ~np.isfinite(end_s) | (start_s < 0)
    if bad.any():
        refuse(int(np.argmax(bad)), "times must be finite and at least 0")
    if (end_s <= start_s).any():
        refuse(int(np.argmax(end_s <= start_s)), "end_s must be after start_s")
    order = np.argsort(row, kind="stable")
    same = row[order][1:] == row[order][:-1]
    early = same & (start_s[order][1:] < end_s[order][:-1])
    if early.any():
        refuse(int(order[1:][int(np.argmax(early))]), "it begins before the client's stretch before it has ended")
    if repeat_s is not None:
        last = np.flatnonzero(end_s > repeat_s)
        if len(last):
            refuse(int(last[0]), f"it ends after repeat_s ({repeat_s:g} s), where the file begins anew")
