"""Adapters as named arrays, for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from fedsim.contracts.common import State
from fedsim.learn.model.adapter import Adapter


def adapter_state(adapter: Adapter, prefix: str = "") -> dict[str, np.ndarray]:
    """Factors, head and merged updates under ``A.``, ``B.``, ``head.`` and ``merged.``, each behind `prefix`."""
    arrays: dict[str, np.ndarray] = {}
    for name, (a, b) in adapter.factors.items():
        arrays[f"{prefix}A.{name}"], arrays[f"{prefix}B.{name}"] = a.cpu().numpy(), b.cpu().numpy()
    for kind, tensors in (("head", adapter.head), ("merged", adapter.merged)):
        for name, tensor in tensors.items():
            arrays[f"{prefix}{kind}.{name}"] = tensor.cpu().numpy()
    return arrays


def adapter_from(state: State, like: Adapter, prefix: str = "") -> Adapter:
    """What `adapter_state` gave, with the parameters and on the device of `like`."""
    device = next(iter(like.factors.values()))[0].device

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(state[prefix + name])).to(device)

    factors = {name: (tensor(f"A.{name}"), tensor(f"B.{name}")) for name in like.factors}
    merged: Mapping[str, torch.Tensor] = {
        name: tensor(f"merged.{name}") for name in like.factors if f"{prefix}merged.{name}" in state
    }
    return Adapter(factors, {name: tensor(f"head.{name}") for name in like.head}, merged)
