"""Testing the global adapter on the structures of a panel of devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedsim.learn.adapter import Adapter
from fedsim.learn.batches import Batch
from fedsim.learn.lora import LoraModel, restrict
from fedsim.structure import Structure


@torch.no_grad()
def measure(model: LoraModel, batches: Sequence[Batch]) -> tuple[float, float]:
    """Accuracy and mean cross-entropy of the model as it is loaded, over all batches."""
    correct, loss_sum, count = 0, 0.0, 0
    for batch in batches:
        logits = model.logits(batch)
        correct += int((logits.argmax(dim=-1) == batch.labels).sum())
        loss_sum += float(torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum"))
        count += len(batch.labels)
    return correct / count, loss_sum / count


def measure_structures(
    model: LoraModel, adapter: Adapter, structures: Sequence[Structure], batches: Sequence[Batch]
) -> list[tuple[float, float]]:
    """Accuracy and loss of the global adapter restricted to each structure, at the adapter's full rank.

    Structures that keep the same groups are tested once.
    """
    known: dict[bytes, tuple[float, float]] = {}
    results = []
    for structure in structures:
        key = structure.head_mask.tobytes() + structure.channel_mask.tobytes()
        if key not in known:
            model.load(structure, restrict(adapter, structure, adapter.rank, model.backbone.shape, None))
            known[key] = measure(model, batches)
        results.append(known[key])
    return results
