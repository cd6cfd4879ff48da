"""A bias on attention by head (MPNet), when heads are pruned: each block takes the columns of the heads that it keeps.

All blocks read one bias ``(batch, heads, tokens, tokens)``, made once from the frozen table. A hook before a block's
attention narrows it; where nothing is pruned it does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedsim.families.family import HeadBias
from fedsim.families.family_catalogue import family_of
from fedsim.structure import ModelShape, Structure

_KEPT = "fedsim_kept_heads"


@dataclass(frozen=True)
class _Narrow:
    """The hook: the bias, wherever it stands among the arguments, at the kept heads."""

    bias: HeadBias

    def __call__(
        self, module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        kept: tuple[int, ...] | None = getattr(module, _KEPT)
        if kept is None:
            return None

        def narrowed(bias: torch.Tensor | None) -> torch.Tensor | None:
            return None if bias is None else bias[:, torch.tensor(kept, device=bias.device)]

        place = self.bias.place
        if len(inputs) > place:
            return (*inputs[:place], narrowed(inputs[place]), *inputs[place + 1 :]), options
        return inputs, {**options, self.bias.argument: narrowed(options.get(self.bias.argument))}


def keep_heads(encoder: nn.Module, shape: ModelShape, structure: Structure) -> None:
    """Tell every block's attention which heads it has; nothing where the family has no bias by head."""
    bias = family_of(shape).head_bias
    if bias is None:
        return
    for layer, mask in enumerate(structure.head_mask):
        reader = encoder.get_submodule(bias.reader.format(layer))
        if not hasattr(reader, _KEPT):
            reader.register_forward_pre_hook(_Narrow(bias), with_kwargs=True)
        setattr(reader, _KEPT, None if mask.all() else tuple(mask.nonzero()[0].tolist()))
        setattr(reader, bias.width, int(mask.sum()) * shape.head_dim)
