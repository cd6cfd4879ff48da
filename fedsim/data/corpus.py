"""The labelled text, or the prompts and responses, of a run: built in, from files, or from the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedsim.data import hub
from fedsim.data.labelled import Corpus, LabelledText
from fedsim.data.labels import check_classes, label_text, without_gold
from fedsim.data.synthetic import completions_corpus, synthetic_corpus
from fedsim.data.tables import Column, Source, read_columns
from fedsim.errors import DataError
from fedsim.places import user_path
from fedsim.rng import Stream, generator
from fedsim.settings import DataSettings
from fedsim.yaml_text import shown

__all__ = ["Corpus", "LabelledText", "load_corpus"]

Fault = Callable[[str, int], DataError]
Rows = list[tuple[int, list[object]]]
_HALF = re.compile("[\ud800-\udfff]")
_KNOWN_SHARE = 0.5
"""From this share of known test rows on, a word is said. [ours]"""
ONE_CATEGORY = "all"
"""Category of every prompt where ``data.field`` names no column of categories."""
COMPLETIONS = "completions"
"""``data.name`` of the built-in sentences to be completed by a language model."""
_HELD_OUT_PARTS = 5
"""One row in this many is held out where there is no test file."""


@dataclass(frozen=True)
class _Rows:
    """Checked strings of one file or split.

    Attributes:
        lines: where each row stands in it.
        labels: class names; responses where ``data.task`` is ``causal_lm``.
        fault: the error of a line.
        notes: what must be said of the file.
    """

    lines: list[int]
    texts: list[str]
    pairs: list[str] | None
    labels: list[str]
    fields: list[str] | None
    fault: Fault
    notes: list[str]


def _columns(settings: DataSettings, text: Column) -> dict[str, Column]:
    asked = {"text": text, "pair": settings.pair, "label": settings.label, "field": settings.field}
    return {key: column for key, column in asked.items() if column is not None}


def _string(value: object, key: str, line: int, fault: Fault) -> str:
    if not isinstance(value, str) or not value.strip():
        given = "empty" if isinstance(value, str) else shown(repr(value))
        raise fault(f"data.{key} is {given}, where text is needed", line)
    return value.strip()


def _name(value: object, key: str, line: int, fault: Fault) -> str | None:
    """A label or field value: a string, a number or a truth value; None where there is none."""
    try:
        return label_text(value)
    except TypeError:
        given = shown(repr(value))
        raise fault(f"data.{key} is {given}, where a string, a number or true or false is needed", line) from None


def _field(value: object, line: int, fault: Fault) -> str:
    name = _name(value, "field", line, fault)
    if name is None:
        raise fault("data.field is empty, where a string or a number is needed", line)
    return name


def _collect(
    read: Iterator[tuple[int, list[object]]],
    keys: Mapping[str, Column],
    settings: DataSettings,
    fault: Fault,
    notes: list[str],
    where: str,
) -> _Rows:
    found = _Rows([], [], [] if "pair" in keys else None, [], [] if "field" in keys else None, fault, notes)
    rows = _with_gold(_whole_characters(read, notes, where), keys, settings, fault, notes, where)
    order = list(keys)
    for line, values in rows:
        row = dict(zip(order, values, strict=True))
        found.lines.append(line)
        found.texts.append(_string(row["text"], "text", line, fault))
        if settings.task == "causal_lm":
            found.labels.append(_string(row["label"], "label", line, fault))
        else:
            found.labels.append(str(row["label"]))
        if found.pairs is not None:
            found.pairs.append(_pair(row["pair"], settings, line, fault))
        if found.fields is not None:
            found.fields.append(_field(row["field"], line, fault))
    return found


def _whole_characters(rows: Iterator[tuple[int, list[object]]], notes: list[str], where: str) -> Rows:
    """The rows with half characters (of an emoji that was cut in two) replaced, as no tokenizer takes them."""
    kept: Rows = []
    damaged = []
    for line, values in rows:
        if any(isinstance(value, str) and _HALF.search(value) for value in values):
            damaged.append(line)
            values = [_HALF.sub("\ufffd", value) if isinstance(value, str) else value for value in values]
        kept.append((line, values))
    if damaged:
        notes.append(f"{where}: half characters in {len(damaged)} rows (first: {damaged[0]}) are replaced by U+FFFD")
    return kept


def _with_gold(
    rows: Rows, keys: Mapping[str, Column], settings: DataSettings, fault: Fault, notes: list[str], where: str
) -> Rows:
    """The rows that have a gold label, labels as names of classes; the others are left out, and counted."""
    if settings.task == "causal_lm" or not rows:
        return rows
    at = list(keys).index("label")
    names = [_name(values[at], "label", line, fault) for line, values in rows]
    missing = without_gold(names)
    gold = [name is not None and name not in missing for name in names]
    lost = len(rows) - sum(gold)
    if lost == len(rows):
        raise fault(f"data.label: none of the {lost} rows has a gold label", rows[0][0])
    if lost:
        place = gold.index(False)
        what = f"'{str(rows[place][1][at]).strip()}'" if rows[place][1][at] is not None else "null"
        notes.append(
            f"{where}: {lost} of {len(rows)} rows have no gold label (first: {what} in line {rows[place][0]}) and are "
            "left out"
        )
    return [
        (line, [*values[:at], name, *values[at + 1 :]])
        for (line, values), name, is_gold in zip(rows, names, gold, strict=True)
        if is_gold
    ]


def _pair(value: object, settings: DataSettings, line: int, fault: Fault) -> str:
    """A second sentence; or a prompt's context, which may be missing."""
    if settings.task == "causal_lm" and (value is None or (isinstance(value, str) and not value.strip())):
        return ""
    return _string(value, "pair", line, fault)


