"""What a policy sees and answers: work, contexts, arms, feedback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsim.contracts.common import FloatArray, IntArray, State


@dataclass(frozen=True, eq=False)
class Work:
    """What one local job asks of any device: no seconds, no device. Scalars or arrays of one common shape.

    Attributes:
        flops: floating-point operations of all local steps (1 multiply-accumulate = 2).
        memory_bytes: bytes moved to and from device memory by all local steps.
        launches: kernel launches of all local steps.
        peak_memory_bytes: highest memory use at any moment of the job.
        download_bytes, upload_bytes: traffic before and after.
    """

    flops: FloatArray
    memory_bytes: FloatArray
    launches: FloatArray
    peak_memory_bytes: FloatArray
    download_bytes: FloatArray
    upload_bytes: FloatArray


class Ask(Protocol):
    """What each arm asks, from shapes alone: known to every policy, and says nothing of any device."""

    @property
    def ranks(self) -> IntArray:
        """The LoRA ranks on offer, ascending."""

    def work(self, ratio_before: ArrayLike, ratio: ArrayLike, rank: ArrayLike) -> Work:
        """Work of a job that starts at pruning ratio `ratio_before` and ends at `ratio`; arguments broadcast."""

    def work_of_counts(
        self,
        heads_start: ArrayLike,
        channels_start: ArrayLike,
        heads_end: ArrayLike,
        channels_end: ArrayLike,
        rank: ArrayLike,
    ) -> Work:
        """Work of jobs whose layers keep unequal counts, shape (P, layers) each: ``global`` selection."""


class ExpectedTime(Protocol):
    """The true time of a round without its jitter: for the `oracle` policy only."""

    def __call__(self, round_index: int, clients: IntArray, work: Work) -> FloatArray:
        """Seconds from dispatch to the end of upload. `work` may have more trailing axes than `clients`."""


@dataclass(frozen=True, eq=False)
class RoundContext:
    """What a policy knows when it chooses.

    Attributes:
        round_index: merges so far, 0-based.
        clients: those to be sent off, shape (P,).
        ratio_before: each one's cumulative pruning ratio, as last asked.
        ratio_low, ratio_high: feasible cumulative ratios of this round (irreversibility, step limit, floor, cap).
        schedule_ratio: where the fleet mean should be after this round.
        ratio_max: the highest ratio any device may ever reach (the cap of the arm space).
        step_max: the largest rise of a device's ratio in one participation.
        others: how many clients of the fleet are not sent off now.
        others_offset: sum over them of how far their last arm stood from the schedule of its time.
    """

    round_index: int
    clients: IntArray
    ratio_before: FloatArray
    ratio_low: FloatArray
    ratio_high: FloatArray
    schedule_ratio: float
    ratio_max: float
    step_max: float
    others: int = 0
    others_offset: float = 0.0


@dataclass(frozen=True, eq=False)
class Arms:
    """A policy's choice: cumulative pruning ratio to reach and LoRA rank, shape (P,)."""

    ratio: FloatArray
    rank: IntArray


@dataclass(frozen=True, eq=False)
class Feedback:
    """What a policy learns with a merge, shape (P,). Under an asynchronous server a client may be there twice.

    Attributes:
        work: what each job asked (no device).
        time_s: measured from dispatch to the end of upload, with the round's own jitter; NaN where not `arrived`.
        arrived: whether the client's update reached the server in time.
        reward: in [0, 1]; NaN where not `arrived`.
    """

    round_index: int
    clients: IntArray
    ratio_before: FloatArray
    ratio: FloatArray
    rank: IntArray
    work: Work
    time_s: FloatArray
    arrived: NDArray[np.bool_]
    reward: FloatArray


@dataclass(frozen=True, eq=False)
class Rewards:
    """Rewards of one round and what they were made of, shape (P,).

    Attributes:
        reward: in [0, 1]; NaN where nothing was trained.
        loss: relative loss reduction over its running 90th percentile, in [0, 1].
        progress: rise of the asked ratio over the largest allowed, in [0, 1].
        importance: LoRA importance over the largest of the round, in [0, 1].
        time: the factor in (0, 1] that punishes a time far from the round's mean.
            A term is NaN where it was out of use, for one client or for all.
    """

    reward: FloatArray
    loss: FloatArray
    progress: FloatArray
    importance: FloatArray
    time: FloatArray

    @classmethod
    def none(cls, count: int) -> Rewards:
        """Of `count` clients from which nothing came."""
        return cls(*(np.full(count, np.nan) for _ in range(5)))


@runtime_checkable
class Policy(Protocol):
    """Chooses arms for the participants of a round; its state is arrays over all clients."""

    def select(self, context: RoundContext) -> Arms:
        """Choose; every ratio within the feasible bounds, every rank on offer."""

    def update(self, feedback: Feedback) -> None:
        """Learn from the whole round."""

    def state(self) -> State:
        """Arrays for the checkpoint."""

    def restore(self, state: State) -> None:
        """Take the arrays of a checkpoint."""
