"""Rank self-pruning (HETLoRA, arXiv 2401.06432): a client gives up LoRA components that its data does not want.

A client of rank r keeps ``floor(gamma r)`` components for sure (one at least); those behind them are its *tail*. While
it trains, its loss carries ``weight * sum over Linears ||A_tail||_F ||B_tail||_F``; if that sum is smaller after the
job than before it, the tail is dropped, and the client's rank is the smaller one from then on. After a cut both sums
are over the rows and columns that are left.

The paper judges each Linear by itself; here all Linears of a client share one rank, hence the sums (our choice).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from fedsim.contracts.common import IntArray
from fedsim.learn.model.adapter import Adapter, Factors, restrict
from fedsim.learn.train.jobs import Job, Update
from fedsim.structure import ModelShape


def kept_rank(rank: int, decay: float) -> int:
    """Components that a client of `rank` keeps in any case, >= 1."""
    return max(1, int(decay * rank + 1e-9))


def tail_norm(pairs: Sequence[Factors], decay: float) -> torch.Tensor:
    """Sum over Linears of ``||A_tail|| ||B_tail||``, a scalar with gradients (zero where a norm is zero).

    Args:
        pairs: ``(A (r, i), B (o, r))`` of each Linear.
    """
    total = torch.zeros((), dtype=pairs[0][0].dtype, device=pairs[0][0].device)
    for a, b in pairs:
        keep = kept_rank(a.shape[0], decay)
        total = total + torch.linalg.vector_norm(a[keep:]) * torch.linalg.vector_norm(b[:, keep:])
    return total


def tail_norms(pairs: Sequence[Factors], ranks: IntArray, decay: float) -> torch.Tensor:
    """`tail_norm` of every client of a cohort, ``(C,)``.

    Args:
        pairs: ``(A (C, r, i), B' (C, r, o))`` of each Linear, zero beyond a client's own rank.
        ranks: each client's, shape (C,).
    """
    first, _ = pairs[0]
    places = np.arange(first.shape[1])
    own = ranks[:, None]
    keep = np.array([kept_rank(rank, decay) for rank in ranks.tolist()])[:, None]
    tail = torch.from_numpy((places >= keep) & (places < own)).to(first).unsqueeze(-1)
    total = first.new_zeros(len(own))
    for a, b in pairs:
        total = total + torch.linalg.vector_norm(a * tail, dim=(1, 2)) * torch.linalg.vector_norm(b * tail, dim=(1, 2))
    return total


@torch.no_grad()
def self_pruned(job: Job, update: Update, decay: float, seed: int, shape: ModelShape) -> Update:
    """The update, without its tail where that shrank in the job.

    Args:
        decay: gamma; 1 drops nothing.
        seed: the run's root seed, of rows beyond the global adapter's rank.
    """
    request, rank = job.request, update.adapter.rank
    keep = kept_rank(rank, decay)
    if keep == rank:
        return update
    key = (seed, request.client, request.round_index)
    start = restrict(job.adapter, update.structure, rank, shape, key)
    before, after = (tail_norm(list(one.factors.values()), decay) for one in (start, update.adapter))
    if not bool(after < before):
        return update
    factors = {name: (a[:keep].clone(), b[:, :keep].clone()) for name, (a, b) in update.adapter.factors.items()}
    return replace(update, adapter=Adapter(factors, update.adapter.head))
