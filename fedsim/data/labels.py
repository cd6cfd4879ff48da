"""What counts as a class: rows without a gold label, numbers and truth values as labels, scores taken for classes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from fedsim.errors import DataError

_NO_GOLD = ("", "-")
"""SNLI and MultiNLI write "-" where annotators did not agree; their copies on the hub write -1."""
_WHOLE = re.compile(r"([-+]?\d+)\.0*")
_REAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
_FEW_SCORES = 12
"""Half stars from 0.5 to 5 are ten classes; more real numbers than this are scores. [ours]"""
_MANY = 50
"""Distinct labels from which the number is worth a word. [ours]"""


def label_text(value: object) -> str | None:
    """A label as a class name: whole numbers without a point, truth values as JSON writes them; None: no gold label.

    Raises:
        TypeError: a list or mapping.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        value = str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise TypeError
    text = value.strip()
    if text in _NO_GOLD:
        return None
    whole = _WHOLE.fullmatch(text)
    return str(int(whole[1])) if whole else text


def without_gold(labels: Sequence[str | None]) -> set[str]:
    """The labels that stand for "none": -1, unless it is one end of a scale such as -1, 0, 1."""
    classes = {label for label in labels if label is not None}
    if "-1" not in classes or classes <= {"-1", "0", "1"} or any(_is_below(label, -1) for label in classes):
        return set()
    return {"-1"}


def _is_below(label: str, number: int) -> bool:
    try:
        return int(label) < number
    except ValueError:
        return False


def check_classes(labels: Sequence[str], where: str) -> list[str]:
    """Refuse a column of scores or names of rows; sentences on what merely looks like one.

    Raises:
        DataError: fewer than two classes; or so many real numbers, or so few rows to each, that they are none.
    """
    counts = Counter(labels)
    distinct, rows = len(counts), len(labels)
    if distinct < 2:
        raise DataError(f"{where}: data.label has {distinct} distinct values, but at least 2 are needed")
    real = all(_REAL.fullmatch(label) for label in counts) and any("." in label for label in counts)
    if real and distinct > _FEW_SCORES:
        raise DataError(
            f"{where}: data.label has {distinct} distinct real numbers in {rows} rows, which look like scores, and "
            "each would become a class; give a column of classes"
        )
    if distinct > _MANY and rows < 3 * distinct:
        raise DataError(
            f"{where}: data.label has {distinct} distinct values in {rows} rows, which look like names of rows or "
            "texts, and each would become a class; give a column of classes"
        )
    said = []
    if real:
        said.append(f"{where}: data.label holds real numbers; each of the {distinct} becomes a class")
    elif distinct > _MANY:
        said.append(f"{where}: data.label has {distinct} distinct values in {rows} rows; each becomes a class")
    if "-1" in counts:
        said.append(f"{where}: the label -1 ({counts['-1']} of {rows} rows) is taken as a class of its own")
    return said
