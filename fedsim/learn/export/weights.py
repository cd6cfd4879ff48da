"""The tensors of an exported model: one structure's weights, at full or at small widths, with or without the LoRA.

Dense: rows and columns of pruned groups are zero, biases of pruned rows too. The zero columns of the attention output
and of the FFN's second projection are what makes the result equal; the zero rows before them only save space when the
file is compressed. Merged: ``W + c B A``, added in double precision and rounded once to fp32.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.learn.model.adapter import Adapter, restrict
from fedsim.learn.model.backbone import Backbone
from fedsim.learn.model.linears import PrunableLinear, kept_columns, kept_rows, prunable_linears
from fedsim.learn.model.slicing import check_structure, take
from fedsim.structure import ModelShape, Structure

Tensors = dict[str, torch.Tensor]


def encoder_tensors(
    backbone: Backbone, structure: Structure, dense: bool, merged: Adapter | None, alpha_over_rank: float
) -> Tensors:
    """All weights of the encoder by name, fp32, on the CPU.

    Args:
        backbone: without LoRA layers.
        dense: at original widths with zeros, else at small widths.
        merged: an adapter of full widths to be added to the weights; None leaves them as they are.
        alpha_over_rank: the scale c of ``dW = c B A``.
    Raises:
        ValueError: `structure` does not fit the model, or leaves a layer without a group.
    """
    check_structure(backbone, structure)
    tensors = {name: _fp32(tensor) for name, tensor in backbone.encoder.state_dict().items()}
    for linear in prunable_linears(backbone.shape):
        weight, bias = (None if one is None else _fp32(one) for one in backbone.full_weights[linear.name])
        assert weight is not None
        if merged is not None and linear.name in merged.factors:
            a, b = (factor.detach().cpu().double() for factor in merged.factors[linear.name])
            weight = (weight.double() + alpha_over_rank * (b @ a)).float()
        rows, columns = kept_rows(linear, structure, backbone.shape), kept_columns(linear, structure, backbone.shape)
        cut = _zeroed if dense else take
        tensors[f"{linear.name}.weight"] = cut(cut(weight, 0, rows), 1, columns).contiguous()
        if bias is not None:
            tensors[f"{linear.name}.bias"] = cut(bias, 0, rows).contiguous()
    return tensors


def export_adapter(adapter: Adapter, structure: Structure, shape: ModelShape, dense: bool) -> Adapter:
    """The global adapter restricted to `structure`, all its components: at small widths, or zero elsewhere."""
    small = restrict(adapter, structure, adapter.rank, shape, None)
    if not dense:
        return small
    factors = {}
    for linear in _carriers(adapter, shape):
        a, b = adapter.factors[linear.name]
        rows, columns = kept_rows(linear, structure, shape), kept_columns(linear, structure, shape)
        factors[linear.name] = (_zeroed(a, 1, columns), _zeroed(b, 0, rows))
    return Adapter(factors, small.head)


def _carriers(adapter: Adapter, shape: ModelShape) -> list[PrunableLinear]:
    return [linear for linear in prunable_linears(shape) if linear.name in adapter.factors]


def _zeroed(tensor: torch.Tensor, axis: int, indices: NDArray[np.int64] | None) -> torch.Tensor:
    """Zero but for the kept rows (axis 0) or columns (axis 1); the tensor itself where `indices` is None."""
    if indices is None:
        return tensor
    kept = torch.from_numpy(indices).to(tensor.device)
    return torch.zeros_like(tensor).index_copy(axis, kept, tensor.index_select(axis, kept))


def _fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()
