"""What every rule of the server's merge is made of: contributions, their weights, coverage, the mean of heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.learn.merge.coverage import Chunk, Coverage, concatenate, coverage_of, groups_lost
from fedsim.learn.model.adapter import Adapter
from fedsim.learn.model.linears import COLUMN_PRUNED, PrunableLinear, prunable_linears
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
        start: the global adapter of the version at dispatch; None: the present one.
        weight: the share of its difference from `start` that counts, >= 0 (staleness).
    """

    adapter: Adapter
    structure: Structure
    samples: int
    importance: float
    start: Adapter | None = None
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Merging:
    """What a rule merges.

    Attributes:
        previous: the global adapter before this round, full widths.
        contributions: the updates that arrived, at least one.
        shape: widths of the model.
        rank_max: rank of the global adapter, >= 1.
        alpha_over_rank: c of ``dW = c B A``, the same for all.
        settings: the rule's name and the weight of importance.
    """

    previous: Adapter
    contributions: Sequence[Contribution]
    shape: ModelShape
    rank_max: int
    alpha_over_rank: float
    settings: AggregateSettings

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """`client_weights` of the contributions, shape (P,)."""
        return client_weights(self.contributions, self.settings.importance_weight)

    def linears(self) -> Iterator[PrunableLinear]:
        """The adapter's Linears, in block order."""
        return (linear for linear in prunable_linears(self.shape) if linear.name in self.previous.factors)

    def covered(self) -> Iterator[tuple[PrunableLinear, Coverage]]:
        """The adapter's Linears, each with its coverage under `weights` (computed once for those that share it)."""
        shared: dict[tuple[bool, int], Coverage] = {}
        layer = -1
        for linear in self.linears():
            if linear.layer != layer:
                shared, layer = {}, linear.layer
            key = groups_lost(linear, self.shape)
            if key not in shared:
                shared[key] = self.coverage(linear, self.weights)
            yield linear, shared[key]

    def coverage(self, linear: PrunableLinear, weights: NDArray[np.float64]) -> Coverage:
        """Who kept which feature of one Linear, with these weights (P,)."""
        structures = [contribution.structure for contribution in self.contributions]
        ranks = np.array([contribution.adapter.rank for contribution in self.contributions])
        device = self.previous.factors[linear.name][0].device
        return coverage_of(linear, structures, ranks, weights, self.shape, device)

    def concatenated(self, linear: PrunableLinear, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """The chunk's factors of one Linear side by side, scattered to full size: ``(pruned, whole)``."""
        factors = [self.contributions[client].adapter.factors[linear.name] for client in chunk.clients]
        device = self.previous.factors[linear.name][0].device
        return concatenate(chunk, factors, linear.role in COLUMN_PRUNED, device)

    def mean_head(self) -> Mapping[str, torch.Tensor]:
        """Weighted mean of every head parameter: never pruned, so one weight for all entries."""
        mean: dict[str, torch.Tensor] = {}
        shares = torch.from_numpy(self.weights.astype(np.float32))
        for name, old in self.previous.head.items():
            total, step = torch.zeros_like(old), max(1, _HEAD_ELEMENTS // old.numel())
            for start in range(0, len(self.contributions), step):
                some = self.contributions[start : start + step]
                stacked = torch.stack([c.adapter.head[name] for c in some]).to(old.device)
                total += torch.tensordot(shares[start : start + step].to(stacked), stacked, dims=1)
            mean[name] = total
        return mean


Rule = Callable[[Merging], Adapter]
"""A way to merge: the new global adapter, of full widths, fp32, on the previous adapter's device."""


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
