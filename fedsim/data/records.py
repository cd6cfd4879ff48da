"""Labelled text in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class LabelledText:
    """n labelled sentences, or sentence pairs.

    Attributes:
        texts: n sentences, none empty.
        pairs: the n second sentences, or None.
        labels: indices into ``Corpus.label_names``, shape (n,).
        fields: n values of the column by which a natural split goes, or None.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: NDArray[np.int64]
    fields: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: NDArray[np.int64]) -> LabelledText:
        """The given rows, in the given order."""
        return LabelledText(
            texts=tuple(self.texts[row] for row in rows),
            pairs=None if self.pairs is None else tuple(self.pairs[row] for row in rows),
            labels=self.labels[rows],
            fields=None if self.fields is None else tuple(self.fields[row] for row in rows),
        )


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and test text with the names of the labels, in the order of their indices."""

    train: LabelledText
    test: LabelledText
    label_names: tuple[str, ...]
