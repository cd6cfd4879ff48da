"""Testing the global adapter on the structures of a panel of devices.

Of a classifier: the share of sentences in the right class, and their mean cross-entropy. Of a language model: over all
tokens of all responses, each given what stands before it, the share that is the likeliest, and the mean cross-entropy,
whose exponential is the perplexity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from fedsim.learn.model.adapter import Adapter
from fedsim.structure import ModelShape, Structure

Measured = tuple[float, float]
"""Accuracy and mean cross-entropy."""

_SENTENCES = 64
_LOGITS = 1 << 24
"""At most about this many logits at a time."""


def sentences_at_once(shape: ModelShape, longest: int) -> int:
    """Sentences of a test batch; fewer for a language model, whose every token has logits over the vocabulary."""
    if not shape.is_language_model:
        return _SENTENCES
    return max(1, min(_SENTENCES, _LOGITS // (longest * shape.vocab)))


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
