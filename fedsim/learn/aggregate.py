"""The server's merge of LoRA updates whose ranks and structures differ.

`lowrank`, FedSpine's aggregation (arXiv 2501.02438; the weights and the treatment of rows that nobody kept are our
reconstruction): rebuild every device's update ``dW_i = c B_i A_i``, scatter it to full size by the indices that the
device kept, average, and truncate the mean to a low rank as FlexLoRA does (arXiv 2402.11505).

Every prunable Linear loses rows only (query, key, value, gate, up) or columns only (attention output, down), so the
weight that divides an entry depends on its row (or column) alone and the mean is

    mean dW = diag(1 / W) sum_i w_i scatter(dW_i) + (previous dW on the rows that nobody kept),

a product of concatenated factors again. Columns are rows of the transpose; below, the *pruned* side is the one that
loses features (``B`` of a row-pruned layer, ``A'`` of a column-pruned one) and the *whole* side is the other. Where
the concatenated rank is small the product is never built (`fedsim.learn.lowrank`); else it is accumulated in chunks of
clients. Either way the memory beside the updates is that of one layer's full matrix and a fixed buffer, and four bytes
per client and feature of one layer. Clients of one rank go through each step together: no tensor operation is done
client by client, and nothing waits for the device.

Consequence to know: the truncation is of the whole matrix. Rows that nobody kept hold their previous value exactly
in the mean, but after the truncation only as far as `rank_max` components carry it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.errors import ConfigError, unknown
from fedsim.learn.adapter import Adapter, Factors
from fedsim.learn.linears import PrunableLinear, Role, group_width, prunable_linears
from fedsim.learn.lowrank import factored_is_cheaper, truncated_svd_dense, truncated_svd_factored
from fedsim.settings import AggregateSettings
from fedsim.structure import ModelShape, Structure

_BUFFER_ELEMENTS = 1 << 18
"""Least room for concatenated factors: 1 MB, so that small layers are not merged client by client."""
_COLUMN_PRUNED = (Role.ATTENTION_OUT, Role.DOWN)
_HEADS = (Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUT)


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


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Clients of one rank whose factors are laid side by side: component ``i * rank + k`` is client i's k-th.

    Attributes:
        clients: places among the contributions.
        rank: LoRA rank of each.
        weights: shape (clients,), fp32.
        rows: shape (features * clients,): for each feature and client the row of the clients' concatenated pruned
            sides that goes there, or the row behind the last (zeros) where the client lost the feature. None where all
            clients kept all.
    """

    clients: Sequence[int]
    rank: int
    weights: torch.Tensor
    rows: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class _Coverage:
    """Who keeps which features of the pruned side, for all Linears that lose the same groups.

    Attributes:
        chunks: the clients, in chunks that fit the buffer.
        reciprocal: shape (features, 1), 1 / summed weight of the clients that kept a feature, 0 where none did.
        held: indices that nobody kept; None where there are none.
    """

    chunks: Sequence[_Chunk]
    reciprocal: torch.Tensor
    held: torch.Tensor | None


def merge(
    previous: Adapter,
    contributions: Sequence[Contribution],
    shape: ModelShape,
    rank_max: int,
    alpha_over_rank: float,
    settings: AggregateSettings,
) -> Adapter:
    """Merge the clients' updates into a new global adapter.

    Args:
        previous: the global adapter before this round, full widths.
        contributions: the updates that arrived; with none the previous adapter stays.
        shape: widths of the model.
        rank_max: rank of the global adapter (`lowrank`), >= 1.
        alpha_over_rank: c of ``dW = c B A``, the same before and after, so that it cancels where the mean is linear.
        settings: the rule's name and the weight of importance.
    Returns:
        Adapter of full widths, fp32, on the previous adapter's device.
    Raises:
        ConfigError: unknown rule, or a rule that cannot merge these ranks.
        ValueError: a contribution that does not fit the model, or has no samples.
    """
    rule = find_rule(settings.rule)
    if not contributions:
        return previous
    _check(previous, contributions, shape)
    return rule(previous, contributions, shape, rank_max, alpha_over_rank, settings)


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


