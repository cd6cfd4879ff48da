"""The reference engine: one PEFT model, one client after another. Slow and obvious: the oracle of the faster ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from fedsim.contracts.common import Outcome
from fedsim.contracts.learning import LocalRequest
from fedsim.learn.model.adapter import Adapter, restrict
from fedsim.learn.model.lora import LoraModel
from fedsim.learn.train.batches import IGNORED, Batch, batch_stream, fixed_batch
from fedsim.learn.train.evaluate import Measured, each_once
from fedsim.learn.train.importance import GroupScores, lora_importance, smooth
from fedsim.learn.train.jobs import PROBE_SAMPLES, ClientData, Job, TrainRule, Update, target_structure
from fedsim.learn.train.self_pruning import tail_norm
from fedsim.structure import Structure


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
            with model.watching() if self._watches(request, step) else nullcontext():
                loss = _cross_entropy(model.logits(batch), batch.labels)
            if not math.isfinite(float(loss.detach())):
                outcome = Outcome.NON_FINITE
                break
            self._penalised(loss).backward()
            scores = self._estimate(request, scores, step)
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

    def _penalised(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss with the penalty of rank self-pruning, if any."""
        rule, model = self._rule, self._model
        if rule.rank_penalty == 0.0:
            return loss
        pairs = [model.factors(linear.name) for linear in model.targets]
        return loss + rule.rank_penalty * tail_norm(pairs, rule.rank_decay)

    def _estimates(self, request: LocalRequest, step: int) -> bool:
        return request.estimate and (step + 1) % self._rule.importance_every == 0

    def _watches(self, request: LocalRequest, step: int) -> bool:
        criterion = self._rule.criterion
        return criterion is not None and criterion.watches and self._estimates(request, step)

    def _estimate(self, request: LocalRequest, scores: GroupScores | None, step: int) -> GroupScores | None:
        criterion = self._rule.criterion
        if criterion is None or criterion.estimate is None or not self._estimates(request, step):
            return scores
        return smooth(scores, criterion.estimate(self._model), steps=self._rule.importance_every)

    def _prune(
        self, job: Job, structure: Structure, scores: GroupScores | None, optimizer: torch.optim.Optimizer
    ) -> Structure:
        target = target_structure(job, structure, scores, self._model.backbone.shape, self._rule.selection)
        if not target.same_as(structure):
            self._model.prune_with_optimizer(target, optimizer)
        return target

    @torch.no_grad()
    def _probe_loss(self, probe: Batch) -> float:
        return float(_cross_entropy(self._model.logits(probe), probe.labels))


class ReferenceTester:
    """Implements `Tester` on one PEFT model that takes each structure in turn."""

    def __init__(self, model: LoraModel, batches: Sequence[Batch]) -> None:
        self._model, self._batches = model, batches

    def measure(self, adapter: Adapter, structures: Sequence[Structure]) -> list[Measured]:
        """One pair per structure, in order."""
        return each_once(structures, lambda structure: self._measure_one(adapter, structure))

    @torch.no_grad()
    def _measure_one(self, adapter: Adapter, structure: Structure) -> Measured:
        model = self._model
        model.load(structure, restrict(adapter, structure, adapter.rank, model.backbone.shape, None))
        correct, loss_sum, count = 0, 0.0, 0
        for batch in self._batches:
            logits = model.logits(batch)
            correct += int((logits.argmax(dim=-1) == batch.labels).sum())
            loss_sum += float(_cross_entropy(logits, batch.labels, reduction="sum"))
            count += int((batch.labels != IGNORED).sum())
        return correct / count, loss_sum / count


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Of logits ``(batch, labels)`` and classes ``(batch,)``, or ``(batch, tokens, vocab)`` and successors."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)
