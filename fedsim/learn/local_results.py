"""From trained updates to what a strategy sees of them, and back to what the server merges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedsim.contracts.common import FloatArray, KeptCounts, Outcome
from fedsim.contracts.learning import LocalResults
from fedsim.learn.merge.rules import Contribution
from fedsim.learn.train.jobs import Job, Update
from fedsim.structure import ModelShape, Structure


def results_of(done: Sequence[tuple[Job, Update]], shape: ModelShape) -> LocalResults:
    """Columns of the updates, with the updates themselves as payload."""
    updates = [update for _, update in done]
    starts, ends = [job.start for job, _ in done], [update.structure for update in updates]

    def kept(structures: Sequence[Structure]) -> KeptCounts:
        counts = np.array([(one.heads_kept, one.channels_kept) for one in structures], dtype=np.int64)
        heads, channels = counts.reshape(len(structures), 2, shape.layers).swapaxes(0, 1)
        return heads, channels

    return LocalResults(
        clients=np.array([job.request.client for job, _ in done], dtype=np.int64),
        ratio=np.array([structure.ratio(shape) for structure in ends]),
        loss_before=np.array([update.loss_before for update in updates]),
        loss_after=np.array([update.loss_after for update in updates]),
        lora_importance=np.array([update.lora_importance for update in updates]),
        outcome=np.array([update.outcome for update in updates], dtype=np.int64),
        kept_before=kept(starts),
        kept_after=kept(ends),
        payload=updates,
        rank=np.array([update.adapter.rank for update in updates], dtype=np.int64),
    )


def usable_updates(results: LocalResults) -> list[Update]:
    """The updates behind `results`.

    Raises:
        ValueError: one is not fit to be merged.
    """
    payload = results.payload or [None] * len(results.clients)
    updates = []
    for client, outcome, update in zip(results.clients.tolist(), results.outcome.tolist(), payload, strict=True):
        if not isinstance(update, Update) or outcome != Outcome.OK:
            raise ValueError(f"client {client} has no usable update to aggregate")
        updates.append(update)
    return updates


def contributions_of(updates: Sequence[Update], weights: FloatArray | None) -> list[Contribution]:
    """What the server merges.

    Args:
        weights: share of each update's difference that counts, shape (P,); None: all of it.
    """
    shares = [1.0] * len(updates) if weights is None else weights.tolist()
    return [
        Contribution(one.adapter, one.structure, one.samples, one.lora_importance, one.start, share)
        for one, share in zip(updates, shares, strict=True)
    ]