def lowrank(
    previous: Adapter,
    contributions: Sequence[Contribution],
    shape: ModelShape,
    rank_max: int,
    alpha_over_rank: float,
    settings: AggregateSettings,
) -> Adapter:
    """Masked weighted mean of the updates, truncated to `rank_max` (FedSpine, arXiv 2501.02438). See the module.

    The new factors satisfy ``c B A = mean dW`` up to the truncation, with ``B A = U S V'`` split evenly. Components
    beyond the mean's own rank have zero columns of ``B`` and keep the previous adapter's rows of ``A``: the product is
    the mean's, and a device that gets them can train them (with both zero they would never get a gradient).
    """
    weights = client_weights(contributions, settings.importance_weight)
    factors: dict[str, Factors] = {}
    for linear, coverage in _covered(previous, contributions, weights, shape):
        transposed = linear.role in _COLUMN_PRUNED
        pruned, whole = _mean_update(linear.name, transposed, previous, contributions, coverage, rank_max)
        b, a = (whole.T, pruned.T) if transposed else (pruned, whole)
        a, b, old_a = a.contiguous(), b.contiguous(), previous.factors[linear.name][0]
        end = min(rank_max, old_a.shape[0])
        a[:end] = torch.where(b[:, :end].any(dim=0).unsqueeze(1), a[:end], old_a[:end])
        factors[linear.name] = (a, b)
    return Adapter(factors, _mean_head(previous, contributions, weights))


def average_factors(
    previous: Adapter,
    contributions: Sequence[Contribution],
    shape: ModelShape,
    rank_max: int,
    alpha_over_rank: float,
    settings: AggregateSettings,
) -> Adapter:
    """Weighted means of ``A`` and of ``B``, apart (FedIT, arXiv 2305.05644); the result has the clients' rank.

    The mean of products is not the product of means: unlike `lowrank` this is exact for one client only. Pruned
    features are averaged over the clients that kept them; features that nobody kept hold their previous factors.

    Raises:
        ConfigError: ranks differ between clients, or from the previous adapter's where its features must be held.
    """
    ranks = {c.adapter.rank for c in contributions}
    if len(ranks) > 1:
        raise ConfigError(
            f"aggregate.rule 'average_factors' needs one LoRA rank for all clients, got ranks "
            f"{', '.join(map(str, sorted(ranks)))}; use 'lowrank' for mixed ranks"
        )
    weights = client_weights(contributions, settings.importance_weight)
    factors: dict[str, Factors] = {}
    for linear, coverage in _covered(previous, contributions, weights, shape):
        transposed = linear.role in _COLUMN_PRUNED
        old_pruned, old_whole = _sides(previous.factors[linear.name], transposed)
        (rank,), (features, other) = ranks, (old_pruned.shape[0], old_whole.shape[1])
        pruned, whole = old_pruned.new_zeros((features, rank)), old_whole.new_zeros((rank, other))
        for chunk in coverage.chunks:
            left, right = _concatenate(chunk, contributions, linear.name, transposed, pruned.device)
            pruned += (left.view(features, -1, rank) * chunk.weights.unsqueeze(1)).sum(dim=1)
            whole += right.view(-1, rank, other).sum(dim=0)
        pruned *= coverage.reciprocal
        if coverage.held is not None:
            if old_pruned.shape[1] != rank:
                raise ConfigError(
                    f"aggregate.rule 'average_factors' cannot hold pruned features of a global adapter of rank "
                    f"{old_pruned.shape[1]} beside clients of rank {rank}; use one rank for all, or 'lowrank'"
                )
            pruned[coverage.held] = old_pruned[coverage.held]
        b, a = (whole.T, pruned.T) if transposed else (pruned, whole)
        factors[linear.name] = (a.contiguous(), b.contiguous())
    return Adapter(factors, _mean_head(previous, contributions, weights))


