"""Testing the global adapter on the structures of a panel of devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from fedsim.learn.adapter import Adapter
from fedsim.learn.batches import Batch
from fedsim.learn.lora import LoraModel, restrict
from fedsim.structure import Structure

Measured = tuple[float, float]
"""Accuracy and mean cross-entropy."""


class Tester(Protocol):
    """Tests a global adapter restricted to each of several structures, at its full rank."""

    def measure(self, adapter: Adapter, structures: Sequence[Structure]) -> list[Measured]:
        """One pair per structure, in order."""


class ReferenceTester:
    """Implements `Tester` on one PEFT model that takes each structure in turn."""

    def __init__(self, model: LoraModel, batches: Sequence[Batch]) -> None:
        self._model, self._batches = model, batches

    def measure(self, adapter: Adapter, structures: Sequence[Structure]) -> list[Measured]:
        """One pair per structure, in order."""
        return each_once(structures, lambda structure: self._measure_one(adapter, structure))

    @torch.no_grad()
    def _measure_one(self, adapter: Adapter, structure: Structure) -> Measured:
        model = self._model
        model.load(structure, restrict(adapter, structure, adapter.rank, model.backbone.shape, None))
        correct, loss_sum, count = 0, 0.0, 0
        for batch in self._batches:
            logits = model.logits(batch)
            correct += int((logits.argmax(dim=-1) == batch.labels).sum())
            loss_sum += float(torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum"))
            count += len(batch.labels)
        return correct / count, loss_sum / count


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
