"""Local training of many clients at once; implements `fedsim.learn.train.jobs.Trainer`.

The algorithm is the reference trainer's (`fedsim.learn.train.jobs`), step for step; results agree to rounding. One
AdamW runs over the stacked tensors (it is elementwise), the losses of all clients are added, and as no client's tensor
enters another's loss, a client whose gradients are not finite spoils nobody else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

import torch

from fedsim.contracts.common import IntArray, Outcome
from fedsim.contracts.program import Trained
from fedsim.learn.cohort.forward import CohortModel
from fedsim.learn.cohort.pack import PackedBatch, pack
from fedsim.learn.cohort.plan import ChunkPlan, cohorts
from fedsim.learn.cohort.scores import CohortScores, find_estimate, lora_importance_cohort
from fedsim.learn.cohort.stack import Base, CohortStack, Member
from fedsim.learn.train.batches import fixed_samples, sample_stream
from fedsim.learn.train.jobs import PROBE_SAMPLES, ClientData, Job, TrainRule, Update, set_rate, target_structure
from fedsim.learn.train.objective import GradientMean, gradient, objective_of


class CohortTrainer:
    """Trains pending jobs in chunks of clients.

    Args:
        base: frozen weights and LoRA's places, masked or sliced.
        plan: how many clients make a chunk.
    Raises:
        ConfigError: a criterion that cannot be estimated for a cohort.
    """

    def __init__(self, model: CohortModel, base: Base, data: ClientData, rule: TrainRule, plan: ChunkPlan) -> None:
        self._model, self._base, self._data, self._rule = model, base, data, rule
        self._plan = plan
        self._estimate = find_estimate(rule.criterion)

    def train(self, jobs: Sequence[Job]) -> list[Update]:
        """One update per job, in order."""
        updates: dict[int, Update] = {}

        def work(chunk: Sequence[int]) -> None:
            updates.update(zip(chunk, self._train_chunk([jobs[place] for place in chunk]), strict=True))

        for places in cohorts(jobs):
            self._plan.run(places, work)
        return [updates[place] for place in range(len(jobs))]

    def _train_chunk(self, jobs: Sequence[Job]) -> list[Update]:
        rule, program = self._rule, jobs[0].request.program
        members = [
            Member(job.adapter, job.start, job.request.rank, (rule.seed, job.request.client, job.request.flight))
            for job in jobs
        ]
        stack = CohortStack(self._base, members)
        probe = self._pack(
            [
                fixed_samples(self._data.parts[job.request.client], PROBE_SAMPLES, rule.seed, job.request.client)
                for job in jobs
            ]
        )
        loss_before = self._probe(stack, probe)
        stack.require_grad()
        optimizer = torch.optim.AdamW(stack.trained, lr=program.phases[0].rate, weight_decay=0.0, fused=True)
        objective, gradients = objective_of(jobs), GradientMean(jobs)
        start = None if objective is None else stack.at_start()
        structures = [job.start for job in jobs]
        scores = CohortScores.of([job.scores for job in jobs], stack.widths)
        estimated, step = False, 0
        finite = torch.ones(len(jobs), dtype=torch.bool, device=self._base.backbone.device)
        importance = torch.full((len(jobs),), float("nan"), dtype=torch.float64)
        batches = iter(self._batches(jobs, program.steps))
        for phase in program.phases:
            if phase.cut_before:
                own = [
                    scores.client(place) if estimated or job.scores is not None else None
                    for place, job in enumerate(jobs)
                ]
                structures = [
                    target_structure(job, structure, score, self._base.backbone.shape, rule.selection)
                    for job, structure, score in zip(jobs, structures, own, strict=True)
                ]
                stack.prune(structures, optimizer)
                start = None if objective is None else stack.at_start()
            set_rate(optimizer, phase.rate)
            for batch in islice(batches, phase.steps):
                step += 1
                optimizer.zero_grad(set_to_none=True)
                estimates = phase.estimate and step % rule.importance_every == 0
                stack.watched = {} if estimates and rule.criterion is not None and rule.criterion.watches else None
                losses = self._model.losses(batch, stack)
                finite &= losses.detach().isfinite()
                if objective is not None and start is not None:
                    losses = losses + objective.penalty(stack.now(), start, stack.ranks)
                losses.sum().backward()
                if self._estimate is not None and estimates:
                    scores = scores.smoothed(self._estimate(stack), steps=rule.importance_every)
                    estimated = True
                if step == program.steps:
                    importance = lora_importance_cohort(stack)
                if phase.trains:
                    gradients.add(lambda: Trained(stack.factors, stack.head).mapped(gradient))
                    optimizer.step()
        stack.watched = None
        loss_after = self._probe(stack, probe)
        updates = self._updates(
            jobs, stack, scores if estimated else None, (loss_before, loss_after, importance, finite)
        )
        return [gradients.remembered(place, update) for place, update in enumerate(updates)]

    def _updates(
        self,
        jobs: Sequence[Job],
        stack: CohortStack,
        scores: CohortScores | None,
        measured: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> list[Update]:
        # The only wait for the device beside the scores': everything at once.
        before, after, importance, finite = torch.stack([value.double().cpu() for value in measured]).tolist()
        updates = []
        for place, (job, adapter) in enumerate(zip(jobs, stack.read(), strict=True)):
            whole = bool(finite[place]) and math.isfinite(after[place]) and math.isfinite(importance[place])
            updates.append(
                Update(
                    adapter=adapter,
                    structure=stack.structures[place],
                    scores=job.scores if scores is None else scores.client(place),
                    samples=len(self._data.parts[job.request.client]),
                    loss_before=before[place],
                    loss_after=after[place] if finite[place] else float("nan"),
                    lora_importance=importance[place] if finite[place] else float("nan"),
                    outcome=Outcome.OK if whole else Outcome.NON_FINITE,
                )
            )
        return updates

    def _batches(self, jobs: Sequence[Job], steps: int) -> list[PackedBatch]:
        """Every step's batch, sent ahead so that a card never waits for the host."""
        streams = [
            islice(
                sample_stream(
                    self._data.parts[job.request.client],
                    self._rule.batch_size,
                    self._rule.seed,
                    job.request.client,
                    job.request.flight,
                ),
                steps,
            )
            for job in jobs
        ]
        return [self._pack(samples) for samples in zip(*streams, strict=True)]

    def _pack(self, samples: Sequence[IntArray]) -> PackedBatch:
        return pack(self._data.text, samples, self._model.pack_rule, self._base.backbone.device, self._base.dtype)

    @torch.no_grad()
    def _probe(self, stack: CohortStack, probe: PackedBatch) -> torch.Tensor:
        return self._model.losses(probe, stack)
