"""Testing the global adapter on the structures of a panel of devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from fedsim.learn.adapter import Adapter
from fedsim.structure import Structure

Measured = tuple[float, float]
"""Accuracy and mean cross-entropy."""


class Tester(Protocol):
    """Tests a global adapter restricted to each of several structures, at its full rank."""

    def measure(self, adapter: Adapter, structures: Sequence[Structure]) -> list[Measured]:
        """One pair per structure, in order."""


def each_once(structures: Sequence[Structure], measure: Callable[[Structure], Measured]) -> list[Measured]:
    """`measure` of every structure; those that keep the same groups are measured once."""
    known: dict[bytes, Measured] = {}
    results = []
    for structure in structures:
        key = structure.head_mask.tobytes() + structure.channel_mask.tobytes()
        if key not in known:
            known[key] = measure(structure)
        results.append(known[key])
    return results
