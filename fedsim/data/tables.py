"""Columns of text out of one TSV, CSV or JSONL file, plain or gzipped, with every fault named by file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedsim.errors import DataError, nearest

Column = str | int
_DELIMITERS = {".tsv": "\t", ".csv": ","}
_KINDS = (*_DELIMITERS, ".jsonl")


@dataclass(frozen=True)
class Source:
    """One file and how to read it.

    Attributes:
        field: the configuration key that named the file, for messages.
        header: whether the first line names the columns (TSV and CSV).
        quoting: ``minimal`` (a field may stand in double quotes) or ``none`` (quotes are text).
    """

    field: str
    path: Path
    header: bool
    quoting: Literal["minimal", "none"]

    def fault(self, what: str, line: int | None = None) -> DataError:
        """The error for this file: the key, the file, the line where there is one, and what is wrong."""
        where = "" if line is None else f", line {line}"
        return DataError(f"{self.field} '{self.path}'{where}: {what}")


def _kind(source: Source) -> str:
    suffixes = [suffix.lower() for suffix in source.path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes or [""])[-1]
    if kind not in _KINDS:
        raise source.fault(f"unknown kind of file (allowed: {', '.join(_KINDS)}, each also with .gz)")
    return kind


def _content(source: Source) -> str:
    """The whole file as text."""
    try:
        data = source.path.read_bytes()
        if source.path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
    except FileNotFoundError:
        raise source.fault("no such file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise source.fault(f"not a whole gzip file ({error})") from None
    except OSError as error:
        raise source.fault(f"cannot be read ({error.strerror or error})") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise source.fault(f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8", line) from None
    if not text.strip():
        raise source.fault("the file is empty; at least one row is needed")
    return text


def _delimited_rows(source: Source, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of every row that is not blank."""
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if source.quoting == "minimal" else csv.QUOTE_NONE,
        strict=True,
    )
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        hint = "; if quotes in it are plain text, set data.quoting: none" if source.quoting == "minimal" else ""
        raise source.fault(f"the row cannot be parsed ({error}){hint}", reader.line_num) from None


def _position(source: Source, key: str, column: Column, names: list[str] | None, width: int) -> int:
    """0-based position of a column."""
    if isinstance(column, int):
        if not 0 <= column < width:
            raise source.fault(f"data.{key} is {column}, but the file has columns 0 to {width - 1}")
        return column
    if names is None:
        raise source.fault(
            f"data.{key} is '{column}', but with data.header: false columns go by index, 0 to {width - 1}"
        )
    if names.count(column) != 1:
        problem = "is there more than once" if column in names else "is not there"
        raise source.fault(
            f"column data.{key} '{column}' {problem}{nearest(column, names)} (columns: {', '.join(names)})"
        )
    return names.index(column)


def _read_delimited(
    source: Source, delimiter: str, columns: Mapping[str, Column]
) -> Iterator[tuple[int, list[object]]]:
    rows = _delimited_rows(source, _content(source), delimiter)
    first_line, first = next(rows)
    names = [name.strip() for name in first] if source.header else None
    positions = [_position(source, key, column, names, len(first)) for key, column in columns.items()]
    if not source.header:
        yield first_line, [first[position] for position in positions]
    for line, row in rows:
        if len(row) != len(first):
            raise source.fault(f"{len(row)} columns where the first row has {len(first)}", line)
        yield line, [row[position] for position in positions]


def _read_jsonl(source: Source, columns: Mapping[str, Column]) -> Iterator[tuple[int, list[object]]]:
    # Not splitlines(): it would also cut at characters, such as U+2028, that JSON allows inside a string.
    for line, content in enumerate(_content(source).split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise source.fault(f"not JSON ({error.msg})", line) from None
        if not isinstance(row, dict):
            raise source.fault("not a JSON object", line)
        for key, column in columns.items():
            if column not in row:
                names = ", ".join(map(str, row))
                raise source.fault(f"column data.{key} '{column}' is not there (columns: {names})", line)
        yield line, [row[column] for column in columns.values()]


def read_columns(source: Source, columns: Mapping[str, Column]) -> Iterator[tuple[int, list[object]]]:
    """(line number, values in the order of `columns`) of every row.

    Values are strings, but for JSONL, where they are what the JSON holds.

    Args:
        columns: name or 0-based index of each column, by the configuration key (without ``data.``) that chose it.

    Raises:
        DataError: the file is missing, empty, damaged, not UTF-8 or ragged, or a column is not in it.
    """
    kind = _kind(source)
    if kind == ".jsonl":
        return _read_jsonl(source, columns)
    return _read_delimited(source, _DELIMITERS[kind], columns)
