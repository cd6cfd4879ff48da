"""Merges by differences: what clients changed since the version that each was sent, added to the present one.

A client that flew from version v brings ``update - v``: the difference to its own view of v, which is what it was sent
(the groups that it still keeps, the first components up to its rank; components beyond the version's count from
nothing). It has changed nothing else. With D the rule's weighted mean of these differences,

    new = current + step(D),

so that two flights of one version count both, whether they are merged together or one after the other. `step` is a
number (``mix``: 1 adds the mean as it is), or a function of each tensor of D: a server optimizer such as FedAdam (Reddi
et al., arXiv 2003.00295), for which -D is the gradient.

In which terms a rule averages is in which terms it takes differences:

* *factors* (``average_factors``, ``zero_pad``, ``hetlora``): of ``A`` and of ``B`` apart; names ``A.<linear>`` and
  ``B.<linear>`` at the global rank.
* *products* (``lowrank``, ``flexlora``): of ``B A``; name ``W.<linear>``, ``(d_out, d_in)`` without the scale c. The
  sum is truncated anew.
* *merged* (``stack``): of ``B A`` too, added to what was merged into the base.
* a rule of the user's own: updates are carried over to the present version factor by factor, and the rule merges them.
  For a server optimizer its outcome's ``B A`` less the present one is D.

Heads are averaged alike under all: names ``head.<parameter>``.

Where all clients start from the present version, keep all and have the global rank, this is the rule itself, to
rounding. Elsewhere a rule that shrinks what some clients do not have (``flexlora`` lost features, ``zero_pad`` and
``hetlora`` components that only a few have) does not shrink it here: a client that has no such feature did not change
it. A weight below 1 (staleness) scales a client's difference and is not divided out: a lone stale client moves the
model less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.learn.merge.coverage import Coverage, sides
from fedsim.learn.merge.lowrank import factored_is_cheaper, truncated_svd_dense, truncated_svd_factored, with_old_rows
from fedsim.learn.merge.merging import Contribution, Merging, Rule
from fedsim.learn.model.adapter import Adapter, Factors, restrict
from fedsim.learn.model.linears import COLUMN_PRUNED, PrunableLinear

ServerStep = Callable[[str, torch.Tensor], torch.Tensor]
"""From a mean difference, by its name (see the module), to what is added to the global adapter: of the same shape."""

Step = float | ServerStep
ByDifferences = Callable[[Merging, Step], Adapter]
"""A way to merge differences: the new global adapter."""
Weigher = Callable[[Merging, PrunableLinear], NDArray[np.float64]]
"""Weights of the contributions for one Linear, shape (P,)."""


def all_current(merging: Merging) -> bool:
    """Whether every contribution started from the present version, with its full weight: the rule itself applies."""
    return all(
        one.weight == 1.0 and (one.start is None or one.start is merging.previous) for one in merging.contributions
    )


def by_factors(weigher: Weigher | None = None) -> ByDifferences:
    """For rules that average ``A`` and ``B`` apart; `weigher` where each Linear has weights of its own."""

    def merged(merging: Merging, step: Step) -> Adapter:
        changes = _with_adapters(merging, lambda one, start: _factor_difference(one, start, merging))
        factors: dict[str, Factors] = {}
        for linear, coverage in changes.covered():
            if weigher is not None:
                coverage = changes.coverage(linear, weigher(merging, linear))
            a, b = _factor_mean(changes, linear, coverage)
            old_a, old_b = _of_rank(merging.previous.factors[linear.name], len(a))
            factors[linear.name] = (
                old_a + _stepped(step, f"A.{linear.name}", a),
                old_b + _stepped(step, f"B.{linear.name}", b),
            )
        return Adapter(factors, _head(changes, step), merging.previous.merged)

    return merged


def by_products(seen: Callable[[Coverage], Coverage]) -> ByDifferences:
    """For rules that average ``B A`` under the coverage that `seen` makes of the true one, and truncate."""

    def merged(merging: Merging, step: Step) -> Adapter:
        changes = _with_adapters(merging, lambda one, start: _product_difference(one, start, merging))
        factors: dict[str, Factors] = {}
        for linear, coverage in changes.covered():
            factors[linear.name] = _truncated(changes, linear, seen(coverage), step)
        return Adapter(factors, _head(changes, step), merging.previous.merged)

    return merged


def by_stacks(merging: Merging, step: Step) -> Adapter:
    """For ``stack``: mean products go into the base, and the factors' rank is 0 afterwards."""
    changes = _with_adapters(merging, lambda one, start: _product_difference(one, start, merging))
    factors: dict[str, Factors] = {}
    into_base = dict(merging.previous.merged)
    for linear, coverage in changes.covered():
        update = merging.alpha_over_rank * _stepped(step, f"W.{linear.name}", _dense_mean(changes, linear, coverage))
        into_base[linear.name] = into_base[linear.name] + update if linear.name in into_base else update
        a, b = merging.previous.factors[linear.name]
        factors[linear.name] = a.new_empty((0, a.shape[1])), b.new_empty((b.shape[0], 0))
    return Adapter(factors, _head(changes, step), into_base)


