"""Rows of TSV, CSV and TXT tables: which sign parts the columns, and whether quotes are marks or text.

*Delimiter*: the suffix's own (tab for .tsv and .txt, comma for .csv) where the wanted columns are there with it, else
the first of tab, comma, semicolon and bar with which they are.

*Quoting* ``auto``: CSV is quoted as RFC 4180 says. A TSV is read as GLUE's files are written, where a quote is a sign
like any other, unless the whole file says otherwise: only with quotes as marks have its rows equal numbers of columns,
or its first line is quoted throughout; or every quoted field is whole and some hold doubled quotes, or all texts are
quoted. [ours]
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from fedsim.data.source import Column, Source

Rows = list[tuple[int, list[str]]]
_DELIMITERS = ("\t", ",", ";", "|")
_OWN = {".tsv": "\t", ".csv": ",", ".txt": "\t"}
_LARGEST_FIELD = 2**31 - 1
"""Characters; the library's own limit of 131,072 is less than a court's decision."""
_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?", re.IGNORECASE)


def delimited_rows(source: Source, columns: Mapping[str, Column]) -> Iterator[tuple[int, list[object]]]:
    """(line number, values in the order of `columns`) of every row that is not blank.

    Raises:
        DataError: ragged or unreadable rows, or a column that is not in the file.
    """
    text = source.text()
    delimiter = _delimiter(source, text, columns)
    quoted = _is_quoted(source, text, delimiter)
    rows = _rows(source, text, delimiter, quoted)
    first_line, first = rows[0]
    names = [name.strip() for name in first] if source.header else None
    positions = [_position(source, key, column, names, len(first)) for key, column in columns.items()]
    if quoted:
        _notice_swallowed(source, text, rows, delimiter, list(columns), positions)
    if not source.header:
        yield first_line, [first[position] for position in positions]
    for line, row in rows[1:]:
        if len(row) != len(first):
            hint = "" if quoted else "; if quotes hold delimiters or line breaks, set data.quoting: minimal"
            raise source.fault(
                f"{len(row)} columns where the first row has {len(first)}{hint if chr(34) in text else ''}", line
            )
        yield line, [row[position] for position in positions]


def _delimiter(source: Source, text: str, columns: Mapping[str, Column]) -> str:
    own = _OWN[source.kind]
    line = text.lstrip("\n\r").partition("\n")[0].rstrip("\r")
    for sign in (own, *(other for other in _DELIMITERS if other != own)):
        names = [name.strip().strip('"') for name in line.split(sign)]
        if len(names) > 1 and all(_is_there(column, names, source.header) for column in columns.values()):
            if sign != own:
                source.note(f"its columns are parted by {sign!r}, not by {own!r}")
            return sign
    return own


def _is_there(column: Column, names: Sequence[str], header: bool) -> bool:
    return 0 <= column < len(names) if isinstance(column, int) else header and column in names


def _is_quoted(source: Source, text: str, delimiter: str) -> bool:
    """Whether quotes are marks around fields."""
    if source.quoting != "auto":
        return source.quoting == "minimal"
    if '"' not in text:
        return False
    if source.kind == ".csv":
        return True
    bare = [line.rstrip("\r").split(delimiter) for line in text.split("\n") if line.strip("\r")]
    if len({len(row) for row in bare}) > 1 or all(_is_whole(field) for field in bare[0]):
        marked = _parsed(text, delimiter, quoted=True)
        return isinstance(marked, list) and len({len(row) for _, row in marked}) == 1
    marks = [field for row in bare for field in row if field.startswith('"')]
    if not marks or not all(_is_whole(field) for field in marks):
        return False
    if any('""' in field[1:-1] for field in marks):
        return True
    return all(field.startswith('"') or not field or _NUMBER.fullmatch(field) for row in bare for field in row)


def _is_whole(field: str) -> bool:
    """Whether a field is quoted from end to end, with quotes inside doubled."""
    return len(field) > 1 and field.endswith('"') and '"' not in field[1:-1].replace('""', "")


def _rows(source: Source, text: str, delimiter: str, quoted: bool) -> Rows:
    parsed = _parsed(text, delimiter, quoted)
    if isinstance(parsed, list):
        return parsed
    line, error = parsed
    hint = "; if quotes in it are plain text, set data.quoting: none" if quoted else ""
    raise source.fault(f"the row cannot be parsed ({error}){hint}", line)


def _parsed(text: str, delimiter: str, quoted: bool) -> Rows | tuple[int, csv.Error]:
    """Every row that is not blank, by the line it ends on; or where and why parsing ends."""
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    before = csv.field_size_limit(_LARGEST_FIELD)
    try:
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        return reader.line_num, error
    finally:
        csv.field_size_limit(before)


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
        raise source.no_column(key, column, names)
    return names.index(column)


def _notice_swallowed(
    source: Source, text: str, rows: Rows, delimiter: str, keys: list[str], positions: list[int]
) -> None:
    """Say where a quoted text holds lines that look like rows: whole ones, with a label that other rows have."""
    if "label" not in keys:
        return
    at, width = positions[keys.index("label")], len(rows[0][1])
    counts = Counter(row[at].strip() for _, row in rows[source.header :] if len(row) == width)
    taken, first = 0, 0
    for line, row in rows:
        for field in row:
            inner = field.split("\n")[1:-1] if "\n" in field else []
            looks = [part for part in inner if _looks_like_a_row(part, delimiter, width, at, counts)]
            if looks and not taken:
                first = line - sum(other.count("\n") for other in row)
            taken += len(looks)
    if taken:
        source.note(
            f"a quoted text that begins in line {first} holds lines that look like rows ({taken} such lines in all): "
            "if quotes are plain text in this file, set data.quoting: none"
        )


def _looks_like_a_row(line: str, delimiter: str, width: int, at: int, labels: Counter[str]) -> bool:
    fields = line.rstrip("\r").split(delimiter)
    return len(fields) == width and width > 1 and fields[at].strip() in labels
