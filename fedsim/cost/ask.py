"""What a local job asks: the work of its steps, importance estimates, change of structure, and its traffic.

A *learner's shape* says which pruning ratios can be achieved (its head groups and channels are whole numbers); a
*clock's shape* says how much work that is. The learner's kept fractions, layer by layer, are applied to the clock's.

A job runs the steps before its cut at one structure, its start, and the others at another, its end. What it asks is the
sum of what is spent at each, its peak the larger of theirs. Where all layers keep as much, what is spent at a structure
is linear in the two kept fractions, and these in the rank: six numbers price it for a whole fleet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.contracts.control import Work
from fedsim.contracts.program import NO_EXTRA_COST, ExtraCost, LocalProgram, extra_cost
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
from fedsim.structure import ModelShape, kept_counts


@dataclass(frozen=True)
class Share:
    """What a job runs at one of its structures: steps that train, passes that change no weight, and the importance
    estimates among both."""

    steps: int
    passes: int
    estimates: int


@dataclass(frozen=True)
class JobSetting:
    """What costs something in a local program, whatever its arm.

    Attributes:
        start, end: before the cut, and after it.
        step: how one step is run.
        estimates: whether importance is estimated at all: it needs room throughout.
        sends_scores: whether group scores travel with the upload.
        extra: what the objective asks on top.
        importance_memory: what an importance is held of between estimates: each ``group``, or each ``weight``.
    """

    start: Share
    end: Share
    step: StepSetting
    estimates: bool
    sends_scores: bool
    extra: ExtraCost = NO_EXTRA_COST
    importance_memory: Literal["group", "weight"] = "group"

    @property
    def trains(self) -> bool:
        """Whether any step changes a weight: an optimizer's moments then take room throughout."""
        return self.start.steps + self.end.steps > 0

    @classmethod
    def of(
        cls,
        program: LocalProgram,
        step: StepSetting,
        importance_every: int | None,
        sends_scores: bool,
        importance_memory: Literal["group", "weight"] = "group",
    ) -> JobSetting:
        """From a program.

        Args:
            importance_every: local steps per importance estimate; None where an estimate costs nothing.
            sends_scores: whether a job that estimates sends its scores.
            importance_memory: of what an importance is held.
        """
        if importance_every is not None and importance_every < 1:
            raise ConfigError(f"importance_every is {importance_every}; it must be at least 1")
        # One that never cuts has one structure; it is divided as if its last phase followed a cut, so that rounds with
        # and without a cut add up alike to the last digit.
        places = [place for place, phase in enumerate(program.phases) if phase.cut_before]
        cut = places[0] if places else len(program.phases) - 1
        shares, first = [], 0
        for phases in (program.phases[:cut], program.phases[cut:]):
            steps = passes = estimates = 0
            for phase in phases:
                last = first + phase.steps
                if phase.estimate and importance_every is not None:
                    estimates += last // importance_every - first // importance_every
                steps += phase.steps if phase.trains else 0
                passes += 0 if phase.trains else phase.steps
                first = last
            shares.append(Share(steps, passes, estimates))
        return cls(
            start=shares[0],
            end=shares[1],
            step=step,
            estimates=importance_every is not None and program.estimates,
            sends_scores=sends_scores and program.estimates,
            extra=extra_cost(program.objective),
            importance_memory=importance_memory,
        )


@dataclass(frozen=True, eq=False)
class _Spent:
    """What is spent at one structure of a job; arrays that broadcast to one shape.

    Attributes:
        flops, memory_bytes, launches, peak_memory_bytes: of the steps and importance estimates run at it.
        traffic_bytes: of sending it one way.
        slicing_bytes: bytes moved if the device has to change its structure to this one.
    """

    flops: FloatArray
    memory_bytes: FloatArray
    launches: FloatArray
    peak_memory_bytes: FloatArray
    traffic_bytes: FloatArray
    slicing_bytes: FloatArray


