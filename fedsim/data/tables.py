"""Columns of text out of one file, by its kind, with every fault named by file and line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedsim.data.delimited import delimited_rows
from fedsim.data.object_rows import json_document, json_lines, parquet_rows
from fedsim.data.source import Column, Source

__all__ = ["Column", "Source", "read_columns"]

_READERS = {".jsonl": json_lines, ".json": json_document, ".parquet": parquet_rows}


def read_columns(source: Source, columns: Mapping[str, Column]) -> Iterator[tuple[int, list[object]]]:
    """(line number, values in the order of `columns`) of every row.

    Values are strings, but for JSON and Parquet, where they are what the file holds.

    Args:
        columns: name or 0-based index of each column, by the configuration key (without ``data.``) that chose it.

    Raises:
        DataError: the file is missing, empty, damaged, not UTF-8 or ragged, or a column is not in it.
    """
    return _READERS.get(source.kind, delimited_rows)(source, columns)
