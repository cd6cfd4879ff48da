"""FedScale's cost formula as a clock: blind to what a method tunes, prunes and sends.

FedScale (Lai et al., ICML 2022, arXiv 2105.11367; `Client.getCompletionTime` of its client manager) takes for a job
``3 x batch size x local steps x inference latency of a sample`` and for traffic ``model size / bandwidth`` each way.
The latency is here the cost model's forward pass of the whole clock's model on the device (FedScale reads a phone's
from a table); there is no memory, no importance, no cut, and the whole model travels, whatever the arm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from fedsim.contracts.common import IntArray
from fedsim.contracts.control import Work
from fedsim.cost.setting import StepSetting
from fedsim.cost.workload import TRAINED_BYTES, step_work
from fedsim.structure import ModelShape

AUGMENTATION = 3.0
"""FedScale's factor from inference to training."""


class FedScaleAsk:
    """Work of every arm: the same (implements `fedsim.contracts.control.Ask`).

    Args:
        ranks: LoRA ranks on offer, ascending; none costs more than another.
    """

    def __init__(self, clock_shape: ModelShape, step: StepSetting, local_steps: int, ranks: Sequence[int]) -> None:
        forward = replace(step, tuning="inference", lora_roles=None, train_top_layers=None)
        once = step_work(clock_shape, [1.0], [1.0], 0, forward)
        times = AUGMENTATION * local_steps
        model = np.asarray(TRAINED_BYTES * float(clock_shape.all_weights))
        self._work = Work(
            times * once.flops, times * once.memory_bytes, times * once.launches, np.zeros(()), model, model
        )
        self._ranks = np.array(ranks, dtype=np.int64)

    @property
    def ranks(self) -> IntArray:
        """The LoRA ranks on offer, ascending."""
        return self._ranks.copy()

    def work(self, ratio_before: ArrayLike, ratio: ArrayLike, rank: ArrayLike) -> Work:
        """The one work, in the shape to which the arguments broadcast."""
        shape = np.broadcast_shapes(np.shape(ratio_before), np.shape(ratio), np.shape(rank))
        return Work(**{name: np.broadcast_to(value, shape) for name, value in vars(self._work).items()})

    def work_of_counts(
        self,
        heads_start: ArrayLike,
        channels_start: ArrayLike,
        heads_end: ArrayLike,
        channels_end: ArrayLike,
        rank: ArrayLike,
    ) -> Work:
        """The same, for layers that keep unequal counts."""
        shape = np.broadcast_shapes(np.shape(heads_start)[:-1], np.shape(heads_end)[:-1], np.shape(rank))
        return self.work(np.zeros(shape), 0.0, rank)
