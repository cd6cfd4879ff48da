"""The forward pass of a cohort: BERT, RoBERTa and LLaMA blocks on packed tokens, with every client's own weights.

The blocks are those of the Hugging Face models (their embeddings, norms, activations and rotary positions are called
as they are); only the Linears and the way that tokens lie in memory are ours. Where a classifier reads one token per
sentence, the last block computes queries, attention output and feed-forward for that token alone: the others' would be
thrown away. Exact, and for two layers it halves the work. A language model runs its last block in full, and multiplies
by the vocabulary only the tokens whose successors are scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from fedsim.learn.cohort.kernels import RowMap, lora_linears
from fedsim.learn.cohort.pack import Bucket, PackedBatch, PackRule
from fedsim.learn.cohort.stack import CohortStack
from fedsim.learn.model.backbone import Backbone
from fedsim.learn.model.linears import PrunableLinear, Role, prunable_linears
from fedsim.learn.train.salience import watchable

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
        self._block = self._llama_block if shape.architecture == "llama" else self._encoder_block
        self._modules: list[Any] = list(encoder.layers if shape.architecture == "llama" else encoder.encoder.layer)
        single = "last" if shape.architecture == "llama" else "first"
        if shape.is_language_model:
            pooling = "next"
        is_roberta = shape.architecture == "roberta"
        self.pack_rule = PackRule(
            pooling=single if pooling == "native" else pooling,
            first_position=int(encoder.embeddings.padding_idx) + 1 if is_roberta else 0,
            pad_token=int(encoder.embeddings.padding_idx) if is_roberta else 0,
            length_step=_LENGTH_STEP.get(backbone.device.type, 8),
        )

    @property
    def keeps_zero(self) -> bool:
        """Whether the feed-forward's activation maps 0 to 0, so that channels of zeros stay zero."""
        module = self._modules[0]
        act = module.mlp.act_fn if hasattr(module, "mlp") else module.intermediate.intermediate_act_fn
        return float(act(torch.zeros(1))) == 0.0

    def logits(self, batch: PackedBatch, stack: CohortStack) -> torch.Tensor:
        """Scores ``(C, n, labels)``, or ``(C, n, vocab)`` of the next tokens; those of empty slots mean nothing."""
        x, rotary = self._embed(batch, stack.base.dtype)
        last = len(self._modules) - 1
        for layer, module in enumerate(self._modules):
            readout = batch.readout if layer == last else None
            x = self._block(_Layer(stack, self._linears[layer], batch, readout, rotary), module, x)
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
    def _embed(self, batch: PackedBatch, dtype: torch.dtype) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        encoder: Any = self._backbone.encoder
        if self._backbone.shape.architecture == "llama":
            x = encoder.embed_tokens(batch.input_ids).to(dtype)
            rotary = tuple(table.squeeze(0).unsqueeze(1) for table in encoder.rotary_emb(x, batch.position_ids))
        else:
            types = batch.token_type_ids if self._backbone.shape.architecture == "bert" else None
            x = encoder.embeddings(
                input_ids=batch.input_ids,
                token_type_ids=torch.zeros_like(batch.input_ids) if types is None else types,
                position_ids=batch.position_ids,
            ).to(dtype)
            rotary = None
        return x.view(batch.clients, batch.tokens, -1), rotary

    def _encoder_block(self, layer: _Layer, module: Any, x: torch.Tensor) -> torch.Tensor:
        attended, x = layer.attention(x, x)
        x = module.attention.output.LayerNorm(attended + x)
        inner = module.intermediate.intermediate_act_fn(layer.linears(x, Role.UP)[0])
        return module.output.LayerNorm(layer.masked(inner, Role.DOWN) + x)  # type: ignore[no-any-return]

    def _llama_block(self, layer: _Layer, module: Any, x: torch.Tensor) -> torch.Tensor:
        attended, x = layer.attention(module.input_layernorm(x), x)
        x = attended + x
        gate, up = layer.linears(module.post_attention_layernorm(x), Role.GATE, Role.UP)
        return layer.masked(module.mlp.act_fn(gate) * up, Role.DOWN) + x

    def _pool(self, x: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """``(C, n, hidden)``; the last norm of LLaMA included."""
        encoder: Any = self._backbone.encoder
        if batch.predicting is not None:
            x = batch.predicting.forth(x.flatten(0, 1)).view(batch.clients, batch.slots, -1)
        if self._backbone.shape.architecture == "llama":
            x = encoder.norm(x)
        if batch.averages is not None:
            return torch.bmm(batch.averages, x)
        if self._backbone.shape.architecture == "bert":
            return encoder.pooler.activation(encoder.pooler.dense(x))  # type: ignore[no-any-return]
        return x

    def _head(self, x: torch.Tensor, stack: CohortStack) -> torch.Tensor:
        head = stack.head
        if "head.dense.weight" in head:
            x = torch.tanh(_stacked(x, head["head.dense.weight"], head["head.dense.bias"]))
            return _stacked(x, head["head.out_proj.weight"], head["head.out_proj.bias"])
        return _stacked(x, head["head.weight"], head["head.bias"])


def _stacked(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))