def by_rule(rule: Rule) -> ByDifferences:
    """For any other rule: it merges the updates as if they had been made to the present version."""

    def merged(merging: Merging, step: Step) -> Adapter:
        share = step if isinstance(step, float) else 1.0
        carried = _with_adapters(merging, lambda one, start: _carried(one, start, merging, share))
        carried = replace(
            carried, contributions=[replace(one, start=merging.previous, weight=1.0) for one in carried.contributions]
        )
        after = rule(carried)
        if isinstance(step, float):
            return after
        factors: dict[str, Factors] = {}
        for linear in merging.linears():
            old_a, old_b = merging.previous.factors[linear.name]
            a, b = after.factors[linear.name]
            moved = old_b @ old_a + step(f"W.{linear.name}", b @ a - old_b @ old_a)
            b, a = truncated_svd_dense(moved, merging.rank_max)
            factors[linear.name] = with_old_rows(a, b, old_a), b
        old = merging.previous.head
        head = {name: old[name] + step(f"head.{name}", new - old[name]) for name, new in after.head.items()}
        return Adapter(factors, head, after.merged)

    return merged


def mean_differences(merging: Merging, rule: ByDifferences) -> dict[str, torch.Tensor]:
    """The mean difference D by name, as a server optimizer gets it: one tensor after another, here all at once."""
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str, difference: torch.Tensor) -> torch.Tensor:
        seen[name] = difference
        return difference

    rule(merging, watch)
    return seen


# -- differences of single clients ----------------------------------------------------------------------------------


def _with_adapters(merging: Merging, changed: Callable[[Contribution, Adapter], Adapter]) -> Merging:
    """The same contributions, each with the adapter that `changed` makes of it and of the version it started from."""
    return replace(
        merging,
        contributions=[
            replace(one, adapter=changed(one, merging.previous if one.start is None else one.start))
            for one in merging.contributions
        ],
    )


def _sent(one: Contribution, version: Adapter, merging: Merging) -> Adapter:
    """What a client that keeps what it keeps now was sent of a version: its components up to the client's rank."""
    return restrict(version, one.structure, min(one.adapter.rank, version.rank), merging.shape, None)


def _factor_difference(one: Contribution, start: Adapter, merging: Merging) -> Adapter:
    """``weight (update - start)``, factor by factor and in the head."""
    sent, factors = _sent(one, start, merging), {}
    for name, (a, b) in one.adapter.factors.items():
        old_a, old_b = (old.to(a.device) for old in _of_rank(sent.factors[name], len(a)))
        factors[name] = one.weight * (a - old_a), one.weight * (b - old_b)
    return Adapter(factors, _head_difference(one, start))


def _product_difference(one: Contribution, start: Adapter, merging: Merging) -> Adapter:
    """Factors whose product is ``weight (B A - B_start A_start)``, side by side; the head's difference."""
    sent, factors = _sent(one, start, merging), {}
    for name, (a, b) in one.adapter.factors.items():
        old_a, old_b = sent.factors[name]
        factors[name] = (
            torch.cat([a, old_a.to(a.device)]),
            torch.cat([one.weight * b, -one.weight * old_b.to(b.device)], dim=1),
        )
    return Adapter(factors, _head_difference(one, start))


def _head_difference(one: Contribution, start: Adapter) -> Mapping[str, torch.Tensor]:
    return {name: one.weight * (new - start.head[name].to(new.device)) for name, new in one.adapter.head.items()}


def _carried(one: Contribution, start: Adapter, merging: Merging, share: float) -> Adapter:
    """The update, as if it had been made to the present version, with this share of its difference."""
    change, present = _factor_difference(one, start, merging), _sent(one, merging.previous, merging)
    factors: dict[str, Factors] = {}
    for name, (a, b) in change.factors.items():
        old_a, old_b = (old.to(a.device) for old in _of_rank(present.factors[name], len(a)))
        factors[name] = old_a + share * a, old_b + share * b
    head = {name: present.head[name].to(new.device) + share * new for name, new in change.head.items()}
    return Adapter(factors, head)


