"""What a device does in one local job: phases of steps, and an objective. Given by the method, and read by all.

Both trainers play a `LocalProgram`, the cost model prices it, and learners that train nothing read its dose. A method
that trains otherwise is another program: nothing about it is known elsewhere.

Tensors are only passed on here (`Tensor` is torch's where something is trained). An objective is written in a tensor's
own methods and operators, ``((a - b) ** 2).sum(dim=(1, 2))``, so that its file loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from fedsim.contracts.common import IntArray
from fedsim.errors import ConfigError

Tensor = Any
"""A torch tensor, in a file that need not load torch."""


@dataclass(frozen=True, eq=False)
class Trained:
    """What clients train, stacked over C clients that are trained together (1 in the reference trainer).

    Attributes:
        factors: LoRA by the Linear's name: ``A (C, rank, d_in)`` and ``B' (C, rank, d_out)``, which is B transposed.
            Zero where a client keeps no such feature, or has no such component: ranks and widths are the largest of
            the C clients'.
        head: the trained head by parameter name, ``(C, ...)``.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    head: Mapping[str, Tensor]

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor: A and B' of each Linear in order, then the head's."""
        for a, b in self.factors.values():
            yield a
            yield b
        yield from self.head.values()

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Trained:
        """Every tensor changed."""
        return Trained(
            {name: (change(a), change(b)) for name, (a, b) in self.factors.items()},
            {name: change(tensor) for name, tensor in self.head.items()},
        )

    def combined(self, other: Trained, change: Callable[[Tensor, Tensor], Tensor]) -> Trained:
        """Every tensor made of this one's and its counterpart in `other`."""
        factors = {}
        for name, (a, b) in self.factors.items():
            other_a, other_b = other.factors[name]
            factors[name] = change(a, other_a), change(b, other_b)
        return Trained(factors, {name: change(tensor, other.head[name]) for name, tensor in self.head.items()})

    def pairs(self, other: Trained) -> Iterator[tuple[Tensor, Tensor]]:
        """Every tensor with its counterpart in `other`."""
        yield from zip(self.tensors(), other.tensors(), strict=True)


@dataclass(frozen=True)
class ExtraCost:
    """What an objective asks of a device beyond plain training, each per trained weight (LoRA and head).

    Attributes:
        flops: operations of one step.
        memory_bytes: bytes moved by one step.
        peak_memory_bytes: held throughout the job.
        download_bytes, upload_bytes: traffic of one job.
    """

    flops: float = 0.0
    memory_bytes: float = 0.0
    peak_memory_bytes: float = 0.0
    download_bytes: float = 0.0
    upload_bytes: float = 0.0


NO_EXTRA_COST = ExtraCost()


class Objective(Protocol):
    """What is minimised beside the mean loss of a batch.

    Hashable (a frozen dataclass is): jobs with equal programs are trained together. It may say ``extra_cost``, an
    `ExtraCost`; without it, its arithmetic is counted as nothing.
    """

    def penalty(self, now: Trained, start: Trained, ranks: IntArray) -> Tensor:
        """What each client's loss gets on top, ``(C,)``, differentiable in `now`.

        Args:
            now: what is trained, as it stands.
            start: the same as the job began, cut to what is kept now; it gets no gradient.
            ranks: each client's LoRA rank, (C,).
        """


class ResizingObjective(Objective, Protocol):
    """An objective after whose jobs a client may give up LoRA components."""

    def ranks_after(self, now: Trained, start: Trained, ranks: IntArray) -> IntArray:
        """The rank that each client keeps, (C,), from 1 to its own: its first components stay. As `penalty` else."""


class RememberingObjective(Objective, Protocol):
    """An objective with memory: tensors like the trained ones, one set of the server's and one of each client's.

    All begin at zero. Those of a client are kept once its update was merged. What is remembered belongs to the global
    adapter's own factors: nothing may be pruned, and every client has the global rank.
    """

    def carried(self, shared: Trained, own: Trained) -> Trained:
        """What one client takes along in a job, from the server's set and its own (C = 1, as all sets here)."""

    def carrying(self, carried: Trained) -> Objective:
        """What C clients minimise that took this along."""

    def kept(self, carried: Trained, gradient: Trained, now: Trained, start: Trained) -> Trained:
        """A client's new set after a job.

        Args:
            carried: what it took along.
            gradient: mean over the steps that train, of the loss with the penalty.
            now, start: what was trained, after the job and before it.
        """

    def merged(self, shared: Trained, change: Trained, clients: int) -> Trained:
        """The server's new set, given the sum of what merged clients changed in theirs, and the size of the fleet."""


@dataclass(frozen=True)
class Phase:
    """Steps of a job that go alike.

    Attributes:
        steps: >= 0.
        rate: learning rate.
        estimate: whether importance is estimated in these steps: in each whose number, counted from 1 over the whole
            job, is a multiple of ``prune.importance_every``.
        cut_before: whether the structure shrinks to the asked ratio before the first step; a last phase without steps
            is a cut at the end of the job.
        trains: False: forward and backward passes that change no weight.
    """

    steps: int
    rate: float
    estimate: bool = False
    cut_before: bool = False
    trains: bool = True

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"a phase of {self.steps} steps is not allowed (at least 0)")
        if not (math.isfinite(self.rate) and self.rate >= 0.0):
            raise ConfigError(f"a phase's learning rate of {self.rate} is not allowed (a number, at least 0)")


@dataclass(frozen=True)
class LocalProgram:
    """A local job, the same for all who are sent off together.

    Attributes:
        phases: in order, with one step at least among them, and at most one cut.
        objective: None: the loss alone.
    """

    phases: tuple[Phase, ...]
    objective: Objective | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError("a local program has no steps (at least 1, over all of its phases)")
        if sum(phase.cut_before for phase in self.phases) > 1:
            raise ConfigError("a local program cuts more than once (at most one phase may say cut_before)")
        try:
            hash(self.objective)
        except TypeError:
            raise ConfigError(
                f"the objective {type(self.objective).__name__} cannot be hashed (make it a frozen dataclass)"
            ) from None

    @cached_property
    def steps(self) -> int:
        """Local steps of the job."""
        return sum(phase.steps for phase in self.phases)

    @property
    def cuts(self) -> bool:
        """Whether the structure may change within the job."""
        return any(phase.cut_before for phase in self.phases)

    @property
    def estimates(self) -> bool:
        """Whether importance is estimated."""
        return any(phase.estimate and phase.steps for phase in self.phases)

    @property
    def dose(self) -> float:
        """Sum of the learning rates of all steps; 0 of those that do not train."""
        by_rate: dict[float, int] = {}
        for phase in self.phases:
            rate = phase.rate if phase.trains else 0.0
            by_rate[rate] = by_rate.get(rate, 0) + phase.steps
        # Like steps in two phases are one product, as in a job of one phase.
        return sum(rate * steps for rate, steps in by_rate.items())

    @property
    def rate(self) -> float:
        """Mean learning rate of all steps; 0 of those that do not train."""
        rates = {phase.rate if phase.trains else 0.0 for phase in self.phases if phase.steps}
        return rates.pop() if len(rates) == 1 else self.dose / self.steps


def extra_cost(objective: Objective | None) -> ExtraCost:
    """What the objective says that it asks of a device."""
    cost = getattr(objective, "extra_cost", NO_EXTRA_COST)
    if not isinstance(cost, ExtraCost):
        raise ConfigError(f"the objective {type(objective).__name__} has an extra_cost that is no fedsim ExtraCost")
    return cost
