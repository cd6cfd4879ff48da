"""Real structured pruning: the prunable Linears of one shared backbone swapped for physically smaller ones, and back.

Attention in the library derives its number of heads from the width of the query, key and value outputs
(``view(..., -1, head_dim)``), and the repetition of key-value heads from a constant ratio, so that slicing whole head
groups needs no other change, but for a bias by head (`fedsim.learn.model.head_bias`). The unpruned weights stay in
memory once, as references in `Backbone.full_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedsim.learn.model.backbone import Backbone, FullWeights
from fedsim.learn.model.head_bias import keep_heads
from fedsim.learn.model.linears import PrunableLinear, kept_columns, kept_rows, prunable_linears
from fedsim.structure import Structure


def check_structure(backbone: Backbone, structure: Structure) -> None:
    """Raise ValueError unless `structure` has the masks of this backbone and a group of each kind in every layer."""
    shape = backbone.shape
    sizes = (structure.head_mask.shape, structure.channel_mask.shape)
    if sizes != ((shape.layers, shape.head_groups), (shape.layers, shape.ffn)):
        raise ValueError(f"structure with masks of shape {sizes} does not fit model '{shape.name}'")
    if structure.heads_kept.min() < 1 or structure.channels_kept.min() < 1:
        raise ValueError("structure leaves a layer without a head group or without a channel")


def take(tensor: torch.Tensor, axis: int, indices: NDArray[np.int64] | None) -> torch.Tensor:
    """The kept rows (axis 0) or columns (axis 1) of a tensor; the tensor itself where `indices` is None."""
    if indices is None:
        return tensor
    return tensor.index_select(axis, torch.from_numpy(indices).to(tensor.device))


def with_merged(weight: torch.Tensor, update: torch.Tensor | None) -> torch.Tensor:
    """A frozen weight with what was merged into it, added in fp32 at least; the weight itself where that is None."""
    if update is None:
        return weight
    wide = torch.promote_types(weight.dtype, update.dtype)
    return (weight.detach().to(wide) + update.to(weight.device)).to(weight.dtype)


def sliced_weights(
    backbone: Backbone, linear: PrunableLinear, structure: Structure, update: torch.Tensor | None = None
) -> FullWeights:
    """Frozen weight and bias of one Linear at the widths of `structure`; the originals where it keeps everything.

    Args:
        update: what was merged into the weight, at full width.
    """
    rows = kept_rows(linear, structure, backbone.shape)
    columns = kept_columns(linear, structure, backbone.shape)
    weight, bias = backbone.full_weights[linear.name]
    if update is not None:
        weight = nn.Parameter(with_merged(weight, update), requires_grad=False)
    if rows is None and columns is None:
        return weight, bias
    small = nn.Parameter(take(take(weight.detach(), 0, rows), 1, columns), requires_grad=False)
    if bias is None or rows is None:
        return small, bias
    return small, nn.Parameter(take(bias.detach(), 0, rows), requires_grad=False)


def apply_structure(backbone: Backbone, structure: Structure, merged: Mapping[str, torch.Tensor] | None = None) -> None:
    """Give the backbone in memory the widths of `structure`, and `merged` updates, whatever it had before.

    Without these, `Structure.full` restores the very tensors that were loaded. LoRA around a Linear, if any, is not
    touched: `fedsim.learn.model.lora.LoraModel` keeps both in step.

    Raises:
        ValueError: `structure` does not fit the model, or leaves a layer without a group.
    """
    check_structure(backbone, structure)
    for linear in prunable_linears(backbone.shape):
        module = backbone.linears[linear.name]
        module.weight, bias = sliced_weights(backbone, linear, structure, (merged or {}).get(linear.name))
        module.bias = bias  # type: ignore[assignment]  # None where the Linear has no bias
        module.out_features, module.in_features = module.weight.shape
    keep_heads(backbone.encoder, backbone.shape, structure)