def _of_rank(factors: Factors, rank: int) -> Factors:
    """The first `rank` components, with components of zeros where there are fewer."""
    a, b = factors
    missing = max(0, rank - len(a))
    return (
        torch.cat([a[:rank], a.new_zeros(missing, a.shape[1])]),
        torch.cat([b[:, :rank], b.new_zeros(len(b), missing)], dim=1),
    )


# -- means of differences -------------------------------------------------------------------------------------------


def _stepped(step: Step, name: str, difference: torch.Tensor) -> torch.Tensor:
    return step * difference if isinstance(step, float) else step(name, difference)


def _head(changes: Merging, step: Step) -> Mapping[str, torch.Tensor]:
    mean = changes.mean_head()
    return {name: old + _stepped(step, f"head.{name}", mean[name]) for name, old in changes.previous.head.items()}


def _factor_mean(changes: Merging, linear: PrunableLinear, coverage: Coverage) -> Factors:
    """Means of ``A`` and ``B``, at the global rank or the clients' highest; zero where nobody has anything."""
    transposed = linear.role in COLUMN_PRUNED
    old_pruned, old_whole = sides(changes.previous.factors[linear.name], transposed)
    features, other = old_pruned.shape[0], old_whole.shape[1]
    rank = max(len(old_whole), *(chunk.rank for chunk in coverage.chunks))
    pruned, whole = old_pruned.new_zeros((features, rank)), old_whole.new_zeros((rank, other))
    for chunk in coverage.chunks:
        left, right = changes.concatenated(linear, chunk)
        pruned[:, : chunk.rank] += (left.view(features, -1, chunk.rank) * chunk.weights.unsqueeze(1)).sum(dim=1)
        whole[: chunk.rank] += right.view(-1, chunk.rank, other).sum(dim=0)
    pruned *= coverage.reciprocal
    b, a = (whole.T, pruned.T) if transposed else (pruned, whole)
    return a.contiguous(), b.contiguous()


def _dense_mean(changes: Merging, linear: PrunableLinear, coverage: Coverage) -> torch.Tensor:
    """Mean of the products, ``(d_out, d_in)``; zero where nobody keeps anything."""
    transposed = linear.role in COLUMN_PRUNED
    old_pruned, old_whole = sides(changes.previous.factors[linear.name], transposed)
    mean = old_pruned.new_zeros((old_pruned.shape[0], old_whole.shape[1]))
    for chunk in coverage.chunks:
        mean.addmm_(*changes.concatenated(linear, chunk))
    mean *= coverage.reciprocal
    return (mean.T if transposed else mean).contiguous()


def _truncated(changes: Merging, linear: PrunableLinear, coverage: Coverage, step: Step) -> Factors:
    """The present product and the mean difference's step together, truncated to the global rank."""
    old_a, old_b = changes.previous.factors[linear.name]
    transposed = linear.role in COLUMN_PRUNED
    rank_sum = len(old_a) + sum(chunk.rank * len(chunk.clients) for chunk in coverage.chunks)
    if isinstance(step, float) and factored_is_cheaper(len(old_b), old_a.shape[1], rank_sum):
        old_pruned, old_whole = sides((old_a, old_b), transposed)
        left, right = zip(*(changes.concatenated(linear, chunk) for chunk in coverage.chunks), strict=True)
        pruned = torch.cat([old_pruned, torch.cat(left, dim=1) * coverage.reciprocal * step], dim=1)
        pruned, whole = truncated_svd_factored(pruned, torch.cat([old_whole, *right]), changes.rank_max)
        b, a = (whole.T, pruned.T) if transposed else (pruned, whole)
    else:
        change = _stepped(step, f"W.{linear.name}", _dense_mean(changes, linear, coverage))
        b, a = truncated_svd_dense(torch.addmm(change, old_b, old_a), changes.rank_max)
    return with_old_rows(a.contiguous(), b, old_a), b.contiguous()


def checked(rule: ByDifferences, check: Callable[[Merging], object]) -> ByDifferences:
    """`rule`, after `check` has refused ranks that it cannot merge."""

    def merged(merging: Merging, step: Step) -> Adapter:
        check(merging)
        return rule(merging, step)

    return merged