def _label_names(labels: list[str]) -> tuple[str, ...]:
    """Distinct labels: integers in their order as numbers, else in the order of the alphabet."""
    distinct = set(labels)
    try:
        return tuple(sorted(distinct, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(distinct))


def _labelled(rows: _Rows, label_names: tuple[str, ...]) -> LabelledText:
    index = {name: position for position, name in enumerate(label_names)}
    for line, label in zip(rows.lines, rows.labels, strict=True):
        if label not in index:
            there = ", ".join(label_names[:10]) + (", ..." if len(label_names) > 10 else "")
            raise rows.fault(
                f"data.label '{shown(label)}' never occurs in the training data (labels there: {there})", line
            )
    return _text(rows, [index[label] for label in rows.labels], None)


def _answered(rows: _Rows, categories: tuple[str, ...]) -> LabelledText:
    """Prompts with their responses; the labels are their categories."""
    index = {name: position for position, name in enumerate(categories)}
    return _text(rows, [index[name] for name in _categories(rows)], tuple(rows.labels))


def _categories(rows: _Rows) -> list[str]:
    return [ONE_CATEGORY] * len(rows.texts) if rows.fields is None else rows.fields


def _text(rows: _Rows, labels: list[int], responses: tuple[str, ...] | None) -> LabelledText:
    return LabelledText(
        texts=tuple(rows.texts),
        pairs=None if rows.pairs is None else tuple(rows.pairs),
        labels=np.array(labels, dtype=np.int64),
        fields=None if rows.fields is None else tuple(rows.fields),
        responses=responses,
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
    order = generator(seed, Stream.CORPUS).permutation(len(train))
    chosen = order[: settings.max_samples]
    if settings.task != "causal_lm":
        chosen = _with_every_class(order, chosen, train.labels)
    return train.take(np.sort(chosen))


def _with_every_class(
    order: NDArray[np.int64], chosen: NDArray[np.int64], labels: NDArray[np.int64]
) -> NDArray[np.int64]:
    """`chosen` with the first row of each class that it lacks, in the place of the last of a class that has several.

    Raises:
        DataError: fewer rows than classes.
    """
    classes = np.unique(labels)
    lacking = np.setdiff1d(classes, labels[chosen])
    if not len(lacking):
        return chosen
    if len(chosen) < len(classes):
        raise DataError(
            f"data.max_samples: value {len(chosen)} is not allowed (the training data has {len(classes)} classes, and "
            "each needs at least one row: it would be tested and never trained)"
        )
    chosen = chosen.copy()
    counts = np.bincount(labels[chosen], minlength=int(classes.max()) + 1)
    place = len(chosen)
    for label in lacking:
        place -= 1
        while counts[labels[chosen[place]]] < 2:
            place -= 1
        counts[labels[chosen[place]]] -= 1
        chosen[place] = order[labels[order] == label][0]
    return chosen


def _assemble(rows: _Rows, test_rows: _Rows | None, settings: DataSettings, where: str, seed: int) -> Corpus:
    made: Callable[[_Rows, tuple[str, ...]], LabelledText]
    notes = [*rows.notes, *(test_rows.notes if test_rows else ())]
    if settings.task == "causal_lm":
        names = tuple(sorted({*_categories(rows), *(_categories(test_rows) if test_rows else ())}))
        made = _answered
    else:
        notes += check_classes(rows.labels, where)
        names = _label_names(rows.labels)
        made = _labelled
    train = made(rows, names)
    if test_rows is not None:
        test = made(test_rows, names)
        return Corpus(train, test, names, (*notes, *_test_notes(train, test, names, settings)))
    kept, held = _hold_out(train.labels, seed, where)
    return Corpus(train.take(kept), train.take(held), names, tuple(notes))


def _test_notes(train: LabelledText, test: LabelledText, names: tuple[str, ...], settings: DataSettings) -> list[str]:
    """What makes accuracies on this test data worth little."""
    notes = []
    trained = set(zip(train.texts, train.pairs or train.texts, strict=True))
    known = sum(row in trained for row in zip(test.texts, test.pairs or test.texts, strict=True))
    if known >= _KNOWN_SHARE * len(test):
        notes.append(
            f"{known} of {len(test)} test rows are also training rows: accuracies tell how well they were learned by "
            "heart (give another data.test_path, or none to hold a fifth out)"
        )
    seen = np.unique(test.labels)
    if settings.task != "causal_lm" and len(seen) == 1:
        notes.append(
            f"all {len(test)} test rows have the one label '{names[seen[0]]}' of {len(names)}: a constant answer would "
            "be right"
        )
    return notes


def _from_file(field: str, path: str, text: Column, settings: DataSettings) -> _Rows:
    source = Source(field, user_path(path), settings.header, settings.quoting)
    keys = _columns(settings, text)
    rows = _collect(read_columns(source, keys), keys, settings, source.fault, source.notes, f"{field} '{path}'")
    if not rows.texts:
        raise source.fault("no rows below the header; at least one is needed")
    return rows


def _file_corpus(settings: DataSettings, path: str, seed: int) -> Corpus:
    rows, test_rows = _from_file("data.path", path, settings.text, settings), None
    if settings.test_path is not None:
        test_rows = _from_file("data.test_path", settings.test_path, _test_text(settings), settings)
    return _assemble(rows, test_rows, settings, f"data.path '{path}'", seed)


def _hub_corpus(settings: DataSettings, name: str, seed: int) -> Corpus:
    splits = hub.load_splits(name)

    def read(split: object, text: Column) -> _Rows:
        def fault(what: str, line: int) -> DataError:
            return DataError(f"data.name '{name}', row {line}: {what}")

        keys = _columns(settings, text)
        return _collect(hub.rows_of(name, split, keys), keys, settings, fault, [], f"data.name '{name}'")

    rows, test_rows = read(splits["train"], settings.text), None
    split = hub.test_split(splits, settings.label)
    if split is not None:
        test_rows = read(split, _test_text(settings))
    return _assemble(rows, test_rows, settings, f"data.name '{name}'", seed)


def _test_text(settings: DataSettings) -> Column:
    return settings.text if settings.test_text is None else settings.test_text


def _check_responses(settings: DataSettings) -> None:
    """Refuse settings that no prompts and responses can come from."""
    if settings.path is None and settings.name in (None, "synthetic"):
        raise DataError(
            "data.task 'causal_lm' needs data.path (or a hub name): the built-in text 'synthetic' has no responses "
            f"('{COMPLETIONS}' has)"
        )
    columns = {"data.text": settings.text, "data.pair": settings.pair, "data.label": settings.label}
    for key in ("data.text", "data.pair"):
        if columns[key] == settings.label:
            raise DataError(
                f"{key} and data.label are both {settings.label!r}, but data.task 'causal_lm' needs prompts "
                "(data.text, data.pair) and responses (data.label) from columns of their own"
            )


def load_corpus(settings: DataSettings, seed: int) -> Corpus:
    """The corpus that `settings` describes; a function of the arguments and of the files' content.

    ``data.path`` reads TSV, CSV, TXT, JSONL or JSON, plain or gzipped, or Parquet; ``data.name`` is ``synthetic`` (the
    default where neither is given), ``completions`` (its sentences for a language model to complete) or a hub name.
    Without a test file (or a public test split) a seeded fifth of each label's rows is held out. ``max_samples`` keeps
    that many training rows, chosen by the seed, in their order in the file, and at least one of each class.

    With ``data.task: causal_lm`` the column ``text`` holds prompts, ``pair`` (if given) further prompt text that may be
    empty, and ``label`` the responses; ``field`` gives the categories that stand in for labels when data is held out or
    split by ``dirichlet`` (without it there is one category, and ``dirichlet`` makes clients unequal in size alone).

    Raises:
        DataError: one sentence that names the key, the file and line, and what is allowed.
    """
    if settings.name is not None and settings.path is not None:
        raise DataError(f"data.name '{settings.name}' and data.path '{settings.path}' are both given: keep one of them")
    if settings.test_path is not None and settings.path is None:
        raise DataError(f"data.test_path '{settings.test_path}' needs data.path beside it")
    if settings.name == COMPLETIONS:
        if settings.task != "causal_lm":
            raise DataError(f"data.name '{COMPLETIONS}' holds prompts and responses: give data.task causal_lm")
        return completions_corpus(settings, seed)
    if settings.task == "causal_lm":
        _check_responses(settings)
    if settings.path is not None:
        corpus = _file_corpus(settings, settings.path, seed)
    elif settings.name in (None, "synthetic"):
        return synthetic_corpus(settings, seed)
    else:
        corpus = _hub_corpus(settings, str(settings.name), seed)
    return replace(corpus, train=_capped(corpus.train, settings, seed))
