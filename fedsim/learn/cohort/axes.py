"""Which features each client of a cohort keeps, as index tensors: the widths of stacked, sliced weights.

Clients of unlike structure are padded to the widest, layer by layer. Padding is exact: its weights, biases and factors
are zero, so that its outputs, and the gradients of its factors, are zero too (channels: for activations that map 0 to
0, as GELU, SiLU and ReLU do; `fedsim.learn.engine` masks a model with another one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.learn.model.linears import HEAD_ROLES, PrunableLinear, group_width
from fedsim.structure import ModelShape, Structure


@dataclass(frozen=True, eq=False)
class Axis:
    """The kept places along one axis, of features or of groups.

    Attributes:
        full: places of the unpruned axis.
        index: None where every client keeps all; ``(k,)`` where all keep the same; else ``(C, k)``, each row
            ascending, filled up with 0.
        valid: ``(C, k)``, False on the filling; None where there is none.
    """

    full: int
    index: torch.Tensor | None
    valid: torch.Tensor | None

    def widened(self, width: int) -> Axis:
        """The axis whose places are `width` adjacent features each."""
        if width == 1 or self.index is None:
            return Axis(self.full * width, self.index, self.valid)
        within = torch.arange(width, device=self.index.device)
        index = (self.index.unsqueeze(-1) * width + within).flatten(-2)
        valid = None if self.valid is None else self.valid.repeat_interleave(width, dim=-1)
        return Axis(self.full * width, index, valid)

    def of_shared(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """The kept places of a tensor that all clients share; ``(C, ...)`` where they keep different ones."""
        if self.index is None:
            return tensor
        if self.index.dim() == 1:
            return tensor.index_select(axis, self.index)
        moved = tensor.movedim(axis, 0)[self.index]  # (C, k, others)
        if self.valid is not None:
            moved *= self.valid.view(*self.valid.shape, *[1] * (tensor.dim() - 1))
        return moved.movedim(1, axis + 1).contiguous()

    def of_stack(self, stack: torch.Tensor) -> torch.Tensor:
        """The kept places along the last axis of ``(C, r, full)``."""
        if self.index is None:
            return stack
        if self.index.dim() == 1:
            return stack.index_select(2, self.index)
        kept = stack.gather(2, self.index.unsqueeze(1).expand(-1, stack.shape[1], -1))
        return kept if self.valid is None else kept.mul_(self.valid.unsqueeze(1))

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """``(C, k)`` to ``(C, full)``, zero where a client keeps nothing."""
        if self.index is None:
            return values
        index = self.index.expand(values.shape)
        kept = values if self.valid is None else values * self.valid
        return values.new_zeros(len(values), self.full).scatter_add_(1, index, kept)

    def within(self, old: Axis, clients: int) -> Axis:
        """This axis as places of `old`, which keeps all that it keeps."""
        if old.index is None or self.index is None:
            return self
        places = torch.arange(old.index.shape[-1], device=old.index.device)
        if old.index.dim() == 1 and self.index.dim() == 1:
            of_old = places.new_zeros(old.full).index_copy_(0, old.index, places)
            return Axis(len(places), of_old[self.index], None)
        index = old.index.expand(clients, -1)
        # The filling points at feature 0, which may be kept: it must not overwrite that one's place.
        where = index if old.valid is None else torch.where(old.valid, index, old.full)
        of_old = places.new_zeros(clients, old.full + 1).scatter_(1, where, places.expand(clients, -1))
        return Axis(len(places), of_old.gather(1, self.index.expand(clients, -1)), self.valid)


def group_axis(masks: NDArray[np.bool_], device: torch.device) -> Axis:
    """The axis of kept groups from every client's mask, ``(C, groups)``."""
    full = masks.shape[1]
    if masks.all():
        return Axis(full, None, None)
    counts = masks.sum(axis=1)
    if (masks == masks[0]).all():
        return Axis(full, torch.from_numpy(np.flatnonzero(masks[0])).to(device), None)
    widest = int(counts.max())
    index = np.argsort(~masks, axis=1, kind="stable")[:, :widest]
    valid = np.arange(widest) < counts[:, None]
    is_padded = not valid.all()
    return Axis(
        full,
        torch.from_numpy(np.where(valid, index, 0)).to(device),
        torch.from_numpy(valid).to(device) if is_padded else None,
    )


@dataclass(frozen=True, eq=False)
class Widths:
    """The axes of every layer of a cohort.

    Attributes:
        head_masks, channel_masks: ``(C, layers, groups)`` of the clients' structures.
        heads, channels: per layer the axis of kept groups, as the cohort's weights have them.
    """

    shape: ModelShape
    head_masks: NDArray[np.bool_]
    channel_masks: NDArray[np.bool_]
    heads: tuple[Axis, ...]
    channels: tuple[Axis, ...]

    @classmethod
    def of(cls, shape: ModelShape, structures: Sequence[Structure], sliced: bool, device: torch.device) -> Widths:
        """Widths of these clients: their own where `sliced`, else everything (masks then hide what is pruned)."""
        heads = np.stack([structure.head_mask for structure in structures])
        channels = np.stack([structure.channel_mask for structure in structures])

        def axes(masks: NDArray[np.bool_]) -> tuple[Axis, ...]:
            return tuple(
                group_axis(masks[:, layer] if sliced else np.ones_like(masks[:1, layer]), device)
                for layer in range(shape.layers)
            )

        return cls(shape, heads, channels, axes(heads), axes(channels))

    def groups(self, linear: PrunableLinear) -> Axis:
        """The axis of groups that `linear` loses."""
        return (self.heads if linear.role in HEAD_ROLES else self.channels)[linear.layer]

    def features(self, linear: PrunableLinear) -> Axis:
        """The axis of features that `linear` loses: rows, or columns where it is column pruned."""
        return self.groups(linear).widened(group_width(linear, self.shape))
