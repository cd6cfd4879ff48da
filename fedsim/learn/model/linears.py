"""The prunable Linear layers of a model: their names, and which rows and columns a structure keeps.

No tensor library here: names and index arrays only. Names are module paths inside the base encoder or decoder of the
Hugging Face model, as its family gives them, whole paths, never patterns: the suffix ``output.dense`` would also match
``attention.output.dense``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import ConfigError, unknown
from fedsim.families.family import Role
from fedsim.families.family_catalogue import family_of
from fedsim.structure import ModelShape, Structure

Targets = Literal["all"] | Sequence[str]
"""Which Linears carry LoRA: see `target_linears`."""


HEAD_ROLES = (Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUT)
"""Linears that lose head groups; the others lose channels."""

COLUMN_PRUNED = (Role.ATTENTION_OUT, Role.DOWN)
"""Linears that lose columns; the others lose rows."""


@dataclass(frozen=True)
class PrunableLinear:
    """One Linear layer ``(d_out, d_in)`` whose rows or columns belong to prunable groups."""

    name: str
    layer: int
    role: Role
    d_out: int
    d_in: int


def prunable_linears(shape: ModelShape) -> tuple[PrunableLinear, ...]:
    """All prunable Linear layers of a model, in block order."""
    family = family_of(shape)
    if family.gated != shape.gated:
        raise ValueError(f"shape '{shape.name}' is {'' if shape.gated else 'not '}gated, unlike '{family.name}'")
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {
        Role.QUERY: (queries, shape.hidden),
        Role.KEY: (keys, shape.hidden),
        Role.VALUE: (keys, shape.hidden),
        Role.ATTENTION_OUT: (shape.hidden, queries),
        Role.GATE: (shape.ffn, shape.hidden),
        Role.UP: (shape.ffn, shape.hidden),
        Role.DOWN: (shape.hidden, shape.ffn),
    }
    return tuple(
        PrunableLinear(path.format(layer), layer, role, *sizes[role])
        for layer in range(shape.layers)
        for role, path in family.linears.items()
    )


def target_linears(shape: ModelShape, targets: Targets) -> tuple[PrunableLinear, ...]:
    """The Linears that carry LoRA, in block order.

    Args:
        targets: ``all``, or names: a path inside the block (``attention.output.dense``, ``output.dense``: never more
            than that one), or a module's last name (``query``, ``q_proj``, ``dense``: all that are called so).
    Raises:
        ConfigError: no prunable Linear is called so.
    """
    linears = prunable_linears(shape)
    if targets == "all":
        return linears
    in_block = {linear.name: linear.name.split(f".{linear.layer}.", 1)[1] for linear in linears}
    allowed = {*in_block.values(), *(path.rsplit(".", 1)[-1] for path in in_block.values())}
    for target in targets:
        if target not in allowed:
            raise ConfigError(f"model.lora_targets: {unknown('name', target, allowed)}")
    if not targets:
        raise ConfigError("model.lora_targets: the list is empty (allowed: 'all' or at least one name)")
    return tuple(
        linear
        for linear in linears
        if in_block[linear.name] in targets or in_block[linear.name].rsplit(".", 1)[-1] in targets
    )


def group_width(linear: PrunableLinear, shape: ModelShape) -> int:
    """Adjacent rows (or columns) of `linear` that belong to one group: head_dim times heads of the group, or 1."""
    if linear.role in (Role.KEY, Role.VALUE):
        return shape.head_dim
    if linear.role in (Role.QUERY, Role.ATTENTION_OUT):
        return shape.head_dim * (shape.heads // shape.kv_heads)
    return 1


def _kept_features(linear: PrunableLinear, structure: Structure, shape: ModelShape) -> NDArray[np.int64] | None:
    is_head = linear.role in HEAD_ROLES
    mask = (structure.head_mask if is_head else structure.channel_mask)[linear.layer]
    if mask.all():
        return None
    return np.flatnonzero(np.repeat(mask, group_width(linear, shape)))


def kept_rows(linear: PrunableLinear, structure: Structure, shape: ModelShape) -> NDArray[np.int64] | None:
    """Indices of the output features that `structure` keeps; None when all stay."""
    if linear.role in COLUMN_PRUNED:
        return None
    return _kept_features(linear, structure, shape)


def kept_columns(linear: PrunableLinear, structure: Structure, shape: ModelShape) -> NDArray[np.int64] | None:
    """Indices of the input features that `structure` keeps; None when all stay."""
    if linear.role not in COLUMN_PRUNED:
        return None
    return _kept_features(linear, structure, shape)
