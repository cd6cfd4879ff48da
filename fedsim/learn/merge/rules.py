"""The server's merge of LoRA updates whose ranks and structures differ.

`lowrank`, FedSpine's aggregation (arXiv 2501.02438; the weights and the treatment of rows that nobody kept are our
reconstruction): rebuild every device's update ``dW_i = c B_i A_i``, scatter it to full size by the indices that the
device kept, average, and truncate the mean to a low rank as FlexLoRA does (arXiv 2402.11505).

Every prunable Linear loses rows only (query, key, value, gate, up) or columns only (attention output, down), so the
weight that divides an entry depends on its row (or column) alone and the mean is

    mean dW = diag(1 / W) sum_i w_i scatter(dW_i) + (previous dW on the rows that nobody kept),

a product of concatenated factors again. Columns are rows of the transpose; below, the *pruned* side is the one that
loses features (``B`` of a row-pruned layer, ``A'`` of a column-pruned one) and the *whole* side is the other. Where
the concatenated rank is small the product is never built (`fedsim.learn.merge.lowrank`); else it is accumulated in
chunks of clients. Either way the memory beside the updates is that of one layer's full matrix and a fixed buffer, and
four bytes per client and feature of one layer. Clients of one rank go through each step together, and the device is
waited for once per Linear at most (by the eigendecomposition's own check), never once per client.

Consequence to know: the truncation is of the whole matrix. Rows that nobody kept hold their previous value exactly
in the mean, but after the truncation only as far as `rank_max` components carry it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from fedsim.errors import ConfigError
from fedsim.learn.entries import RULES
from fedsim.learn.merge.coverage import Coverage, sides
from fedsim.learn.merge.differences import (
    ByDifferences,
    Step,
    all_current,
    by_factors,
    by_products,
    by_rule,
    by_stacks,
    checked,
)
from fedsim.learn.merge.lowrank import factored_is_cheaper, truncated_svd_dense, truncated_svd_factored, with_old_rows
from fedsim.learn.merge.merging import Contribution, Merging, Rule, client_weights
from fedsim.learn.merge.padded import hetlora, ranks_within, update_norms, zero_pad
from fedsim.learn.merge.stacked import stack
from fedsim.learn.model.adapter import Adapter, Factors
from fedsim.learn.model.linears import COLUMN_PRUNED, PrunableLinear, prunable_linears
from fedsim.registry import loaded
from fedsim.settings import AggregateSettings
from fedsim.structure import ModelShape

__all__ = [
    "RULES",
    "Contribution",
    "Merging",
    "Rule",
    "average_factors",
    "client_weights",
    "find_rule",
    "flexlora",
    "hetlora",
    "lowrank",
    "merge",
    "stack",
    "zero_pad",
]


def merge(
    previous: Adapter,
    contributions: Sequence[Contribution],
    shape: ModelShape,
    rank_max: int,
    alpha_over_rank: float,
    settings: AggregateSettings,
    step: Step = 1.0,
) -> Adapter:
    """Merge the clients' updates into a new global adapter.

    Updates of the present version, all with their full weight and a step of 1, are merged as the rule says: the result
    replaces the global adapter. Else their differences are (`fedsim.learn.merge.differences`).

    Args:
        previous: the global adapter before this round, full widths.
        contributions: the updates that arrived; with none the previous adapter stays.
        shape: widths of the model.
        rank_max: rank of the global adapter (`lowrank`), >= 1.
        alpha_over_rank: c of ``dW = c B A``, the same before and after, so that it cancels where the mean is linear.
        settings: the rule's name and the weight of importance.
        step: what is added of the mean difference: a share, or a server optimizer's answer to it.
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
    merging = Merging(previous, contributions, shape, rank_max, alpha_over_rank, settings)
    step = step if callable(step) else float(step)
    with _exact_products():
        if step == 1.0 and all_current(merging):
            return rule(merging)
        return differences_of(rule)(merging, step)


def lowrank(merging: Merging) -> Adapter:
    """Masked weighted mean of the updates, truncated to `rank_max` (FedSpine, arXiv 2501.02438). See the module.

    The new factors satisfy ``c B A = mean dW`` up to the truncation, with ``B A = U S V'`` split evenly. Components
    beyond the mean's own rank have zero columns of ``B`` and keep the previous adapter's rows of ``A``: the product is
    the mean's, and a device that gets them can train them (with both zero they would never get a gradient).
    """
    return _by_update(merging, lambda coverage: coverage)


def flexlora(merging: Merging) -> Adapter:
    """Weighted mean of the updates ``dW_i``, truncated to `rank_max` (FlexLoRA, arXiv 2402.11505).

    It knows nothing of pruning: a feature that a client lost counts as an update of zero, with its full weight. Where
    nobody is pruned it is `lowrank`.
    """
    return _by_update(merging, _unaware)


