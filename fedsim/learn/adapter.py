"""A LoRA adapter with its classification head, as plain tensors.

The update of a Linear is ``dW = c B A`` with ``c = alpha / r`` the same at every rank, so that ranks can be mixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

Factors = tuple[torch.Tensor, torch.Tensor]
"""``(A, B)`` of one Linear: ``A (rank, d_in_kept)``, ``B (d_out_kept, rank)``."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """LoRA factors by the Linear's name (see `fedsim.learn.linears`) and the trained head by parameter name.

    A *global* adapter has the full widths; a client's has the widths of its structure. Tensors are detached, fp32.
    """

    factors: Mapping[str, Factors]
    head: Mapping[str, torch.Tensor]

    @property
    def rank(self) -> int:
        """LoRA rank, the same for every Linear."""
        first, _ = next(iter(self.factors.values()))
        return int(first.shape[0])
