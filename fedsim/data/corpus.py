"""The labelled text of a run: built in, from files, or from the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim.data import hub
from fedsim.data.records import Corpus, LabelledText
from fedsim.data.synthetic import synthetic_corpus
from fedsim.data.tables import Column, Source, read_columns
from fedsim.errors import DataError
from fedsim.rng import Stream, generator
from fedsim.settings import DataSettings

__all__ = ["Corpus", "LabelledText", "load_corpus"]

Fault = Callable[[str, int], DataError]
_HELD_OUT_PARTS = 5
"""One row in this many is held out where there is no test file."""


@dataclass(frozen=True)
class _Rows:
    """Checked strings of one file or split; `lines` says where each row stands in it."""

    lines: list[int]
    texts: list[str]
    pairs: list[str] | None
    labels: list[str]
    fields: list[str] | None


def _columns(settings: DataSettings, text: Column) -> dict[str, Column]:
    asked = {"text": text, "pair": settings.pair, "label": settings.label, "field": settings.field}
    return {key: column for key, column in asked.items() if column is not None}


def _string(value: object, key: str, line: int, fault: Fault) -> str:
    if not isinstance(value, str) or not value.strip():
        shown = "empty" if isinstance(value, str) else repr(value)
        raise fault(f"data.{key} is {shown}, where text is needed", line)
    return value.strip()


def _name(value: object, key: str, line: int, fault: Fault) -> str:
    """A label or field value: a string that is not empty, or an integer."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        shown = "empty" if isinstance(value, str) else repr(value)
        raise fault(f"data.{key} is {shown}, where a string or an integer is needed", line)
    return value.strip()


def _collect(rows: Iterator[tuple[int, list[object]]], keys: Mapping[str, Column], fault: Fault) -> _Rows:
    found = _Rows([], [], [] if "pair" in keys else None, [], [] if "field" in keys else None)
    order = list(keys)
    for line, values in rows:
        row = dict(zip(order, values, strict=True))
        found.lines.append(line)
        found.texts.append(_string(row["text"], "text", line, fault))
        found.labels.append(_name(row["label"], "label", line, fault))
        if found.pairs is not None:
            found.pairs.append(_string(row["pair"], "pair", line, fault))
        if found.fields is not None:
            found.fields.append(_name(row["field"], "field", line, fault))
    return found


