"""The blocks of each kind on a cohort's packed tokens: embedding, one block, what comes after the last.

Embeddings, norms, activations, rotary positions and the bias of attention are the library's modules, called as they
are, wherever the family says they lie; only the Linears and the way that tokens lie in memory are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, Protocol

import torch

from fedsim.families.family import DecoderBlock, EncoderBlock, Family, Role
from fedsim.learn.cohort.layer import CohortLayer, Context
from fedsim.learn.cohort.pack import PackedBatch


class Blocks(Protocol):
    """One kind of block."""

    def embed(self, batch: PackedBatch, dtype: torch.dtype) -> tuple[torch.Tensor, Context]:
        """Vectors ``(1, C * T, hidden)`` of the packed tokens, and what attention needs in every block."""

    def block(self, layer: CohortLayer, module: Any, x: torch.Tensor) -> torch.Tensor:
        """``(C, T, hidden)`` to the same, or to ``(C, n, hidden)`` where one token per slot is read afterwards."""

    def after(self, x: torch.Tensor) -> torch.Tensor:
        """What follows the last block, token by token."""


class EncoderBlocks:
    """BERT's form: norms after the residual sums; learned positions, perhaps a bias of attention by head."""

    def __init__(self, encoder: Any, family: Family, block: EncoderBlock) -> None:
        self._encoder, self._family = encoder, family
        self._embeddings = attrgetter(block.embeddings)(encoder)
        self._attention_norm, self._ffn_norm = attrgetter(block.attention_norm), attrgetter(block.ffn_norm)
        self._activation = attrgetter(block.activation)

    def embed(self, batch: PackedBatch, dtype: torch.dtype) -> tuple[torch.Tensor, Context]:
        """See `Blocks`."""
        options = {}
        if self._family.types != "none":
            types = batch.token_type_ids if self._family.types == "read" else None
            options["token_type_ids"] = torch.zeros_like(batch.input_ids) if types is None else types
        x = self._embeddings(input_ids=batch.input_ids, position_ids=batch.position_ids, **options).to(dtype)
        return x, Context(False, bias=self._bias(batch, x))

    def _bias(self, batch: PackedBatch, x: torch.Tensor) -> torch.Tensor | None:
        if self._family.head_bias is None:
            return None
        longest = max(bucket.length for bucket in batch.buckets)
        bias: torch.Tensor = attrgetter(self._family.head_bias.method)(self._encoder)(x[:, :longest])
        return bias[0].to(x.dtype)

    def block(self, layer: CohortLayer, module: Any, x: torch.Tensor) -> torch.Tensor:
        """See `Blocks`."""
        attended, x = layer.attention(x, x)
        x = self._attention_norm(module)(attended + x)
        inner = self._activation(module)(layer.linears(x, Role.UP)[0])
        return self._ffn_norm(module)(layer.masked(inner, Role.DOWN) + x)  # type: ignore[no-any-return]

    def after(self, x: torch.Tensor) -> torch.Tensor:
        """See `Blocks`."""
        return x


class DecoderBlocks:
    """LLaMA's form: norms before attention and before a gated feed-forward, rotary positions, a last norm."""

    def __init__(self, encoder: Any, family: Family, block: DecoderBlock) -> None:
        self._embeddings, self._rotary = (attrgetter(path)(encoder) for path in (block.embeddings, block.rotary))
        self._final_norm = attrgetter(block.final_norm)(encoder)
        self._attention_norm, self._ffn_norm = attrgetter(block.attention_norm), attrgetter(block.ffn_norm)
        self._activation = attrgetter(block.activation)

    def embed(self, batch: PackedBatch, dtype: torch.dtype) -> tuple[torch.Tensor, Context]:
        """See `Blocks`."""
        x = self._embeddings(batch.input_ids).to(dtype)
        rotary = tuple(table.squeeze(0).unsqueeze(1) for table in self._rotary(x, batch.position_ids))
        return x, Context(True, rotary)

    def block(self, layer: CohortLayer, module: Any, x: torch.Tensor) -> torch.Tensor:
        """See `Blocks`."""
        attended, x = layer.attention(self._attention_norm(module)(x), x)
        x = attended + x
        gate, up = layer.linears(self._ffn_norm(module)(x), Role.GATE, Role.UP)
        return layer.masked(self._activation(module)(gate) * up, Role.DOWN) + x

    def after(self, x: torch.Tensor) -> torch.Tensor:
        """See `Blocks`."""
        return self._final_norm(x)  # type: ignore[no-any-return]


KINDS: dict[type, Callable[[Any, Family, Any], Blocks]] = {EncoderBlock: EncoderBlocks, DecoderBlock: DecoderBlocks}
"""The forward pass of each kind of block in `fedsim.families.family`."""
