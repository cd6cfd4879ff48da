"""Rules that average factors of unlike ranks: short ones are filled up with zero components.

`zero_pad` weighs clients by their data; `hetlora` (HETLoRA, arXiv 2401.06432) by the Frobenius norm of each client's
update. Both average ``A`` and ``B`` apart, so that the mean is not that of the updates, and the k-th component of a
high rank is shrunk by all clients that do not have it: the known bias of zero-padding, and the reason why HETLoRA
weighs large updates more.

Unspecified in the sources; we chose: components beyond the highest rank of the round hold their previous factors (zero
in both they would never get a gradient again); the norm is taken for each Linear by itself, as there each product is
one update; the head is averaged by data. HETLoRA knows no pruned backbones: a feature is averaged over the clients that
kept it, and one that nobody kept holds its previous factors, as in `average_factors`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.errors import ConfigError
from fedsim.learn.adapter import Adapter, Factors
from fedsim.learn.coverage import Coverage, concatenate, coverage_of, sides
from fedsim.learn.linears import COLUMN_PRUNED, PrunableLinear, prunable_linears
from fedsim.learn.merging import Contribution, client_weights, covered, factors_of, mean_head
from fedsim.settings import AggregateSettings
from fedsim.structure import ModelShape


def zero_pad(
    previous: Adapter,
    contributions: Sequence[Contribution],
    shape: ModelShape,
    rank_max: int,
    alpha_over_rank: float,
    settings: AggregateSettings,
) -> Adapter:
    """Data-weighted means of ``A`` and of ``B``, each padded with zeros to `rank_max`.

    Raises:
        ConfigError: a client's rank is above the global adapter's.
    """
    _check_ranks(contributions, previous, settings.rule)
    weights = client_weights(contributions, settings.importance_weight)
    factors = {
        linear.name: _padded_mean(linear, previous, contributions, coverage)
        for linear, coverage in covered(previous, contributions, weights, shape)
    }
    return Adapter(factors, mean_head(previous, contributions, weights))


def hetlora(
    previous: Adapter,
    contributions: Sequence[Contribution],
    shape: ModelShape,
    rank_max: int,
    alpha_over_rank: float,
    settings: AggregateSettings,
) -> Adapter:
    """`zero_pad` with weights ``||B_i A_i||_F`` in the data's place (HETLoRA's sparsity-weighted aggregation).

    Raises:
        ConfigError: a client's rank is above the global adapter's.
    """
    _check_ranks(contributions, previous, settings.rule)
    by_data = client_weights(contributions, settings.importance_weight)
    structures = [contribution.structure for contribution in contributions]
    ranks = np.array([contribution.adapter.rank for contribution in contributions])
    factors: dict[str, Factors] = {}
    for linear in prunable_linears(shape):
        if linear.name in previous.factors:
            device = previous.factors[linear.name][0].device
            weights = norm_weights([c.adapter.factors[linear.name] for c in contributions], by_data)
            coverage = coverage_of(linear, structures, ranks, weights, shape, device)
            factors[linear.name] = _padded_mean(linear, previous, contributions, coverage)
    return Adapter(factors, mean_head(previous, contributions, by_data))


def norm_weights(updates: Sequence[Factors], otherwise: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights proportional to ``||B_i A_i||_F``, summing to one, shape (P,); `otherwise` where all norms are zero.

    The product is never built: its squared norm is the inner product of ``B'B`` and ``A A'``.
    """
    squares = []
    for a, b in updates:
        wide_a, wide_b = a.double(), b.double()
        squares.append(((wide_b.T @ wide_b) * (wide_a @ wide_a.T)).sum())
    norms: NDArray[np.float64] = torch.stack(squares).clamp_min_(0.0).sqrt().cpu().numpy()
    return norms / norms.sum() if norms.sum() > 0.0 else otherwise


def _padded_mean(
    linear: PrunableLinear, previous: Adapter, contributions: Sequence[Contribution], coverage: Coverage
) -> Factors:
    transposed = linear.role in COLUMN_PRUNED
    old_pruned, old_whole = sides(previous.factors[linear.name], transposed)
    pruned, whole = torch.zeros_like(old_pruned), torch.zeros_like(old_whole)
    features, other = old_pruned.shape[0], old_whole.shape[1]
    highest = 0
    for chunk in coverage.chunks:
        rank = chunk.rank
        left, right = concatenate(chunk, factors_of(chunk, contributions, linear.name), transposed, pruned.device)
        pruned[:, :rank] += (left.view(features, -1, rank) * chunk.weights.unsqueeze(1)).sum(dim=1)
        whole[:rank] += right.view(-1, rank, other).sum(dim=0)
        highest = max(highest, rank)
    pruned *= coverage.reciprocal
    if coverage.held is not None:
        pruned[coverage.held] = old_pruned[coverage.held]
    pruned[:, highest:] = old_pruned[:, highest:]
    whole[highest:] = old_whole[highest:]
    b, a = (whole.T, pruned.T) if transposed else (pruned, whole)
    return a.contiguous(), b.contiguous()


def _check_ranks(contributions: Sequence[Contribution], previous: Adapter, rule: str) -> None:
    highest = max(contribution.adapter.rank for contribution in contributions)
    if highest > previous.rank:
        raise ConfigError(
            f"aggregate.rule '{rule}' pads every client's factors to the global rank {previous.rank}, but a client has "
            f"rank {highest} (allowed: at most model.lora_rank_max)"
        )
