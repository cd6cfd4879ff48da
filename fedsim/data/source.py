"""One data file of the user's: how it is to be read, its errors by line, and what must be said of it."""

from __future__ import annotations

import dataclasses
import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedsim.errors import DataError, nearest

Column = str | int
Quoting = Literal["auto", "minimal", "none"]
TEXT_KINDS = (".tsv", ".csv", ".txt", ".jsonl", ".json")
_COLUMNS_SHOWN = 30


@dataclass(frozen=True)
class Source:
    """One file and how to read it.

    Attributes:
        field: the configuration key that named the file, for messages.
        header: whether the first line names the columns (TSV, CSV and TXT).
        quoting: ``minimal`` (a field may be written in double quotes), ``none`` (quotes are text), or ``auto``.
        notes: what the user must know of the file, one sentence each; reading adds to it.
    """

    field: str
    path: Path
    header: bool
    quoting: Quoting
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def kind(self) -> str:
        """Its suffix in small letters, that of the compression aside.

        Raises:
            DataError: a kind of file that is not read.
        """
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        packed = suffixes[-1:] == [".gz"] and len(suffixes) > 1
        kind = suffixes[-2] if packed else (suffixes or [""])[-1]
        if kind in TEXT_KINDS or (kind == ".parquet" and not packed):
            return kind
        raise self.fault(f"unknown kind of file (allowed: {', '.join(TEXT_KINDS)}, each also with .gz; .parquet)")

    def fault(self, what: str, line: int | None = None) -> DataError:
        """The error for this file: the key, the file, the line where there is one, and what is wrong."""
        unit = "row" if self.path.suffix.lower() == ".parquet" else "line"
        where = "" if line is None else f", {unit} {line}"
        return DataError(f"{self.field} '{self.path}'{where}: {what}")

    def note(self, what: str) -> None:
        """Add a sentence on this file, once."""
        sentence = f"{self.field} '{self.path}': {what}"
        if sentence not in self.notes:
            self.notes.append(sentence)

    def text(self) -> str:
        """The whole file.

        Raises:
            DataError: missing, unreadable, empty, damaged or not UTF-8.
        """
        try:
            data = self.path.read_bytes()
            if self.path.suffix.lower() == ".gz":
                data = gzip.decompress(data)
        except FileNotFoundError:
            raise self.fault("no such file") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise self.fault(f"not a whole gzip file ({error})") from None
        except OSError as error:
            raise self.fault(f"cannot be read ({error.strerror or error})") from None
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise self.fault(f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8", line) from None
        if not text.strip():
            raise self.fault("the file is empty; at least one row is needed")
        return text

    def no_column(self, key: str, column: Column, names: list[str], line: int | None = None) -> DataError:
        """The error where a column is not among `names`, or is there twice."""
        told = ", ".join(names[:_COLUMNS_SHOWN]) + (", ..." if len(names) > _COLUMNS_SHOWN else "")
        if column in names:
            places = [place for place, name in enumerate(names) if name == column]
            at = " and ".join(map(str, places))
            return self.fault(
                f"column data.{key} '{column}' is there {len(places)} times: give its place instead, {at} "
                f"(data.{key}={places[0]}; columns: {told})",
                line,
            )
        near = nearest(column, names) if isinstance(column, str) else ""
        return self.fault(f"column data.{key} '{column}' is not there{near} (columns: {told})", line)