@dataclass(frozen=True)
class _Price:
    """``fixed + heads h + channels c + rank (per_rank + rank_heads h + rank_channels c)``, h and c kept fractions."""

    fixed: float
    heads: float
    channels: float
    per_rank: float
    rank_heads: float
    rank_channels: float

    @classmethod
    def of_corners(cls, corners: FloatArray) -> _Price:
        """From the values at `_CORNERS`."""
        origin, heads, channels, rank, rank_heads, rank_channels = map(float, corners)
        step = rank - origin
        return cls(
            origin, heads - origin, channels - origin, step, rank_heads - heads - step, rank_channels - channels - step
        )

    def at(self, heads: FloatArray, channels: FloatArray, rank: FloatArray) -> FloatArray:
        """The value; arguments broadcast."""
        structure = self.fixed + self.heads * heads + self.channels * channels
        if self.per_rank == self.rank_heads == self.rank_channels == 0.0:
            return structure
        return structure + rank * (self.per_rank + self.rank_heads * heads + self.rank_channels * channels)


_CORNERS = np.array([[0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 1], [0, 0, 0, 1, 1, 1]], dtype=np.float64)
"""Points (kept heads, kept channels, rank) that a `_Price` is read from; fractions of zero are no structure, but the
counting rules extend to them."""


@dataclass(frozen=True)
class _Prices:
    """Prices of the fields of `_Spent`, in their order."""

    prices: tuple[_Price, ...]

    @classmethod
    def of(cls, spent: Callable[[FloatArray, FloatArray, FloatArray], _Spent]) -> _Prices:
        """Read from what `spent` (heads, channels: last axis layers; rank) says at the corners."""
        heads, channels, rank = _CORNERS
        corners = spent(heads[:, None], channels[:, None], rank)
        values = [np.broadcast_to(getattr(corners, field.name), rank.shape) for field in fields(_Spent)]
        return cls(tuple(_Price.of_corners(value) for value in values))

    def at(self, heads: FloatArray, channels: FloatArray, rank: FloatArray) -> _Spent:
        """What is spent; arguments broadcast."""
        return _Spent(*(price.at(heads, channels, rank) for price in self.prices))


