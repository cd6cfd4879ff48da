"""What every rule of the server's merge is made of: contributions, their weights, coverage, the mean of heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.learn.adapter import Adapter, Factors
from fedsim.learn.coverage import Chunk, Coverage, coverage_of, groups_lost
from fedsim.learn.linears import PrunableLinear, prunable_linears
from fedsim.settings import AggregateSettings
from fedsim.structure import ModelShape, Structure

_HEAD_ELEMENTS = 1 << 22
"""Room for heads side by side: 16 MB."""


@dataclass(frozen=True, eq=False)
class Contribution:
    """One client's share in a merge.

    Attributes:
        adapter: factors with the widths of `structure`, any rank; the head.
        structure: the groups that the client keeps now.
        samples: its training samples, >= 1.
        importance: its LoRA importance, mean ``|B * grad B|``, >= 0, in any unit common to the round.
    """

    adapter: Adapter
    structure: Structure
    samples: int
    importance: float


class Rule(Protocol):
    """A way to merge; arguments and result as in `merge`, contributions never empty and checked."""

    def __call__(
        self,
        previous: Adapter,
        contributions: Sequence[Contribution],
        shape: ModelShape,
        rank_max: int,
        alpha_over_rank: float,
        settings: AggregateSettings,
    ) -> Adapter: ...


def client_weights(contributions: Sequence[Contribution], importance_weight: float) -> NDArray[np.float64]:
    """Weights ``w_i`` proportional to ``n_i (1 + importance_weight h_i)``, summing to one, shape (P,).

    ``h_i`` is the importance over the largest of the round (0 where all are 0). With `importance_weight` 0 the
    weights are the samples' and importance is not looked at.
    """
    weights = np.array([c.samples for c in contributions], dtype=np.float64)
    if importance_weight > 0.0:
        importance = np.array([c.importance for c in contributions], dtype=np.float64)
        if not np.all(np.isfinite(importance) & (importance >= 0.0)):
            raise ValueError("importance of a contribution must be finite and not negative")
        largest = importance.max()
        weights *= 1.0 + importance_weight * (importance / largest if largest > 0.0 else importance)
    return weights / weights.sum()


def factors_of(chunk: Chunk, contributions: Sequence[Contribution], name: str) -> list[Factors]:
    """Each client's factors of one Linear, in the order of the chunk."""
    return [contributions[client].adapter.factors[name] for client in chunk.clients]


def covered(
    previous: Adapter, contributions: Sequence[Contribution], weights: NDArray[np.float64], shape: ModelShape
) -> Iterator[tuple[PrunableLinear, Coverage]]:
    """The adapter's Linears in block order, each with its coverage (computed once for those that share it)."""
    structures = [contribution.structure for contribution in contributions]
    ranks = np.array([contribution.adapter.rank for contribution in contributions])
    shared: dict[tuple[bool, int], Coverage] = {}
    layer = -1
    for linear in prunable_linears(shape):
        if linear.name not in previous.factors:
            continue
        if linear.layer != layer:
            shared, layer = {}, linear.layer
        key = groups_lost(linear, shape)
        if key not in shared:
            device = previous.factors[linear.name][0].device
            shared[key] = coverage_of(linear, structures, ranks, weights, shape, device)
        yield linear, shared[key]


def mean_head(
    previous: Adapter, contributions: Sequence[Contribution], weights: NDArray[np.float64]
) -> Mapping[str, torch.Tensor]:
    """Weighted mean of every head parameter: never pruned, so one weight for all entries."""
    mean: dict[str, torch.Tensor] = {}
    shares = torch.from_numpy(weights.astype(np.float32))
    for name, old in previous.head.items():
        total, step = torch.zeros_like(old), max(1, _HEAD_ELEMENTS // old.numel())
        for start in range(0, len(contributions), step):
            stacked = torch.stack([c.adapter.head[name] for c in contributions[start : start + step]]).to(old.device)
            total += torch.tensordot(shares[start : start + step].to(stacked), stacked, dims=1)
        mean[name] = total
    return mean
