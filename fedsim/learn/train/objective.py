"""Objectives, as the learning side meets them: what is trained in the form they read, and components given up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch

from fedsim.contracts.program import Objective, RememberingObjective, Trained
from fedsim.learn.model.adapter import Adapter, restrict
from fedsim.learn.train.jobs import Job, Remembered, Update
from fedsim.structure import ModelShape


def as_trained(adapter: Adapter) -> Trained:
    """One client's factors and head as views, with an axis of one client."""
    return Trained(
        {name: (a.unsqueeze(0), b.T.unsqueeze(0)) for name, (a, b) in adapter.factors.items()},
        {name: tensor.unsqueeze(0) for name, tensor in adapter.head.items()},
    )


def as_adapter(trained: Trained) -> Adapter:
    """What `as_trained` made of an adapter."""
    factors = {name: (a.squeeze(0), b.squeeze(0).T) for name, (a, b) in trained.factors.items()}
    return Adapter(factors, {name: tensor.squeeze(0) for name, tensor in trained.head.items()})


def remembering(objective: Objective | None) -> RememberingObjective | None:
    """The objective, if it has a memory."""
    return cast("RememberingObjective", objective) if hasattr(objective, "carrying") else None


def objective_of(jobs: Sequence[Job]) -> Objective | None:
    """What jobs of one program minimise beside their losses, with what they carry."""
    objective = jobs[0].request.program.objective
    with_memory = remembering(objective)
    sets = [job.carried for job in jobs if job.carried is not None]
    return objective if with_memory is None or not sets else with_memory.carrying(stacked(sets))


def stacked(sets: Sequence[Trained]) -> Trained:
    """The same tensors of several clients, one after another along their axis of clients."""
    first = sets[0]
    return Trained(
        {
            name: (
                torch.cat([own.factors[name][0] for own in sets]),
                torch.cat([own.factors[name][1] for own in sets]),
            )
            for name in first.factors
        },
        {name: torch.cat([own.head[name] for own in sets]) for name in first.head},
    )


def gradient(tensor: torch.Tensor) -> torch.Tensor:
    """The gradient of a trained tensor after a backward pass; zero where it has none."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


class GradientMean:
    """The mean of the gradients of the steps that train, where jobs carry something; else nothing is added up."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs, self._wanted = jobs, jobs[0].carried is not None
        self._total: Trained | None = None
        self._steps = 0

    def add(self, gradients: Callable[[], Trained]) -> None:
        """One more step."""
        if self._wanted:
            step = gradients()
            self._total = step if self._total is None else self._total.combined(step, torch.add)
            self._steps += 1

    @torch.no_grad()
    def remembered(self, place: int, update: Update) -> Update:
        """The update with what it leaves to the objective's memory."""
        job = self._jobs[place]
        objective = remembering(job.request.program.objective)
        if self._total is None or job.carried is None or objective is None:
            return update
        mean = self._total.mapped(lambda total: total[place : place + 1] / self._steps)
        kept = objective.kept(job.carried, mean, as_trained(update.adapter), as_trained(job.adapter))
        return replace(update, remembered=Remembered(objective, kept))


@torch.no_grad()
def resized(job: Job, update: Update, seed: int, shape: ModelShape) -> Update:
    """The update without the LoRA components that the job's objective gives up, if it gives up any.

    Args:
        seed: the run's root seed, of rows beyond the global adapter's rank.
    """
    request, rank = job.request, update.adapter.rank
    ranks_after = getattr(request.program.objective, "ranks_after", None)
    if ranks_after is None:
        return update
    start = restrict(job.adapter, update.structure, rank, shape, (seed, request.client, request.flight))
    keep = int(ranks_after(as_trained(update.adapter), as_trained(start), np.array([rank]))[0])
    if not 1 <= keep <= rank:
        raise ValueError(f"client {request.client}: an objective keeps {keep} components of {rank} (1 to {rank})")
    if keep == rank:
        return update
    factors = {name: (a[:keep].clone(), b[:, :keep].clone()) for name, (a, b) in update.adapter.factors.items()}
    return replace(update, adapter=Adapter(factors, update.adapter.head))