class ShapeAsk:
    """Work of every arm, from shapes alone (implements `fedsim.contracts.control.Ask`).

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
        self._start_prices = _Prices.of(self._spent_at_start)
        self._end_prices = _Prices.of(self._spent_at_end)

    @property
    def ranks(self) -> IntArray:
        """The LoRA ranks on offer, ascending."""
        return self._ranks.copy()

    def work(self, ratio_before: ArrayLike, ratio: ArrayLike, rank: ArrayLike) -> Work:
        """Work of a job that starts at pruning ratio `ratio_before` and ends at `ratio`; arguments broadcast.

        Every layer keeps as many groups (``layer_local``). A device whose ratio falls grows back at dispatch, and
        runs all its steps at the end structure.
        """
        groups, ffn = self._learner.head_groups, self._learner.ffn
        heads_before, channels_before = kept_counts(self._learner, ratio_before)
        heads, channels = kept_counts(self._learner, ratio)
        changes = (heads_before != heads) | (channels_before != channels)
        rank = np.asarray(rank, dtype=np.float64)
        # Fewer groups are kept the higher the ratio, so that the start is the larger of both structures.
        start = self._start_prices.at(
            np.maximum(heads_before, heads) / groups, np.maximum(channels_before, channels) / ffn, rank
        )
        end = self._end_prices.at(heads / groups, channels / ffn, rank)
        return self._job_work(start, end, changes, rank)

    def peaks(self, ratio_before: ArrayLike, ratio: ArrayLike, rank: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Peak memory of a job that cuts, in bytes: while it cuts (its larger structure), and after the cut."""
        during = self.work(ratio_before, ratio, rank).peak_memory_bytes
        return during, self.work(ratio, ratio, rank).peak_memory_bytes

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
        changes = ((start[0] != end[0]) | (start[1] != end[1])).any(axis=-1)
        return self._job_work(self._spent_at_start(*start, rank), self._spent_at_end(*end, rank), changes, rank)

    def _spent_at_start(self, heads: FloatArray, channels: FloatArray, rank: ArrayLike) -> _Spent:
        """What comes before the cut, and the download; kept fractions ``(..., clock layers)`` or ``(..., 1)``."""
        kept = kept_sums(self._clock, self._job.step, heads, channels)
        download = self._update_bytes(kept, rank) + self._job.extra.download_bytes * self._trained(kept, rank)
        return self._spent(kept, rank, self._job.start, download)

    def _spent_at_end(self, heads: FloatArray, channels: FloatArray, rank: ArrayLike) -> _Spent:
        """What follows the cut, and the upload with the scores of the kept groups where they are sent.

        A job that does not change its structure runs the same steps here as if it had no cut.
        """
        job, shape = self._job, self._clock
        kept = kept_sums(shape, job.step, heads, channels)
        upload = self._update_bytes(kept, rank) + job.extra.upload_bytes * self._trained(kept, rank)
        if job.sends_scores:
            upload = upload + TRAINED_BYTES * (kept.heads_all * shape.head_groups + kept.channels_all * shape.ffn)
        return self._spent(kept, rank, job.end, upload)

    def _spent(self, kept: KeptSums, rank: ArrayLike, share: Share, traffic_bytes: FloatArray) -> _Spent:
        shape, setting, extra = self._clock, self._job.step, self._job.extra
        step = work_of_sums(shape, kept, rank, setting)
        flops, moved, launches = share.steps * step.flops, share.steps * step.memory_bytes, share.steps * step.launches
        if share.passes:
            one = work_of_sums(shape, kept, rank, replace(setting, optimizer="none"))
            flops = flops + share.passes * one.flops
            moved = moved + share.passes * one.memory_bytes
            launches = launches + share.passes * one.launches
            step = step if self._job.trains else one
        peak = step.peak_memory_bytes
        if self._job.estimates:
            estimate = importance_work(shape, kept, rank)
            flops = flops + share.estimates * estimate.flops
            moved = moved + share.estimates * estimate.memory_bytes
            launches = launches + share.estimates * estimate.launches
            peak = peak + estimate.peak_memory_bytes
            if self._job.importance_memory == "weight":
                peak = peak + TRAINED_BYTES * block_weights(shape, kept.heads_all, kept.channels_all)
        if extra != NO_EXTRA_COST:
            trained = self._trained(kept, rank)
            flops = flops + share.steps * extra.flops * trained
            moved = moved + share.steps * extra.memory_bytes * trained
            peak = peak + extra.peak_memory_bytes * trained
        slicing = slicing_work(shape, block_weights(shape, kept.heads_all, kept.channels_all), setting.precision)
        return _Spent(flops, moved, launches, peak, traffic_bytes, slicing.memory_bytes)

    def _job_work(self, start: _Spent, end: _Spent, changes: NDArray[np.bool_], rank: ArrayLike) -> Work:
        """The sum of both structures' shares, and of changing from one to the other where the device does."""
        slicing = slicing_work(self._clock, np.zeros(()), self._job.step.precision)
        work = (
            start.flops + end.flops,
            start.memory_bytes + end.memory_bytes + changes * end.slicing_bytes,
            start.launches + end.launches + changes * slicing.launches,
            np.maximum(start.peak_memory_bytes, end.peak_memory_bytes),
            start.traffic_bytes,
            end.traffic_bytes,
        )
        return Work(*np.broadcast_arrays(*work, np.asarray(rank))[:6])

    def _update_bytes(self, kept: KeptSums, rank: ArrayLike) -> FloatArray:
        """LoRA of the targeted Linears' kept rows and columns and the classification head, fp32, one way."""
        return TRAINED_BYTES * self._trained(kept, rank)

    def _trained(self, kept: KeptSums, rank: ArrayLike) -> FloatArray:
        """Trained weights: LoRA of the targeted Linears' kept rows and columns, and the classification head."""
        return lora_weights(self._clock, kept, rank) + self._clock.head_weights
