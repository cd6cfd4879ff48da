"""Local training of one client after another: slow, obvious, on a PEFT model. The oracle of every faster engine.

One local job (FedSpine, arXiv 2501.02438): tau steps of AdamW on LoRA and head; after each backward pass the importance
of every group is estimated and averaged; before the last ``recovery_steps`` steps the least important groups go.

Unspecified in the paper; we chose: AdamW without weight decay, started afresh each round, its moments sliced with the
weights; importance every ``importance_every``-th step with a decay to match; the loss before and after on a fixed
probe batch of the client; |B * grad B| from the last step's gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fedsim.learn.adapter import Adapter
from fedsim.learn.batches import Batch, EncodedText, batch_stream, fixed_batch
from fedsim.learn.importance import Criterion, GroupScores, lora_importance, smooth
from fedsim.learn.lora import LoraModel, restrict
from fedsim.learn.selection import select
from fedsim.specs import IntArray, LocalRequest, Outcome
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
    """

    request: LocalRequest
    adapter: Adapter
    start: Structure
    scores: GroupScores | None
    guide: GroupScores | None
    mask: Structure | None = None


@dataclass(frozen=True, eq=False)
class Update:
    """What a trained client sends: its adapter at the widths of `structure`, and its averaged group scores."""

    adapter: Adapter
    structure: Structure
    scores: GroupScores | None
    samples: int
    loss_before: float
    loss_after: float
    lora_importance: float
    outcome: Outcome


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


class ReferenceTrainer:
    """Implements `Trainer` on one PEFT model that takes each client's structure and adapter in turn."""

    def __init__(self, model: LoraModel, data: ClientData, rule: TrainRule) -> None:
        self._model, self._data, self._rule = model, data, rule

    def train(self, jobs: Sequence[Job]) -> list[Update]:
        """One update per job, in order."""
        return [self._train_one(job) for job in jobs]

    def _train_one(self, job: Job) -> Update:
        model, request = self._model, job.request
        key = (self._rule.seed, request.client, request.round_index)
        model.load(job.start, restrict(job.adapter, job.start, request.rank, model.backbone.shape, key))
        indices = self._data.parts[request.client]
        device = model.backbone.device
        probe = fixed_batch(self._data.text, indices, PROBE_SAMPLES, self._rule.seed, request.client, device)
        stream = batch_stream(
            self._data.text,
            indices,
            self._rule.batch_size,
            self._rule.seed,
            request.client,
            request.round_index,
            device,
        )
        loss_before = self._probe_loss(probe)
        optimizer = torch.optim.AdamW(model.parameters_list(), lr=request.learning_rate, weight_decay=0.0, fused=True)
        structure, scores = job.start, job.scores
        prune_at = request.local_steps - request.recovery_steps
        outcome, importance = Outcome.OK, float("nan")
        for step in range(request.local_steps):
            if request.prune and step == prune_at:
                structure = self._prune(job, structure, scores, optimizer)
            optimizer.zero_grad(set_to_none=True)
            batch = next(stream)
            loss = torch.nn.functional.cross_entropy(model.logits(batch), batch.labels)
            if not math.isfinite(float(loss.detach())):
                outcome = Outcome.NON_FINITE
                break
            loss.backward()
            scores = self._estimate(scores, step)
            if step == request.local_steps - 1:
                importance = lora_importance(model)
            optimizer.step()
        if request.prune and outcome == Outcome.OK and prune_at == request.local_steps:
            structure = self._prune(job, structure, scores, optimizer)
        loss_after = self._probe_loss(probe) if outcome == Outcome.OK else float("nan")
        if outcome == Outcome.OK and not (math.isfinite(loss_after) and math.isfinite(importance)):
            outcome = Outcome.NON_FINITE
        return Update(
            adapter=model.read(),
            structure=structure,
            scores=scores,
            samples=len(indices),
            loss_before=loss_before,
            loss_after=loss_after,
            lora_importance=importance,
            outcome=outcome,
        )

    def _estimate(self, scores: GroupScores | None, step: int) -> GroupScores | None:
        criterion, every = self._rule.criterion, self._rule.importance_every
        if criterion is None or criterion.estimate is None or (step + 1) % every != 0:
            return scores
        return smooth(scores, criterion.estimate(self._model), steps=every)

    def _prune(
        self, job: Job, structure: Structure, scores: GroupScores | None, optimizer: torch.optim.Optimizer
    ) -> Structure:
        target = target_structure(job, structure, scores, self._model.backbone.shape, self._rule.selection)
        if not target.same_as(structure):
            self._model.prune_with_optimizer(target, optimizer)
        return target

    @torch.no_grad()
    def _probe_loss(self, probe: Batch) -> float:
        return float(torch.nn.functional.cross_entropy(self._model.logits(probe), probe.labels))


def target_structure(
    job: Job, structure: Structure, scores: GroupScores | None, shape: ModelShape, selection: str
) -> Structure:
    """What a job shrinks `structure` to: its ready mask, or its ratio by the guide or the client's own average."""
    if job.mask is not None:
        return job.mask.within(structure)
    guide = job.guide if job.guide is not None else scores
    if guide is None:
        raise RuntimeError(f"client {job.request.client} is to prune, but no importance was ever estimated")
    return select(guide, structure, shape, job.request.ratio_target, selection)