RULES: dict[str, Rule] = {"lowrank": lowrank, "average_factors": average_factors}
"""Aggregation rules by the name in ``aggregate.rule``. Register a rule of your own by adding an entry."""


def find_rule(name: str) -> Rule:
    """The rule called `name`.

    Raises:
        ConfigError: there is none.
    """
    if name not in RULES:
        raise ConfigError(unknown("aggregate.rule", name, RULES))
    return RULES[name]


def _sides(factors: Factors, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``(pruned (features, rank), whole (rank, other))`` of one Linear's ``(A, B)``."""
    a, b = factors
    return (a.T, b.T) if transposed else (b, a)


def _mean_update(
    name: str,
    transposed: bool,
    previous: Adapter,
    contributions: Sequence[Contribution],
    coverage: _Coverage,
    rank_max: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Truncated factors ``(pruned, whole)`` of the masked mean of one Linear's ``B A`` (transposed if asked)."""
    old_pruned, old_whole = _sides(previous.factors[name], transposed)
    features, other, held = old_pruned.shape[0], old_whole.shape[1], coverage.held
    rank_sum = sum(chunk.rank * len(chunk.clients) for chunk in coverage.chunks)
    parts = (_concatenate(chunk, contributions, name, transposed, old_pruned.device) for chunk in coverage.chunks)

    if factored_is_cheaper(features, other, rank_sum + (old_whole.shape[0] if held is not None else 0)):
        left, right = zip(*parts, strict=True)
        pruned, whole = torch.cat(left, dim=1) * coverage.reciprocal, torch.cat(right)
        if held is not None:
            old_rows = torch.zeros_like(old_pruned)
            old_rows[held] = old_pruned[held]
            pruned, whole = torch.cat([pruned, old_rows], dim=1), torch.cat([whole, old_whole])
        return truncated_svd_factored(pruned, whole, rank_max)

    mean = old_pruned.new_zeros((features, other))
    for pruned, whole in parts:
        mean.addmm_(pruned, whole)
    mean *= coverage.reciprocal
    if held is not None:
        mean[held] = old_pruned[held] @ old_whole
    return truncated_svd_dense(mean, rank_max)


def _concatenate(
    chunk: _Chunk, contributions: Sequence[Contribution], name: str, transposed: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(pruned (features, R), whole (R, other))`` whose product is the weighted sum of the clients' updates.

    The weights are in `whole`.
    """
    pairs = [contributions[client].adapter.factors[name] for client in chunk.clients]
    lefts = [a.T for a, _ in pairs] if transposed else [b for _, b in pairs]
    whole = torch.cat([b for _, b in pairs], dim=1).T if transposed else torch.cat([a for a, _ in pairs])
    if chunk.rows is None:
        pruned = torch.cat(lefts, dim=1).to(device)
    else:
        filled = torch.cat([*lefts, lefts[0].new_zeros((1, chunk.rank))]).to(device)
        pruned = filled.index_select(0, chunk.rows).view(-1, whole.shape[0])
    return pruned, whole.to(device) * chunk.weights.repeat_interleave(chunk.rank).unsqueeze(1)


def _covered(
    previous: Adapter, contributions: Sequence[Contribution], weights: NDArray[np.float64], shape: ModelShape
) -> Iterator[tuple[PrunableLinear, _Coverage]]:
    """The adapter's Linears in block order, each with its coverage (computed once for those that share it)."""
    shared: dict[tuple[bool, int], _Coverage] = {}
    layer = -1
    for linear in prunable_linears(shape):
        if linear.name not in previous.factors:
            continue
        if linear.layer != layer:
            shared, layer = {}, linear.layer
        key = (linear.role in _HEADS, group_width(linear, shape))
        if key not in shared:
            shared[key] = _coverage(linear, contributions, weights, shape, previous.factors[linear.name][0].device)
        yield linear, shared[key]


def _coverage(
    linear: PrunableLinear,
    contributions: Sequence[Contribution],
    weights: NDArray[np.float64],
    shape: ModelShape,
    device: torch.device,
) -> _Coverage:
    is_head, width = linear.role in _HEADS, group_width(linear, shape)
    masks = [c.structure.head_mask if is_head else c.structure.channel_mask for c in contributions]
    kept = np.repeat(np.stack([mask[linear.layer] for mask in masks]), width, axis=1)
    total = np.where(kept, weights[:, None], 0.0).sum(axis=0)
    held = np.flatnonzero(total == 0.0)
    reciprocal = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0.0)
    return _Coverage(
        chunks=list(_chunks(kept, np.array([c.adapter.rank for c in contributions]), weights, shape.hidden, device)),
        reciprocal=torch.from_numpy(reciprocal.astype(np.float32)).to(device).unsqueeze(1),
        held=torch.from_numpy(held).to(device) if len(held) else None,
    )


def _chunks(
    kept: NDArray[np.bool_], ranks: NDArray[np.int64], weights: NDArray[np.float64], other: int, device: torch.device
) -> Iterator[_Chunk]:
    """Clients of equal rank in chunks whose factors fill at most the size of the full matrix (a client at least).

    Args:
        kept: shape (P, features).
        other: width of the whole side (every prunable Linear has the hidden width on that side).
    """
    features = kept.shape[1]
    limit = max(features * other, _BUFFER_ELEMENTS)
    for rank in np.unique(ranks).tolist():
        members = np.flatnonzero(ranks == rank)
        step = max(1, limit // (rank * (features + other)))
        for start in range(0, len(members), step):
            clients = members[start : start + step]
            yield _Chunk(
                clients.tolist(),
                rank,
                torch.from_numpy(weights[clients].astype(np.float32)).to(device),
                _rows(kept[clients], device),
            )


def _rows(kept: NDArray[np.bool_], device: torch.device) -> torch.Tensor | None:
    """`_Chunk.rows` of the clients whose kept features are the rows of `kept`."""
    if kept.all():
        return None
    ends = np.cumsum(kept, dtype=np.int32).reshape(kept.shape)
    rows = np.where(kept, ends - 1, ends[-1, -1]).T
    return torch.from_numpy(np.ascontiguousarray(rows).ravel()).to(device)


def _mean_head(
    previous: Adapter, contributions: Sequence[Contribution], weights: NDArray[np.float64]
) -> Mapping[str, torch.Tensor]:
    """Weighted mean of every head parameter: never pruned, so one weight for all entries."""
    mean: dict[str, torch.Tensor] = {}
    for name, old in previous.head.items():
        total = torch.zeros_like(old)
        for contribution, weight in zip(contributions, weights.tolist(), strict=True):
            total.add_(contribution.adapter.head[name].to(old.device), alpha=weight)
        mean[name] = total
    return mean


def _check(previous: Adapter, contributions: Sequence[Contribution], shape: ModelShape) -> None:
    """Refuse contributions that do not belong to this model: mistakes of a caller, not of a user."""
    foreign = set(previous.factors) - {linear.name for linear in prunable_linears(shape)}
    if foreign:
        raise ValueError(f"the global adapter has factors for {sorted(foreign)[0]!r}, which {shape.name} does not have")
    for position, contribution in enumerate(contributions):
        if contribution.samples < 1:
            raise ValueError(f"contribution {position}: samples must be at least 1, got {contribution.samples}")
        if contribution.adapter.factors.keys() != previous.factors.keys():
            raise ValueError(f"contribution {position}: its adapter covers other layers than the global adapter")
        if contribution.adapter.head.keys() != previous.head.keys():
            raise ValueError(f"contribution {position}: its head has other parameters than the global head")
