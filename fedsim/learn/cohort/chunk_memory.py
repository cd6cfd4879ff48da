"""What one client of a cohort takes in memory, measured on this machine, and what there is."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from fedsim.learn.cohort.forward import CohortModel
from fedsim.learn.cohort.pack import pack
from fedsim.learn.cohort.stack import Base, CohortStack, Member
from fedsim.learn.model.adapter import Adapter
from fedsim.learn.train.batches import EncodedText
from fedsim.structure import Structure

_CARD_SHARE = 0.8
_HOST_SHARE = 0.25
"""Shares of a card's and of the host's memory that cohorts may take: the rest is for the backbone, for fragments, and
on the host for other runs."""

_COPIES = 4
"""A trained tensor, its gradient and AdamW's two moments."""


def default_budget_bytes(device: torch.device) -> int:
    """Memory for cohorts: a share of the whole, so that it does not depend on what else runs at the moment."""
    if device.type == "cuda":
        return int(_CARD_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return int(_HOST_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def client_bytes(
    model: CohortModel, base: Base, adapter: Adapter, batch_size: int, max_length: int, prunes: bool
) -> int:
    """Bytes that a client adds to a chunk: one unpruned step on a batch of the longest sentences, measured.

    About the most that a client takes: batches sent ahead and an estimate's saliency come on top, for which the budget
    leaves room. A chunk that runs out of memory all the same is halved (`fedsim.learn.cohort.plan`).

    On a card this is the allocator's peak; on a processor the tensors kept for the backward pass are counted. Depends
    on shapes alone, so that chunks are the same in a repeated run.
    """
    device = base.backbone.device
    full = Structure.full(base.backbone.shape)
    text = EncodedText(
        np.zeros((batch_size, max_length), dtype=np.int32),
        np.full(batch_size, max_length),
        np.zeros(batch_size, dtype=np.int64),
        None,
        np.ones(batch_size, dtype=np.int64) if base.backbone.shape.is_language_model else None,
    )
    batch = pack(text, [np.arange(batch_size)], model.pack_rule, device, base.dtype)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    stack = CohortStack(base, [Member(adapter, full, adapter.rank, None)])
    stack.require_grad()
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model.losses(batch, stack).sum()
    loss.backward()
    trained = sum(tensor.nbytes for tensor in stack.trained)
    frozen = _storages(weight for weight, _ in base.frozen.values())
    output = base.backbone.output
    shared = frozen if output is None else frozen | _storages([output.weight])
    if device.type == "cuda":
        activations = torch.cuda.max_memory_allocated(device) - before + (_COPIES - 2) * trained
    else:
        # Gradients of activations live beside them, a few at a time: the largest twice.
        own = {pointer: size for pointer, size in kept.items() if pointer not in shared}
        activations = sum(own.values()) + 2 * max(own.values(), default=0) + _COPIES * trained
    # Where structures differ every client has a copy of what it keeps.
    return activations + (sum(frozen.values()) if base.sliced and prunes else 0)


def _storages(tensors: Any) -> dict[int, int]:
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
