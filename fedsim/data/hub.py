"""Labelled text from the Hugging Face hub, through the optional library ``datasets``."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from fedsim.data.tables import Column
from fedsim.errors import DataError

TEST_SPLITS = ("test", "validation", "validation_matched")
Rows = Iterator[tuple[int, list[object]]]


def load_splits(name: str) -> Any:
    """The data set ``owner/name`` or ``owner/name:configuration``, as ``datasets.load_dataset`` gives it.

    Raises:
        DataError: the library is not installed, or the data set cannot be had.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            f"data.name '{name}' is a hub name, which needs the library 'datasets' (pip install datasets); "
            "allowed without it: data.name: synthetic, or data.path"
        ) from None
    repository, _, configuration = name.partition(":")
    try:
        splits = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # the library raises many unrelated classes: offline, unknown name, broken script
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"data.name '{name}' cannot be loaded from the hub ({type(error).__name__}: {reason}); allowed: synthetic, "
            "or the name of a data set that can be reached, with ':configuration' where it has several"
        ) from None
    if "train" not in splits:
        raise DataError(f"data.name '{name}' has no split 'train' (splits: {', '.join(splits)})")
    return splits


def test_split(splits: Any, label: Column) -> Any | None:
    """The first of the usual test splits whose labels are public (the hub writes -1 where they are not)."""
    for split in TEST_SPLITS:
        if split in splits and label in splits[split].column_names and set(splits[split][label]) != {-1}:
            return splits[split]
    return None


def rows_of(name: str, split: Any, columns: dict[str, Column]) -> Rows:
    """(row number, values in the order of `columns`); class indices are turned into their names."""
    for key, column in columns.items():
        if column not in split.column_names:
            there = ", ".join(split.column_names)
            raise DataError(f"data.name '{name}': column data.{key} '{column}' is not there (columns: {there})")
    classes = getattr(split.features[columns["label"]], "names", None)
    values = [split[column] for column in columns.values()]
    at = list(columns).index("label")
    for row, found in enumerate(zip(*values, strict=True), start=1):
        line: list[object] = list(found)
        if classes is not None and isinstance(line[at], int) and 0 <= line[at] < len(classes):  # type: ignore[operator]
            line[at] = classes[line[at]]  # type: ignore[index]
        yield row, line
