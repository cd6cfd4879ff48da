"""What a training step of any torch module demands, by counting what PyTorch dispatches while it runs once.

Operations are those of `torch.utils.flop_counter`; bytes are those of every operation's tensors, read and written once;
launches are the operations that are no views. Peak memory is not counted: it is the caller's to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fedsim.cost.workload import StepWork


class _Traffic(TorchDispatchMode):
    """Counts bytes and launches of every operation that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        moved = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        if not getattr(func, "is_view", False) and moved:
            self.launches += 1
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in moved)
        return out


def counted_step(step: Callable[[], Any], peak_memory_bytes: float = 0.0) -> StepWork:
    """Run `step` once (forward, backward and update of a module, or any part of that) and count what it demanded.

    Args:
        peak_memory_bytes: of the step, where a fleet's memory is to be asked; 0: it fits anywhere.
    Raises:
        ValueError: nothing was computed.
    """
    traffic = _Traffic()
    with FlopCounterMode(display=False) as counter, traffic:
        step()
    if not traffic.launches:
        raise ValueError("the step computed nothing")
    numbers = (float(counter.get_total_flops()), float(traffic.bytes), float(traffic.launches), peak_memory_bytes)
    return StepWork(*(np.asarray(number) for number in numbers))