def _unaware(coverage: Coverage) -> Coverage:
    """The same clients, as if each had kept every feature and sent zeros for what it lost."""
    return replace(coverage, reciprocal=torch.ones_like(coverage.reciprocal), held=None)


def _by_update(merging: Merging, seen: Callable[[Coverage], Coverage]) -> Adapter:
    """`lowrank` under the coverage that `seen` makes of the true one."""
    factors: dict[str, Factors] = {}
    for linear, coverage in merging.covered():
        transposed = linear.role in COLUMN_PRUNED
        pruned, whole = _mean_update(merging, linear, seen(coverage))
        b, a = (whole.T, pruned.T) if transposed else (pruned, whole)
        a, b = a.contiguous(), b.contiguous()
        factors[linear.name] = (with_old_rows(a, b, merging.previous.factors[linear.name][0]), b)
    return Adapter(factors, merging.mean_head())


def average_factors(merging: Merging) -> Adapter:
    """Weighted means of ``A`` and of ``B``, apart (FedIT, arXiv 2305.05644); the result has the clients' rank.

    The mean of products is not the product of means: unlike `lowrank` this is exact for one client only. Pruned
    features are averaged over the clients that kept them; features that nobody kept hold their previous factors.

    Raises:
        ConfigError: ranks differ between clients, or from the previous adapter's where its features must be held.
    """
    rank = one_rank(merging)
    factors: dict[str, Factors] = {}
    for linear, coverage in merging.covered():
        transposed = linear.role in COLUMN_PRUNED
        old_pruned, old_whole = sides(merging.previous.factors[linear.name], transposed)
        features, other = old_pruned.shape[0], old_whole.shape[1]
        pruned, whole = old_pruned.new_zeros((features, rank)), old_whole.new_zeros((rank, other))
        for chunk in coverage.chunks:
            left, right = merging.concatenated(linear, chunk)
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
    return Adapter(factors, merging.mean_head())


def one_rank(merging: Merging) -> int:
    """The rank of all clients. Raises ConfigError where they have several."""
    ranks = {c.adapter.rank for c in merging.contributions}
    if len(ranks) > 1:
        raise ConfigError(
            f"aggregate.rule 'average_factors' needs one LoRA rank for all clients, got ranks "
            f"{', '.join(map(str, sorted(ranks)))}; use 'lowrank' for mixed ranks"
        )
    return ranks.pop()


_BY_DIFFERENCES: dict[Rule, ByDifferences] = {
    lowrank: by_products(lambda coverage: coverage),
    flexlora: by_products(_unaware),
    average_factors: checked(by_factors(), one_rank),
    zero_pad: checked(by_factors(), ranks_within),
    hetlora: checked(by_factors(update_norms), ranks_within),
    stack: by_stacks,
}


def differences_of(rule: Rule) -> ByDifferences:
    """How a rule merges differences; one of the user's own merges updates that were carried over."""
    return _BY_DIFFERENCES.get(rule) or by_rule(rule)


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products of float32 in float32, whatever training allows itself meanwhile (TF32 keeps ten bits)."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def find_rule(name: str) -> Rule:
    """The rule called `name`.

    Raises:
        ConfigError: there is none.
    """
    rule: Rule = loaded(RULES.named(name).merge)
    return rule


def _mean_update(merging: Merging, linear: PrunableLinear, coverage: Coverage) -> tuple[torch.Tensor, torch.Tensor]:
    """Truncated factors ``(pruned, whole)`` of the masked mean of one Linear's ``B A``."""
    old_pruned, old_whole = sides(merging.previous.factors[linear.name], linear.role in COLUMN_PRUNED)
    features, other, held = old_pruned.shape[0], old_whole.shape[1], coverage.held
    rank_sum = sum(chunk.rank * len(chunk.clients) for chunk in coverage.chunks)
    parts = (merging.concatenated(linear, chunk) for chunk in coverage.chunks)

    if factored_is_cheaper(features, other, rank_sum + (old_whole.shape[0] if held is not None else 0)):
        left, right = zip(*parts, strict=True)
        pruned, whole = torch.cat(left, dim=1) * coverage.reciprocal, torch.cat(right)
        if held is not None:
            old_rows = torch.zeros_like(old_pruned)
            old_rows[held] = old_pruned[held]
            pruned, whole = torch.cat([pruned, old_rows], dim=1), torch.cat([whole, old_whole])
        return truncated_svd_factored(pruned, whole, merging.rank_max)

    mean = old_pruned.new_zeros((features, other))
    for pruned, whole in parts:
        mean.addmm_(pruned, whole)
    mean *= coverage.reciprocal
    if held is not None:
        mean[held] = old_pruned[held] @ old_whole
    return truncated_svd_dense(mean, merging.rank_max)


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
