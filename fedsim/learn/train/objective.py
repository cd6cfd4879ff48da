"""Objectives, as the learning side meets them: what is trained in the form they read, and components given up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fedsim.contracts.program import Trained
from fedsim.learn.model.adapter import Adapter, restrict
from fedsim.learn.train.jobs import Job, Update
from fedsim.structure import ModelShape


def as_trained(adapter: Adapter) -> Trained:
    """One client's factors and head as views, with an axis of one client."""
    return Trained(
        {name: (a.unsqueeze(0), b.T.unsqueeze(0)) for name, (a, b) in adapter.factors.items()},
        {name: tensor.unsqueeze(0) for name, tensor in adapter.head.items()},
    )


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