class _Layer:
    """One block's Linears of one cohort and batch.

    Args:
        readout: the tokens that are read afterwards; None for all.
        rotary: cosines and sines ``(C * T, 1, head_dim)`` of LLaMA.
    """

    def __init__(
        self,
        stack: CohortStack,
        linears: Mapping[Role, PrunableLinear],
        batch: PackedBatch,
        readout: RowMap | None,
        rotary: tuple[torch.Tensor, ...] | None,
    ) -> None:
        self._stack, self._linears, self._batch = stack, linears, batch
        self._readout, self._rotary = readout, rotary

    def linears(self, x: torch.Tensor, *roles: Role) -> tuple[torch.Tensor, ...]:
        """Several Linears of one input."""
        stack, chosen = self._stack, [self._linears[role] for role in roles]
        return lora_linears(
            x,
            [stack.frozen(linear) for linear in chosen],
            [stack.factors.get(linear.name) for linear in chosen],
            stack.base.alpha_over_rank,
        )

    def masked(self, x: torch.Tensor, role: Role) -> torch.Tensor:
        """A column-pruned Linear, of what its clients keep of `x`."""
        mask = self._stack.mask(self._linears[role])
        if self._stack.watched is not None:
            x = watchable(x)
            self._stack.watched[self._linears[role].name] = x
        return self.linears(x if mask is None else x * mask, role)[0]

    def attention(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention output of `x` and the residual, both of the tokens that are read afterwards."""
        batch, rotary = self._batch, self._rotary
        if self._readout is None:
            q, k, v = self.linears(x, Role.QUERY, Role.KEY, Role.VALUE)
            q_rotary = rotary
        else:
            k, v = self.linears(x, Role.KEY, Role.VALUE)
            shape = (batch.clients, batch.slots, -1)
            same = residual is x
            x = self._readout.forth(x.flatten(0, 1)).view(shape)
            residual = x if same else self._readout.forth(residual.flatten(0, 1)).view(shape)
            q = self.linears(x, Role.QUERY)[0]
            q_rotary = None if rotary is None else tuple(table[self._readout.take] for table in rotary)
        attended = self._attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), q_rotary)
        return self.masked(attended.view(*x.shape[:2], -1), Role.ATTENTION_OUT), residual

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_rotary: tuple[torch.Tensor, ...] | None
    ) -> torch.Tensor:
        """Packed rows ``(rows, heads * head_dim)`` to the same, every sentence by itself."""
        batch, shape = self._batch, self._stack.base.backbone.shape
        if self._rotary is not None and q_rotary is not None:
            q, k = _rotate(q, q_rotary, shape.head_dim), _rotate(k, self._rotary, shape.head_dim)
        of_queries = batch.to_buckets if self._readout is None else batch.readout_to_buckets
        if of_queries is not None:
            q = of_queries.forth(q)
        if batch.to_buckets is not None:
            k, v = batch.to_buckets.forth(k), batch.to_buckets.forth(v)
        outputs, query_start, key_start = [], 0, 0
        for bucket in batch.buckets:
            queries = bucket.sentences * (bucket.length if self._readout is None else 1)
            keys = bucket.sentences * bucket.length
            outputs.append(
                self._one_bucket(
                    bucket,
                    q[query_start : query_start + queries],
                    k[key_start : key_start + keys],
                    v[key_start : key_start + keys],
                )
            )
            query_start, key_start = query_start + queries, key_start + keys
        attended = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return attended if of_queries is None else of_queries.reverse(attended)

    def _one_bucket(self, bucket: Bucket, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        head_dim = self._stack.base.backbone.shape.head_dim
        q, k, v = (
            tensor.view(bucket.sentences, -1, tensor.shape[1] // head_dim, head_dim).transpose(1, 2)
            for tensor in (q, k, v)
        )
        # Padding stands on the right: where tokens see only what is before them, none sees it.
        causal = self._rotary is not None and self._readout is None
        attended = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if causal else bucket.padding,
            is_causal=causal,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return attended.transpose(1, 2).reshape(-1, q.shape[1] * head_dim)


def _rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, ...], head_dim: int) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864) on ``(rows, heads * head_dim)``, halves paired as in LLaMA."""
    cos, sin = rotary
    heads = x.view(len(x), -1, head_dim)
    first, second = heads.chunk(2, dim=-1)
    return (heads * cos + torch.cat((-second, first), dim=-1) * sin).flatten(1)
