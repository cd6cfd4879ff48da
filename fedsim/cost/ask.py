"""What a local job asks: the work of its steps, importance estimates, change of structure, and its traffic.

A *learner's shape* says which pruning ratios can be achieved (its head groups and channels are whole numbers); a
*clock's shape* says how much work that is. The learner's kept fractions, layer by layer, are applied to the clock's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fedsim.cost.workload import (
    TRAINED_BYTES,
    KeptSums,
    StepSetting,
    block_weights,
    importance_work,
    kept_sums,
    lora_roles,
    lora_weights,
    slicing_work,
    work_of_sums,
)
from fedsim.errors import ConfigError
from fedsim.specs import FloatArray, IntArray, Work
from fedsim.structure import ModelShape, kept_counts


@dataclass(frozen=True)
class JobSetting:
    """A local job, whatever its arm.

    Attributes:
        local_steps: the paper's tau, >= 1.
        recovery_steps: those of the tau steps that run after pruning, in [0, local_steps].
        importance_every: local steps per importance estimate; None where the method estimates none.
        step: how one step is run.
        prunes: whether the method prunes: its group scores then travel with the upload.
    """

    local_steps: int
    recovery_steps: int
    importance_every: int | None
    step: StepSetting
    prunes: bool

    def __post_init__(self) -> None:
        if self.local_steps < 1:
            raise ConfigError(f"local_steps is {self.local_steps}; it must be at least 1")
        if not 0 <= self.recovery_steps <= self.local_steps:
            raise ConfigError(
                f"recovery_steps is {self.recovery_steps}; it must be between 0 and local_steps ({self.local_steps})"
            )
        if self.importance_every is not None and self.importance_every < 1:
            raise ConfigError(f"importance_every is {self.importance_every}; it must be at least 1")


class ShapeAsk:
    """Work of every arm, from shapes alone (implements `fedsim.specs.Ask`).

    Args:
        learner_shape: the model that is really tuned.
        clock_shape: the model whose work the simulated clock counts.
        ranks: LoRA ranks on offer, ascending, each >= 1.
    Raises:
        ConfigError: ranks that do not ascend, or LoRA on a Linear that the clock's shape does not have.
    """

    def __init__(
        self, learner_shape: ModelShape, clock_shape: ModelShape, job: JobSetting, ranks: Sequence[int]
    ) -> None:
        offered = [int(rank) for rank in ranks]
        if not offered or offered[0] < 1 or offered != sorted(set(offered)):
            raise ConfigError(f"LoRA ranks are {offered}; they must be positive and ascend")
        lora_roles(clock_shape, job.step)  # refused here, not at the first job
        self._learner = learner_shape
        self._clock = clock_shape
        self._job = job
        self._ranks = np.array(offered, dtype=np.int64)
        # Learner's layer that stands for each layer of the clock.
        self._layer_of = np.arange(clock_shape.layers) * learner_shape.layers // clock_shape.layers

    @property
    def ranks(self) -> IntArray:
        """The LoRA ranks on offer, ascending."""
        return self._ranks.copy()

    def work(self, ratio_before: ArrayLike, ratio: ArrayLike, rank: ArrayLike) -> Work:
        """Work of a job that starts at pruning ratio `ratio_before` and ends at `ratio`; arguments broadcast.

        Every layer keeps as many groups (``layer_local``). A device whose ratio falls grows back at dispatch, and
        runs all its steps at the end structure.
        """
        before = np.asarray(ratio_before, dtype=np.float64)
        after = np.asarray(ratio, dtype=np.float64)
        dispatched = kept_counts(self._learner, before)
        start = kept_counts(self._learner, np.minimum(before, after))
        end = kept_counts(self._learner, after)
        expand = self._expand
        regrown = (dispatched[0] < start[0]) | (dispatched[1] < start[1])
        return self._work(*expand(start), *expand(end), regrown, rank)

    def work_of_counts(
        self,
        heads_start: ArrayLike,
        channels_start: ArrayLike,
        heads_end: ArrayLike,
        channels_end: ArrayLike,
        rank: ArrayLike,
    ) -> Work:
        """Work of jobs whose layers differ (``global`` selection).

        Args:
            heads_start, channels_start, heads_end, channels_end: kept groups of the *learner*, shape
                ``(..., learner layers)``; the clock's layer l takes the fractions of floor(l * learner / clock).
            rank: broadcasts over the leading axes.
        """

        def fractions(counts: ArrayLike, full: int) -> FloatArray:
            return np.asarray(counts, dtype=np.float64)[..., self._layer_of] / full

        groups, ffn = self._learner.head_groups, self._learner.ffn
        start = fractions(heads_start, groups), fractions(channels_start, ffn)
        end = fractions(heads_end, groups), fractions(channels_end, ffn)
        return self._work(*start, *end, np.zeros(start[0].shape[:-1], dtype=bool), rank)

    def _expand(self, counts: tuple[IntArray, IntArray]) -> tuple[FloatArray, FloatArray]:
        heads, channels = counts
        return (heads / self._learner.head_groups)[..., None], (channels / self._learner.ffn)[..., None]

    def _work(
        self,
        heads_start: FloatArray,
        channels_start: FloatArray,
        heads_end: FloatArray,
        channels_end: FloatArray,
        regrown: np.ndarray,
        rank: ArrayLike,
    ) -> Work:
        job, shape, step = self._job, self._clock, self._job.step
        start = kept_sums(shape, step, heads_start, channels_start)
        end = kept_sums(shape, step, heads_end, channels_end)
        pruned = ((heads_start != heads_end) | (channels_start != channels_end)).any(axis=-1)
        recovery = np.where(pruned, job.recovery_steps, 0)
        first_steps = job.local_steps - recovery

        first = work_of_sums(shape, start, rank, step)
        last = work_of_sums(shape, end, rank, step)
        flops = first_steps * first.flops + recovery * last.flops
        moved = first_steps * first.memory_bytes + recovery * last.memory_bytes
        launches = first_steps * first.launches + recovery * last.launches
        peak = np.maximum(first.peak_memory_bytes, last.peak_memory_bytes)

        if job.importance_every is not None:
            # Estimates fall on every `importance_every`-th step, counted over the whole job.
            first_count = first_steps // job.importance_every
            last_count = job.local_steps // job.importance_every - first_count
            early, late = importance_work(shape, start, rank), importance_work(shape, end, rank)
            flops = flops + first_count * early.flops + last_count * late.flops
            moved = moved + first_count * early.memory_bytes + last_count * late.memory_bytes
            launches = launches + first_count * early.launches + last_count * late.launches
            peak = peak + early.peak_memory_bytes

        kept_end = block_weights(shape, end.heads_all, end.channels_all)
        change = slicing_work(shape, kept_end, step.precision)
        changes = pruned | regrown
        moved = moved + changes * change.memory_bytes
        launches = launches + changes * change.launches

        download = self._update_bytes(start, rank)
        upload = self._update_bytes(end, rank)
        if job.prunes:
            upload = upload + TRAINED_BYTES * (end.heads_all * shape.head_groups + end.channels_all * shape.ffn)
        return Work(*np.broadcast_arrays(flops, moved, launches, peak, download, upload, np.asarray(rank))[:6])

    def _update_bytes(self, kept: KeptSums, rank: ArrayLike) -> FloatArray:
        """LoRA of the targeted Linears' kept rows and columns and the classification head, fp32, one way."""
        adapter = lora_weights(self._clock, kept, rank)
        return TRAINED_BYTES * (adapter + self._clock.head_weights)
