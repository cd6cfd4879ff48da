"""The reference engine: one PEFT model, one client after another. Slow and obvious: the oracle of the faster ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice

import numpy as np
import torch

from fedsim.contracts.common import Outcome
from fedsim.contracts.program import Objective, Trained
from fedsim.learn.model.adapter import Adapter, restrict
from fedsim.learn.model.lora import LoraModel
from fedsim.learn.train.batches import IGNORED, Batch, batch_stream, fixed_batch
from fedsim.learn.train.evaluate import Measured, each_once
from fedsim.learn.train.importance import GroupScores, lora_importance, smooth
from fedsim.learn.train.jobs import PROBE_SAMPLES, ClientData, Job, TrainRule, Update, set_rate, target_structure
from fedsim.learn.train.objective import GradientMean, as_trained, gradient, objective_of
from fedsim.structure import Structure


class ReferenceTrainer:
    """Implements `Trainer` on one PEFT model that takes each client's structure and adapter in turn."""

    def __init__(self, model: LoraModel, data: ClientData, rule: TrainRule) -> None:
        self._model, self._data, self._rule = model, data, rule

    def train(self, jobs: Sequence[Job]) -> list[Update]:
        """One update per job, in order."""
        return [self._train_one(job) for job in jobs]

    def _train_one(self, job: Job) -> Update:
        model, request, rule = self._model, job.request, self._rule
        program = request.program
        key = (rule.seed, request.client, request.flight)
        first = restrict(job.adapter, job.start, request.rank, model.backbone.shape, key)
        model.load(job.start, first)
        indices = self._data.parts[request.client]
        device = model.backbone.device
        probe = fixed_batch(self._data.text, indices, PROBE_SAMPLES, rule.seed, request.client, device)
        stream = batch_stream(
            self._data.text, indices, rule.batch_size, rule.seed, request.client, request.flight, device
        )
        loss_before = self._probe_loss(probe)
        optimizer = torch.optim.AdamW(model.parameters_list(), lr=program.phases[0].rate, weight_decay=0.0, fused=True)
        structure, scores, start = job.start, job.scores, as_trained(first)
        objective, gradients = objective_of([job]), GradientMean([job])
        step, outcome, importance = 0, Outcome.OK, float("nan")
        for phase in program.phases:
            if phase.cut_before:
                structure = self._prune(job, structure, scores, optimizer)
                start = as_trained(restrict(job.adapter, structure, request.rank, model.backbone.shape, key))
            set_rate(optimizer, phase.rate)
            for batch in islice(stream, phase.steps):
                step += 1
                estimates = phase.estimate and step % rule.importance_every == 0
                optimizer.zero_grad(set_to_none=True)
                with model.watching() if estimates and self._watches else nullcontext():
                    loss = _cross_entropy(model.logits(batch), batch.labels)
                if not math.isfinite(float(loss.detach())):
                    outcome = Outcome.NON_FINITE
                    break
                self._penalised(loss, objective, start).backward()
                if estimates:
                    scores = self._estimate(scores)
                if step == program.steps:
                    importance = lora_importance(model)
                if phase.trains:
                    gradients.add(self._gradients)
                    optimizer.step()
            if outcome != Outcome.OK:
                break
        loss_after = self._probe_loss(probe) if outcome == Outcome.OK else float("nan")
        if outcome == Outcome.OK and not (math.isfinite(loss_after) and math.isfinite(importance)):
            outcome = Outcome.NON_FINITE
        update = Update(
            adapter=model.read(),
            structure=structure,
            scores=scores,
            samples=len(indices),
            loss_before=loss_before,
            loss_after=loss_after,
            lora_importance=importance,
            outcome=outcome,
        )
        return gradients.remembered(0, update)

    def _now(self) -> Adapter:
        """The trained parameters themselves."""
        model = self._model
        head = {name: model.backbone.model.get_parameter(name) for name in model.backbone.head_names}
        return Adapter({linear.name: model.factors(linear.name) for linear in model.targets}, head)

    def _gradients(self) -> Trained:
        now = self._now()
        head = {name: gradient(tensor) for name, tensor in now.head.items()}
        return as_trained(Adapter({name: (gradient(a), gradient(b)) for name, (a, b) in now.factors.items()}, head))

    def _penalised(self, loss: torch.Tensor, objective: Objective | None, start: Trained) -> torch.Tensor:
        """The loss with the objective's penalty, if any."""
        if objective is None:
            return loss
        now = as_trained(self._now())
        penalty: torch.Tensor = objective.penalty(now, start, np.array([next(now.tensors()).shape[1]]))
        return loss + penalty.squeeze(0)

    @property
    def _watches(self) -> bool:
        criterion = self._rule.criterion
        return criterion is not None and criterion.watches

    def _estimate(self, scores: GroupScores | None) -> GroupScores | None:
        criterion = self._rule.criterion
        if criterion is None or criterion.estimate is None:
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
