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
from fedsim.learn.merge.coverage import Coverage, sides
from fedsim.learn.merge.merging import Merging
from fedsim.learn.model.adapter import Adapter, Factors
from fedsim.learn.model.linears import COLUMN_PRUNED, PrunableLinear


def zero_pad(merging: Merging) -> Adapter:
    """Data-weighted means of ``A`` and of ``B``, each padded with zeros to `rank_max`.

    Raises:
        ConfigError: a client's rank is above the global adapter's.
    """
    ranks_within(merging)
    factors = {linear.name: _padded_mean(merging, linear, coverage) for linear, coverage in merging.covered()}
    return Adapter(factors, merging.mean_head())


def hetlora(merging: Merging) -> Adapter:
    """`zero_pad` with weights ``||B_i A_i||_F`` in the data's place (HETLoRA's sparsity-weighted aggregation).

    Raises:
        ConfigError: a client's rank is above the global adapter's.
    """
    ranks_within(merging)
    factors: dict[str, Factors] = {}
    for linear in merging.linears():
        coverage = merging.coverage(linear, update_norms(merging, linear))
        factors[linear.name] = _padded_mean(merging, linear, coverage)
    return Adapter(factors, merging.mean_head())


def update_norms(merging: Merging, linear: PrunableLinear) -> NDArray[np.float64]:
    """`norm_weights` of the clients' updates of one Linear, shape (P,)."""
    updates = [contribution.adapter.factors[linear.name] for contribution in merging.contributions]
    return norm_weights(updates, merging.weights)


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


def _padded_mean(merging: Merging, linear: PrunableLinear, coverage: Coverage) -> Factors:
    transposed = linear.role in COLUMN_PRUNED
    old_pruned, old_whole = sides(merging.previous.factors[linear.name], transposed)
    pruned, whole = torch.zeros_like(old_pruned), torch.zeros_like(old_whole)
    features, other = old_pruned.shape[0], old_whole.shape[1]
    highest = 0
    for chunk in coverage.chunks:
        rank = chunk.rank
        left, right = merging.concatenated(linear, chunk)
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


def ranks_within(merging: Merging) -> None:
    """Refuse ranks above the global adapter's."""
    highest, widest = max(one.adapter.rank for one in merging.contributions), merging.previous.rank
    if highest > widest:
        raise ConfigError(
            f"aggregate.rule '{merging.settings.rule}' pads every client's factors to the global rank {widest}, but a "
            f"client has rank {highest} (allowed: at most model.lora_rank_max)"
        )
