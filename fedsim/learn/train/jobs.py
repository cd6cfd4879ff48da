"""What a local job is, and what comes of it; the trainers are `fedsim.learn.train.reference` and `fedsim.learn.cohort`.

A job plays the `fedsim.contracts.program.LocalProgram` of its request with AdamW on LoRA and head: phase by phase,
each with a learning rate; after each backward pass of a phase that estimates, the importance of every group is
estimated and averaged; before a phase that cuts, the least important groups go.

Unspecified in FedSpine (arXiv 2501.02438); we chose: AdamW without weight decay, started afresh each job, its moments
kept over phases and sliced with the weights; importance every ``importance_every``-th step with a decay to match; the
loss before and after on a fixed probe batch of the client; |B * grad B| from the last step's gradients, and importance,
of the loss with the objective's penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fedsim.contracts.common import IntArray, Outcome
from fedsim.contracts.learning import LocalRequest
from fedsim.contracts.program import RememberingObjective, Trained
from fedsim.learn.model.adapter import Adapter
from fedsim.learn.train.batches import EncodedText
from fedsim.learn.train.importance import Criterion, GroupScores
from fedsim.learn.train.selection import select
from fedsim.structure import ModelShape, Structure

PROBE_SAMPLES = 8
"""Samples of the fixed probe batch on which a job's loss is measured before and after."""


@dataclass(frozen=True, eq=False)
class Job:
    """A local job with everything it reads, frozen at dispatch.

    Attributes:
        adapter: the global adapter of the state version at dispatch.
        start: the structure the job starts with.
        scores: the client's averaged group scores so far; None before the first estimate, or for a static criterion.
        guide: scores that choose the groups in the place of the client's own (a static criterion's).
        mask: the ready structure to shrink to (common structure); None to choose by scores.
        carried: what the client takes along for an objective with memory, C = 1; None for any other.
    """

    request: LocalRequest
    adapter: Adapter
    start: Structure
    scores: GroupScores | None
    guide: GroupScores | None
    mask: Structure | None = None
    carried: Trained | None = None


@dataclass(frozen=True, eq=False)
class Remembered:
    """The set of tensors that a client keeps for an objective with memory, C = 1."""

    objective: RememberingObjective
    kept: Trained


@dataclass(frozen=True, eq=False)
class Update:
    """What a trained client sends: its adapter at the widths of `structure`, and its averaged group scores.

    Attributes:
        start: the global adapter of the version at dispatch, as the server knows it; None: not known.
        remembered: what it leaves to an objective with memory; None where the job carried nothing.
    """

    adapter: Adapter
    structure: Structure
    scores: GroupScores | None
    samples: int
    loss_before: float
    loss_after: float
    lora_importance: float
    outcome: Outcome
    start: Adapter | None = None
    remembered: Remembered | None = None


@dataclass(frozen=True)
class TrainRule:
    """What all jobs of a run share.

    Attributes:
        criterion: how groups are scored; None where the method never prunes.
        importance_every: local steps per estimate.
        selection: ``prune.selection``.
    """

    seed: int
    batch_size: int
    criterion: Criterion | None
    importance_every: int
    selection: str


@dataclass(frozen=True, eq=False)
class ClientData:
    """The encoded training text and each client's sample numbers."""

    text: EncodedText
    parts: tuple[IntArray, ...]


class Trainer(Protocol):
    """Trains local jobs; jobs of one call may be trained together, with the same results as one by one."""

    def train(self, jobs: Sequence[Job]) -> list[Update]:
        """One update per job, in order."""


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Go on at another learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def target_structure(
    job: Job, structure: Structure, scores: GroupScores | None, shape: ModelShape, selection: str
) -> Structure:
    """What a job shrinks `structure` to: its ready mask, or its ratio by the guide or the client's own average."""
    if job.mask is not None:
        return job.mask.within(structure)
    guide = job.guide if job.guide is not None else scores
    if guide is None:
        raise RuntimeError(f"client {job.request.client} is to prune, but no importance was ever estimated")
    return select(guide, structure, shape, job.request.ratio_asked, selection)
