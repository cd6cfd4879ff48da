"""The forward pass of a cohort: a family's blocks on packed tokens, with every client's own weights.

Where a classifier reads one token per sentence, the last block computes queries, attention output and feed-forward for
that token alone: the others' would be thrown away. Exact, and for two layers it halves the work. A language model runs
its last block in full, and multiplies by the vocabulary only the tokens whose successors are scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch.nn import functional

from fedsim.families.family import Role
from fedsim.families.family_catalogue import family_of
from fedsim.learn.cohort.blocks import KINDS
from fedsim.learn.cohort.kernels import lora_linears
from fedsim.learn.cohort.layer import CohortLayer, Context
from fedsim.learn.cohort.pack import PackedBatch, PackRule
from fedsim.learn.cohort.stack import CohortStack
from fedsim.learn.model.backbone import Backbone
from fedsim.learn.model.heads import ACTIVATIONS
from fedsim.learn.model.linears import PrunableLinear, prunable_linears

_LENGTH_STEP = {"cpu": 8, "cuda": 1 << 20}
"""Attention's buckets: on a GPU one launch for all sentences beats short ones."""


class CohortModel:
    """Runs cohorts through one backbone. Holds no weights of its own."""

    def __init__(self, backbone: Backbone, pooling: str) -> None:
        self._backbone = backbone
        shape = backbone.shape
        self._linears: list[Mapping[Role, PrunableLinear]] = [{} for _ in range(shape.layers)]
        for linear in prunable_linears(shape):
            self._linears[linear.layer] = {**self._linears[linear.layer], linear.role: linear}
        encoder: Any = backbone.encoder
        self._family = family = family_of(shape)
        self._blocks = KINDS[type(family.block)](encoder, family, family.block)
        self._modules: list[Any] = list(encoder.get_submodule(family.blocks))
        if shape.is_language_model:
            pooling = "next"
        padding = int(attrgetter(family.block.embeddings)(encoder).padding_idx) if family.counts_from_padding else 0
        self.pack_rule = PackRule(
            pooling=("last" if family.pooled == "last" else "first") if pooling == "native" else pooling,
            first_position=padding + 1 if family.counts_from_padding else 0,
            pad_token=padding,
            length_step=_LENGTH_STEP.get(backbone.device.type, 8),
            owners=family.head_bias is not None,
        )

    @property
    def keeps_zero(self) -> bool:
        """Whether the feed-forward's activation maps 0 to 0, so that channels of zeros stay zero."""
        act = attrgetter(self._family.block.activation)(self._modules[0])
        return float(act(torch.zeros(1))) == 0.0

    def logits(self, batch: PackedBatch, stack: CohortStack) -> torch.Tensor:
        """Scores ``(C, n, labels)``, or ``(C, n, vocab)`` of the next tokens; those of empty slots mean nothing."""
        x, context = self._embed(batch, stack.base.dtype)
        last = len(self._modules) - 1
        for layer, module in enumerate(self._modules):
            readout = batch.readout if layer == last else None
            x = self._blocks.block(CohortLayer(stack, self._linears[layer], batch, readout, context), module, x)
        x = self._pool(x, batch)
        output = self._backbone.output
        if output is not None:
            return lora_linears(x, [(output.weight, None)], [None], 1.0)[0]
        return self._head(x, stack)

    def losses(self, batch: PackedBatch, stack: CohortStack) -> torch.Tensor:
        """Every client's mean cross-entropy, ``(C,)``."""
        logits = self.logits(batch, stack)
        losses = functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        return (losses.view(batch.labels.shape) * batch.weights).sum(dim=1)

    @torch.no_grad()
    def _embed(self, batch: PackedBatch, dtype: torch.dtype) -> tuple[torch.Tensor, Context]:
        x, context = self._blocks.embed(batch, dtype)
        return x.view(batch.clients, batch.tokens, -1), context

    def _pool(self, x: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """``(C, n, hidden)``, whatever follows the last block included."""
        if batch.predicting is not None:
            x = batch.predicting.forth(x.flatten(0, 1)).view(batch.clients, batch.slots, -1)
        x = self._blocks.after(x)
        if batch.averages is not None:
            return torch.bmm(batch.averages, x)
        if self._family.pooled == "pooler":
            pooler: Any = self._backbone.encoder.pooler
            return pooler.activation(pooler.dense(x))  # type: ignore[no-any-return]
        return x

    def _head(self, x: torch.Tensor, stack: CohortStack) -> torch.Tensor:
        head = stack.head
        if self._family.dense is not None and "head.dense.weight" in head:
            x = ACTIVATIONS[self._family.dense](_stacked(x, head["head.dense.weight"], head["head.dense.bias"]))
            return _stacked(x, head["head.out_proj.weight"], head["head.out_proj.bias"])
        return _stacked(x, head["head.weight"], head["head.bias"])


def _stacked(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
