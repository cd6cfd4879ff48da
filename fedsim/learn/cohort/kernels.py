"""The two operations that cohort training is made of, with their gradients written out.

`lora_linears`: several Linears of one input, each with its clients' LoRA. The frozen weight gets no gradient, so that
the backward pass is one large product and three thin ones; factors are kept rank first, ``A (C, r, i)`` and
``B' (C, r, o)``, which makes the thin products short and wide (a factor of four on CPUs over the other order).

`RowMap`: rows between the packed order and the order that attention needs. Both directions are gathers, so that the
gradient of each is the other: nothing is added up, and repeats are bit-equal on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Frozen = tuple[torch.Tensor, torch.Tensor | None]
"""Weight ``(o, i)`` shared by all clients or ``(C, o, i)``, and bias ``(o,)`` or ``(C, o)`` or None."""

StackedFactors = tuple[torch.Tensor, torch.Tensor]
"""``A (C, r, i)`` and ``B' (C, r, o)`` of one Linear, all clients."""


def lora_linears(
    x: torch.Tensor, frozen: Sequence[Frozen], factors: Sequence[StackedFactors | None], scale: float
) -> tuple[torch.Tensor, ...]:
    """``x W' + b + scale (x A') B'`` for several Linears that read the same input.

    Args:
        x: ``(C, T, i)``.
        frozen: weights and biases; in another floating type than `x`, the large products run in that type.
        factors: the clients' LoRA, None where a Linear carries none.
        scale: c of ``dW = c B A``.
    Returns:
        One ``(C, T, o)`` per Linear, in the type of `x`.
    """
    flat: list[torch.Tensor | None] = []
    for (weight, bias), pair in zip(frozen, factors, strict=True):
        flat += [weight, bias, *(pair or (None, None))]
    result: tuple[torch.Tensor, ...] = _LoraLinears.apply(x, scale, *flat)
    return result


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float, *flat: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        saved: list[torch.Tensor | None] = [x]
        outputs = []
        for weight, bias, a, b in _fours(flat):
            y = _product(x, weight.transpose(-1, -2), bias)
            zt = None
            if a is not None and b is not None:
                zt = torch.bmm(a, x.transpose(1, 2))
                y.baddbmm_(zt.transpose(1, 2), b, alpha=scale)
            outputs.append(y)
            saved += [weight, a, b, zt]
        ctx.scale = scale
        ctx.save_for_backward(*saved)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | float | None, ...]:
        x, *rest = ctx.saved_tensors
        scale: float = ctx.scale
        gx: torch.Tensor | None = None
        flat: list[torch.Tensor | None] = []
        for (weight, a, b, zt), grad in zip(_fours(rest), grads, strict=True):
            gy = grad.contiguous()
            ga = gb = gzt = None
            if a is not None and b is not None and zt is not None:
                gzt = torch.bmm(b, gy.transpose(1, 2)).mul_(scale)
                gb = torch.bmm(zt, gy).mul_(scale)
                ga = torch.bmm(gzt, x)
            if ctx.needs_input_grad[0]:
                gx = _product(gy, weight, None) if gx is None else gx.add_(_product(gy, weight, None))
                if gzt is not None:
                    gx.baddbmm_(gzt.transpose(1, 2), a)
            flat += [None, None, ga, gb]
        return (gx, None, *flat)


def _fours(flat: Sequence[Any]) -> list[tuple[Any, Any, Any, Any]]:
    return [(flat[i], flat[i + 1], flat[i + 2], flat[i + 3]) for i in range(0, len(flat), 4)]


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x (C, T, k)`` times ``weight (k, m)`` or ``(C, k, m)``, plus bias, in the type of `x`."""
    added = bias if bias is None or bias.dim() == 1 else bias.unsqueeze(1)
    if weight.dtype != x.dtype:
        y = (x.to(weight.dtype) @ weight).to(x.dtype)
        return y if added is None else y.add_(added)
    if weight.dim() == 3:
        return torch.bmm(x, weight) if added is None else torch.baddbmm(added, x, weight)
    rows = x.reshape(-1, x.shape[-1])
    y = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    return y.view(*x.shape[:-1], weight.shape[-1])


@dataclass(frozen=True, eq=False)
class RowMap:
    """A partial one-to-one map between the rows of a source and those of a target.

    Attributes:
        take: per target row its source row; 0 where it has none. Shape (target rows,).
        empty: the target rows that have none: they become zero. None where all have one.
        back, back_empty: the same, the other way.
    """

    take: torch.Tensor
    empty: torch.Tensor | None
    back: torch.Tensor
    back_empty: torch.Tensor | None

    def forth(self, source: torch.Tensor) -> torch.Tensor:
        """``(source rows, d)`` to ``(target rows, d)``."""
        result: torch.Tensor = _Move.apply(source, self.take, self.empty, self.back, self.back_empty)
        return result

    def reverse(self, target: torch.Tensor) -> torch.Tensor:
        """``(target rows, d)`` to ``(source rows, d)``."""
        result: torch.Tensor = _Move.apply(target, self.back, self.back_empty, self.take, self.empty)
        return result


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        take: torch.Tensor,
        empty: torch.Tensor | None,
        back: torch.Tensor,
        back_empty: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.back, ctx.back_empty = back, back_empty
        return _gather(rows, take, empty)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _gather(grad, ctx.back, ctx.back_empty), None, None, None, None


def _gather(rows: torch.Tensor, take: torch.Tensor, empty: torch.Tensor | None) -> torch.Tensor:
    moved = rows.index_select(0, take)
    return moved if empty is None else moved.index_fill_(0, empty, 0.0)
