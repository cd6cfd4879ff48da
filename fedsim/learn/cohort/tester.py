"""Testing the global adapter on many structures; implements `fedsim.learn.train.evaluate.Tester`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from fedsim.learn.cohort.forward import CohortModel
from fedsim.learn.cohort.pack import pack
from fedsim.learn.cohort.stack import Base, CohortStack, Member
from fedsim.learn.model.adapter import Adapter
from fedsim.learn.train.batches import EncodedText
from fedsim.learn.train.evaluate import each_once, sentences_at_once
from fedsim.structure import Structure


class CohortTester:
    """Each structure in turn, physically sliced, on packed sentences: the test set is packed once.

    Args:
        base: sliced.
    """

    def __init__(self, model: CohortModel, base: Base, text: EncodedText) -> None:
        self._model, self._base = model, base
        order = np.argsort(-text.lengths, kind="stable")
        size = sentences_at_once(base.backbone.shape, int(text.lengths.max()))
        self._batches = [
            pack(text, [order[start : start + size]], model.pack_rule, base.backbone.device, base.dtype)
            for start in range(0, len(order), size)
        ]

    def measure(self, adapter: Adapter, structures: Sequence[Structure]) -> list[tuple[float, float]]:
        """Accuracy and mean cross-entropy of the adapter restricted to each structure, at its full rank."""
        return each_once(structures, lambda structure: self._measure_one(adapter, structure))

    @torch.no_grad()
    def _measure_one(self, adapter: Adapter, structure: Structure) -> tuple[float, float]:
        stack = CohortStack(self._base, [Member(adapter, structure, adapter.rank, None)])
        correct = torch.zeros((), dtype=torch.int64, device=self._base.backbone.device)
        loss = torch.zeros((), dtype=torch.float64, device=self._base.backbone.device)
        count = 0
        for batch in self._batches:
            logits, labels = self._model.logits(batch, stack)[0], batch.labels[0]
            correct += (logits.argmax(dim=-1) == labels).sum()
            loss += functional.cross_entropy(logits, labels, reduction="sum")
            count += len(labels)
        return int(correct) / count, float(loss) / count
