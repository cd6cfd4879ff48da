"""One block's Linears of a cohort: each with its clients' LoRA, and attention, every sentence by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from fedsim.families.family import Role
from fedsim.learn.cohort.kernels import RowMap, lora_linears
from fedsim.learn.cohort.pack import Bucket, PackedBatch
from fedsim.learn.cohort.stack import CohortStack
from fedsim.learn.model.linears import PrunableLinear
from fedsim.learn.train.salience import watchable


@dataclass(frozen=True, eq=False)
class Context:
    """What attention in every block needs beside its Linears.

    Attributes:
        causal: tokens see only what is before them.
        rotary: cosines and sines ``(C * T, 1, head_dim)`` of rotary positions; None without.
        bias: added to the scores, by head and the places of query and key, ``(heads, longest, longest)``, unpruned;
            None without.
    """

    causal: bool
    rotary: tuple[torch.Tensor, ...] | None = None
    bias: torch.Tensor | None = None


class CohortLayer:
    """One block's Linears of one cohort and batch.

    Args:
        readout: the tokens that are read afterwards; None for all.
    """

    def __init__(
        self,
        stack: CohortStack,
        linears: Mapping[Role, PrunableLinear],
        batch: PackedBatch,
        readout: RowMap | None,
        context: Context,
    ) -> None:
        self._stack, self._linears, self._batch = stack, linears, batch
        self._readout, self._context = readout, context

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
        batch, rotary = self._batch, self._context.rotary
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
        rotary = self._context.rotary
        if rotary is not None and q_rotary is not None:
            q, k = _rotate(q, q_rotary, shape.head_dim), _rotate(k, rotary, shape.head_dim)
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
        causal = self._context.causal and self._readout is None
        mask = None if causal else bucket.padding
        if self._context.bias is not None:
            bias = self._bias(bucket, self._context.bias)
            mask = bias if mask is None else bias + mask
        attended = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=causal,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return attended.transpose(1, 2).reshape(-1, q.shape[1] * head_dim)

    def _bias(self, bucket: Bucket, bias: torch.Tensor) -> torch.Tensor:
        """The bias of a bucket ``(1 or sentences, heads, queries, keys)``, of the heads that the cohort has here.

        Where one token per sentence is read, it is the first.
        """
        bias = bias[:, : bucket.length if self._readout is None else 1, : bucket.length]
        kept = self._stack.widths.heads[self._linears[Role.QUERY].layer].index
        if kept is None:
            return bias.unsqueeze(0)
        return bias[kept].unsqueeze(0) if kept.dim() == 1 else bias[kept[bucket.owners]]


def _rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, ...], head_dim: int) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864) on ``(rows, heads * head_dim)``, halves paired."""
    cos, sin = rotary
    heads = x.view(len(x), -1, head_dim)
    first, second = heads.chunk(2, dim=-1)
    return (heads * cos + torch.cat((-second, first), dim=-1) * sin).flatten(1)
