"""Labelled text in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class LabelledText:
    """n labelled sentences or sentence pairs, or n prompts with their responses.

    Attributes:
        texts: n sentences, or prompts; none empty.
        pairs: the n second sentences, or contexts of the prompts (which may be empty), or None.
        labels: indices into ``Corpus.label_names``, shape (n,): classes; where there are responses, categories.
        fields: n values of the column by which a natural split goes, or None.
        responses: what is to follow each prompt, none empty; None where labels are classes.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: NDArray[np.int64]
    fields: tuple[str, ...] | None
    responses: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: NDArray[np.int64]) -> LabelledText:
        """The given rows, in the given order."""

        def chosen(strings: tuple[str, ...] | None) -> tuple[str, ...] | None:
            return None if strings is None else tuple(strings[row] for row in rows)

        return LabelledText(
            texts=tuple(self.texts[row] for row in rows),
            pairs=chosen(self.pairs),
            labels=self.labels[rows],
            fields=chosen(self.fields),
            responses=chosen(self.responses),
        )


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and test text with the names of the labels (or categories), in the order of their indices.

    `notes` are what must be said of the data, one sentence each.
    """

    train: LabelledText
    test: LabelledText
    label_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