def _label_names(labels: list[str], where: str) -> tuple[str, ...]:
    """Distinct labels: integers in their order as numbers, else in the order of the alphabet."""
    distinct = set(labels)
    if len(distinct) < 2:
        raise DataError(f"{where}: data.label has {len(distinct)} distinct values, but at least 2 are needed")
    try:
        return tuple(sorted(distinct, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(distinct))


def _labelled(rows: _Rows, label_names: tuple[str, ...], fault: Fault) -> LabelledText:
    index = {name: position for position, name in enumerate(label_names)}
    for line, label in zip(rows.lines, rows.labels, strict=True):
        if label not in index:
            shown = ", ".join(label_names[:10]) + (", ..." if len(label_names) > 10 else "")
            raise fault(f"data.label '{label}' never occurs in the training data (labels there: {shown})", line)
    return LabelledText(
        texts=tuple(rows.texts),
        pairs=None if rows.pairs is None else tuple(rows.pairs),
        labels=np.array([index[label] for label in rows.labels], dtype=np.int64),
        fields=None if rows.fields is None else tuple(rows.fields),
    )


def _hold_out(labels: NDArray[np.int64], seed: int, where: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows (train, test), ascending: a seeded fifth of each label, so that no label is left out of training."""
    rng = generator(seed, Stream.TEST_SPLIT)
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        held[rng.permutation(rows)[: len(rows) // _HELD_OUT_PARTS]] = True
    if not held.any():
        raise DataError(
            f"{where}: {len(labels)} rows, fewer than {_HELD_OUT_PARTS} of each label, are too few "
            "to hold out a fifth; give data.test_path"
        )
    return np.flatnonzero(~held), np.flatnonzero(held)


def _capped(train: LabelledText, settings: DataSettings, seed: int) -> LabelledText:
    if settings.max_samples is None or settings.max_samples >= len(train):
        return train
    chosen = generator(seed, Stream.CORPUS).permutation(len(train))[: settings.max_samples]
    return train.take(np.sort(chosen))


def _assemble(train: LabelledText, test: LabelledText | None, names: tuple[str, ...], where: str, seed: int) -> Corpus:
    if test is None:
        train_rows, test_rows = _hold_out(train.labels, seed, where)
        train, test = train.take(train_rows), train.take(test_rows)
    return Corpus(train, test, names)


def _from_file(field: str, path: str, text: Column, settings: DataSettings) -> tuple[_Rows, Fault]:
    source = Source(field, Path(path).expanduser(), settings.header, settings.quoting)
    keys = _columns(settings, text)

    def fault(what: str, line: int) -> DataError:
        return source.fault(what, line)

    rows = _collect(read_columns(source, keys), keys, fault)
    if not rows.texts:
        raise source.fault("no rows below the header; at least one is needed")
    return rows, fault


def _file_corpus(settings: DataSettings, path: str, seed: int) -> Corpus:
    rows, fault = _from_file("data.path", path, settings.text, settings)
    where = f"data.path '{path}'"
    names = _label_names(rows.labels, where)
    test = None
    if settings.test_path is not None:
        text = settings.text if settings.test_text is None else settings.test_text
        test_rows, test_fault = _from_file("data.test_path", settings.test_path, text, settings)
        test = _labelled(test_rows, names, test_fault)
    return _assemble(_labelled(rows, names, fault), test, names, where, seed)


def _hub_corpus(settings: DataSettings, name: str, seed: int) -> Corpus:
    splits = hub.load_splits(name)

    def read(split: object, text: Column) -> tuple[_Rows, Fault]:
        def fault(what: str, line: int) -> DataError:
            return DataError(f"data.name '{name}', row {line}: {what}")

        keys = _columns(settings, text)
        return _collect(hub.rows_of(name, split, keys), keys, fault), fault

    rows, fault = read(splits["train"], settings.text)
    where = f"data.name '{name}'"
    names = _label_names(rows.labels, where)
    split, test = hub.test_split(splits, settings.label), None
    if split is not None:
        text = settings.text if settings.test_text is None else settings.test_text
        test_rows, test_fault = read(split, text)
        test = _labelled(test_rows, names, test_fault)
    return _assemble(_labelled(rows, names, fault), test, names, where, seed)


def load_corpus(settings: DataSettings, seed: int) -> Corpus:
    """The corpus that `settings` describes; a function of the arguments and of the files' content.

    ``data.path`` reads TSV, CSV or JSONL, plain or gzipped; ``data.name`` is ``synthetic`` (the default where neither
    is given) or a hub name. Without a test file (or a public test split) a seeded fifth of each label's rows
    is held out. ``max_samples`` keeps that many training rows, chosen by the seed, in their order in the file.

    Raises:
        DataError: one sentence that names the key, the file and line, and what is allowed.
    """
    if settings.task == "causal_lm":
        raise DataError("data.task 'causal_lm' is not built yet (allowed: classification)")
    if settings.name is not None and settings.path is not None:
        raise DataError(f"data.name '{settings.name}' and data.path '{settings.path}' are both given: keep one of them")
    if settings.test_path is not None and settings.path is None:
        raise DataError(f"data.test_path '{settings.test_path}' needs data.path beside it")
    if settings.path is not None:
        corpus = _file_corpus(settings, settings.path, seed)
    elif settings.name in (None, "synthetic"):
        return synthetic_corpus(settings, seed)
    else:
        corpus = _hub_corpus(settings, str(settings.name), seed)
    return Corpus(_capped(corpus.train, settings, seed), corpus.test, corpus.label_names)
