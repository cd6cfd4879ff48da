"""Rows of JSON lines, JSON documents and Parquet files: values are what the file holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fedsim.data.source import Column, Source
from fedsim.files import parse_json

Row = tuple[int, list[object]]


def json_lines(source: Source, columns: Mapping[str, Column]) -> Iterator[Row]:
    """(line number, values in the order of `columns`) of a file with one JSON object a line.

    Raises:
        DataError: a line that is no JSON object, or lacks a column.
    """
    # Not splitlines(): it would also cut at characters, such as U+2028, that JSON allows inside a string.
    for line, content in enumerate(source.text().split("\n"), start=1):
        if content.strip():
            yield line, _picked(source, _parsed(source, content, line), columns, line)


def json_document(source: Source, columns: Mapping[str, Column]) -> Iterator[Row]:
    """(row number, values) of a list of objects, of an object of lists, or of one JSON object a line.

    Raises:
        DataError: neither of these, or a row that lacks a column.
    """
    text = source.text()
    try:
        document = parse_json(text)
    except ValueError:
        if text.lstrip()[:1] != "{":
            _parsed(source, text, None)
        yield from json_lines(source, columns)
        return
    if isinstance(document, dict):
        lists = {key: value for key, value in document.items() if isinstance(value, list)}
        if all(column in lists for column in columns.values()):
            named = {str(column): lists[str(column)] for column in columns.values()}
            if len({len(values) for values in named.values()}) > 1:
                raise source.fault("its columns are lists of different lengths")
            document = [dict(zip(named, values, strict=True)) for values in zip(*named.values(), strict=True)]
        elif len(lists) == 1:  # such as {"version": ..., "data": [...]}
            document = next(iter(lists.values()))
        else:
            document = [document]
    if not isinstance(document, list):
        raise source.fault("not a list of JSON objects")
    for row, value in enumerate(document, start=1):
        yield row, _picked(source, value, columns, row)


def parquet_rows(source: Source, columns: Mapping[str, Column]) -> Iterator[Row]:
    """(row number, values) of a Parquet file; classes that the Hugging Face hub numbered get their names.

    Raises:
        DataError: the file is missing or damaged, or a column is not in it.
    """
    import pyarrow as pa  # a table of text needs none of it
    import pyarrow.parquet as pq

    if not source.path.is_file():
        raise source.fault("no such file")
    try:
        schema = pq.read_schema(source.path)
        for key, column in columns.items():
            if schema.names.count(column) != 1:
                raise source.no_column(key, column, list(schema.names))
        table = pq.read_table(source.path, columns=list(dict.fromkeys(map(str, columns.values()))))
    except (pa.ArrowException, OSError) as error:
        raise source.fault(f"not a whole Parquet file ({' '.join(str(error).split())[:200]})") from None
    values = {name: table.column(name).to_pylist() for name in table.column_names}
    classes = _classes(schema.metadata or {}, str(columns["label"])) if "label" in columns else None
    if classes:
        values[str(columns["label"])] = [
            classes[value] if isinstance(value, int) and 0 <= value < len(classes) else value
            for value in values[str(columns["label"])]
        ]
    if not table.num_rows:
        raise source.fault("the file is empty; at least one row is needed")
    for row, found in enumerate(zip(*(values[str(column)] for column in columns.values()), strict=True), start=1):
        yield row, list(found)


def _classes(metadata: Mapping[bytes, bytes], column: str) -> list[str] | None:
    try:
        names = parse_json(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _parsed(source: Source, content: str, line: int | None) -> Any:
    try:
        return parse_json(content)
    except json.JSONDecodeError as error:
        at = line if line is not None else error.lineno
        raise source.fault(f"not JSON ({error.msg})", at) from None
    except ValueError as error:
        raise source.fault(f"not JSON that can be read ({' '.join(str(error).split())[:80]})", line) from None


def _picked(source: Source, row: Any, columns: Mapping[str, Column], line: int) -> list[object]:
    if not isinstance(row, dict):
        raise source.fault("not a JSON object", line)
    for key, column in columns.items():
        if column not in row:
            raise source.no_column(key, column, list(map(str, row)), line)
    return [row[column] for column in columns.values()]
