"""What every contract is made of: arrays, labels in columns, outcomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
KeptCounts = tuple[IntArray, IntArray]
State = Mapping[str, np.ndarray]
"""What a part writes into a checkpoint: named arrays, no objects."""


class Outcome(IntEnum):
    """How a dispatched client's round ended: a code in arrays, a `label` in the records. Only add."""

    OK = 0
    LATE = 1
    DROPPED = 2
    OUT_OF_MEMORY = 3
    NON_FINITE = 4
    STALE = 5

    @property
    def label(self) -> str:
        """Its name in the records."""
        return self.name.lower()


OUTCOME_LABELS = tuple(outcome.label for outcome in Outcome)
"""Labels by code."""


@dataclass(frozen=True, eq=False)
class Labels:
    """Texts of which there are few kinds, in columns: codes of shape (P,) into `names`."""

    codes: IntArray
    names: NDArray[np.str_]

    @property
    def texts(self) -> NDArray[np.str_]:
        """The texts themselves, shape (P,)."""
        texts: NDArray[np.str_] = self.names[self.codes]
        return texts
