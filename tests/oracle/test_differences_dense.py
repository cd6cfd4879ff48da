"""Merges of differences against their definition with full matrices in float64, for every rule."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.learn.entries import RULES, RuleEntry
from fedsim.learn.merge.differences import mean_differences
from fedsim.learn.merge.merging import Merging
from fedsim.learn.merge.rules import Contribution, client_weights, differences_of, find_rule, merge
from fedsim.learn.model.adapter import Adapter
from fedsim.learn.model.linears import COLUMN_PRUNED, kept_columns, kept_rows, prunable_linears
from fedsim.settings import AggregateSettings
from fedsim.structure import ModelShape, Structure, kept_counts

SHAPE = ModelShape("small", "roberta", 2, 24, 4, 4, 6, 40, 10, 8)
C, RANK = 2.0, 4
PRODUCTS = ("lowrank", "flexlora")
FACTORS = ("average_factors", "zero_pad", "hetlora")


def a_structure(ratio, draw):
    heads, channels = kept_counts(SHAPE, ratio)
    structure = Structure(np.zeros((2, 4), dtype=bool), np.zeros((2, 40), dtype=bool))
    for layer in range(2):
        structure.head_mask[layer, draw.permutation(4)[:heads]] = True
        structure.channel_mask[layer, draw.permutation(40)[:channels]] = True
    return structure


def an_adapter(seed, rank=RANK, structure=None, scale=1.0):
    draw = np.random.default_rng(seed)
    structure = structure or Structure.full(SHAPE)
    factors = {}
    for linear in prunable_linears(SHAPE):
        rows, columns = kept(linear, structure)
        a = scale * draw.standard_normal((rank, len(columns)))
        b = scale * draw.standard_normal((len(rows), rank))
        factors[linear.name] = torch.from_numpy(a).float(), torch.from_numpy(b).float()
    return Adapter(factors, {"weight": torch.from_numpy(draw.standard_normal((2, 24))).float()})


def kept(linear, structure):
    rows, columns = kept_rows(linear, structure, SHAPE), kept_columns(linear, structure, SHAPE)
    return (
        np.arange(linear.d_out) if rows is None else rows,
        np.arange(linear.d_in) if columns is None else columns,
    )


def a_contribution(seed, start=None, rank=RANK, ratio=0.0, weight=1.0):
    draw = np.random.default_rng([seed, 7])
    structure = a_structure(ratio, draw)
    adapter = an_adapter([seed, 1], rank, structure)
    return Contribution(adapter, structure, int(draw.integers(1, 30)), float(draw.random()), start, weight)


def merged(rule, present, contributions, step=1.0):
    rank = max(present.rank, RANK)
    return merge(present, contributions, SHAPE, rank, C, AggregateSettings(rule=rule, importance_weight=0.5), step)


def full_sizes(linear, one, start, rank):
    """A, B of the client's update and of what it was sent, padded to `rank` and scattered to full size; float64."""
    rows, columns = kept(linear, one.structure)
    own = one.adapter.rank
    pairs = []
    for (a, b), whole in ((one.adapter.factors[linear.name], False), (start.factors[linear.name], True)):
        a, b = a.double().numpy(), b.double().numpy()
        if whole:
            a, b = a[:own, columns], b[rows, :own]
        full_a, full_b = np.zeros((rank, linear.d_in)), np.zeros((linear.d_out, rank))
        full_a[np.ix_(np.arange(len(a)), columns)] = a
        full_b[np.ix_(rows, np.arange(len(a)))] = b
        pairs.append((full_a, full_b))
    return pairs


def linear_weights(rule, linear, contributions):
    weights = client_weights(contributions, 0.5)
    if rule == "hetlora":
        norms = np.array(
            [
                np.linalg.norm((b.double() @ a.double()).numpy())
                for a, b in (one.adapter.factors[linear.name] for one in contributions)
            ]
        )
        weights = norms / norms.sum()
    return weights


def dense(rule, present, contributions, mix):
    """By Linear what the merge ought to be: (A, B) for rules over factors, else B A before any truncation."""
    wanted = {}
    for linear in prunable_linears(SHAPE):
        weights = linear_weights(rule, linear, contributions)
        pruned_columns = linear.role in COLUMN_PRUNED
        size = linear.d_in if pruned_columns else linear.d_out
        total, sums = np.zeros(size), {"A": 0.0, "B": 0.0, "W": 0.0}
        for one, weight in zip(contributions, weights, strict=True):
            (a, b), (old_a, old_b) = full_sizes(linear, one, one.start or present, RANK)
            share = weight * one.weight
            sums["A"] = sums["A"] + share * (a - old_a)
            sums["B"] = sums["B"] + share * (b - old_b)
            sums["W"] = sums["W"] + share * (b @ a - old_b @ old_a)
            total[kept(linear, one.structure)[1 if pruned_columns else 0]] += weight
        if rule == "flexlora":
            total[:] = 1.0
        inverse = np.divide(1.0, total, out=np.zeros(size), where=total > 0)
        sums["W"] = sums["W"] * (inverse if pruned_columns else inverse[:, None])
        if pruned_columns:
            sums["A"] = sums["A"] * inverse
        else:
            sums["B"] = sums["B"] * inverse[:, None]
        if rule in FACTORS:
            a, b = (factor.double().numpy() for factor in present.factors[linear.name])
            wanted[linear.name] = a + mix * sums["A"], b + mix * sums["B"]
        elif rule == "stack":
            old = present.merged.get(linear.name)
            wanted[linear.name] = C * mix * sums["W"] + (0.0 if old is None else old.double().numpy())
        else:
            a, b = (factor.double().numpy() for factor in present.factors[linear.name])
            wanted[linear.name] = b @ a + mix * sums["W"]
    return wanted


def truncated(matrix, rank):
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def assert_close(left, right):
    np.testing.assert_allclose(left, right, rtol=0, atol=2e-5 * max(1.0, float(np.abs(right).max())))


def assert_merged(rule, present, contributions, mix, after):
    for name, want in dense(rule, present, contributions, mix).items():
        a, b = (factor.double().numpy() for factor in after.factors[name])
        if rule in FACTORS:
            assert_close(a, want[0])
            assert_close(b, want[1])
        elif rule == "stack":
            assert a.shape[0] == 0
            assert_close(after.merged[name].double().numpy(), want)
        else:
            assert_close(b @ a, truncated(want, present.rank))
    weights = client_weights(contributions, 0.5)
    head = present.head["weight"].double()
    for one, weight in zip(contributions, weights, strict=True):
        start = one.start or present
        head = head + mix * weight * one.weight * (one.adapter.head["weight"].double() - start.head["weight"].double())
    assert_close(after.head["weight"].double().numpy(), head.numpy())


def rounds(rule):
    """Present state, and contributions of three versions, of several structures, ranks and weights."""
    ranks = (RANK,) * 4 if rule == "average_factors" else (2, 4, 3, 1)
    versions = (an_adapter(50), an_adapter(51), None, an_adapter(50))
    if rule == "stack":
        empty = {name: (a[:0], b[:, :0]) for name, (a, b) in an_adapter(50).factors.items()}
        base = {name: torch.ones(b.shape[0], a.shape[1]) for name, (a, b) in empty.items()}
        present = Adapter(empty, an_adapter(52).head, base)
        zero_b = {name: (a, torch.zeros_like(b)) for name, (a, b) in an_adapter(50).factors.items()}
        versions = (Adapter(zero_b, an_adapter(50).head), Adapter(empty, an_adapter(51).head), None, None)
    else:
        present = an_adapter(52)
    ratios, shares = (0.0, 0.6, 0.6, 0.5), (1.0, 0.5, 1.0, 0.25)
    return present, [
        a_contribution(seed, start, rank, ratio, share)
        for seed, (start, rank, ratio, share) in enumerate(zip(versions, ranks, ratios, shares, strict=True))
    ]


@pytest.mark.parametrize("mix", [1.0, 0.3])
@pytest.mark.parametrize("some", [slice(None), slice(1, 2), slice(1, 3)], ids=["all", "one-pruned", "two-pruned"])
@pytest.mark.parametrize("rule", RULES)
def test_stale_updates_are_merged_by_their_differences(rule, some, mix):
    """Every feature counts by who kept it; what nobody kept stays; a client's components beyond its rank stay."""
    present, contributions = rounds(rule)
    assert_merged(rule, present, contributions[some], mix, merged(rule, present, contributions[some], mix))


@pytest.mark.parametrize("cheaper", [True, False], ids=["factored", "dense"])
@pytest.mark.parametrize("rule", PRODUCTS)
def test_both_ways_to_truncate_give_the_same(rule, cheaper, monkeypatch):
    monkeypatch.setattr("fedsim.learn.merge.differences.factored_is_cheaper", lambda *sizes: cheaper)
    present, contributions = rounds(rule)
    assert_merged(rule, present, contributions, 0.3, merged(rule, present, contributions, 0.3))


@pytest.mark.parametrize("rule", RULES)
def test_a_server_step_gets_every_mean_difference_once_and_its_answer_is_added(rule):
    present, contributions = rounds(rule)
    merging = Merging(present, contributions, SHAPE, RANK, C, AggregateSettings(rule=rule, importance_weight=0.5))
    differences = mean_differences(merging, differences_of(find_rule(rule)))
    linears = [linear.name for linear in prunable_linears(SHAPE)]
    kinds = ("A", "B") if rule in FACTORS else ("W",)
    assert list(differences) == [f"{kind}.{name}" for name in linears for kind in kinds] + ["head.weight"]
    asked = []
    after = merged(rule, present, contributions, lambda name, change: asked.append(name) or 0.3 * change)
    assert asked == list(differences)
    assert_merged(rule, present, contributions, 0.3, after)
    same = merged(rule, present, contributions, lambda name, change: torch.zeros_like(change))
    for name in linears:
        (a, b), (old_a, old_b) = same.factors[name], present.factors[name]
        assert_close((b @ a).numpy(), (old_b @ old_a).numpy())


@pytest.mark.parametrize("rule", RULES)
def test_updates_of_the_present_version_replace_it_to_the_bit(rule):
    """Named or not, the present version as start changes nothing; a start of equal values that is another object does
    not count as present, and gives the same to rounding where nothing is pruned and ranks are one."""
    present = rounds(rule)[0]
    plain = [a_contribution(seed) for seed in range(3)]
    want = merged(rule, present, plain)
    got = merged(rule, present, [dataclasses.replace(one, start=present) for one in plain])
    twin = Adapter(present.factors, present.head, present.merged)
    near = merged(rule, present, [dataclasses.replace(one, start=twin) for one in plain])
    for name, (a, b) in want.factors.items():
        assert torch.equal(got.factors[name][0], a)
        assert torch.equal(got.factors[name][1], b)
        assert_close((near.factors[name][1] @ near.factors[name][0]).numpy(), (b @ a).numpy())
        if rule == "stack":
            assert torch.equal(got.merged[name], want.merged[name])
            assert_close(near.merged[name].numpy(), want.merged[name].numpy())
    assert torch.equal(got.head["weight"], want.head["weight"])
    assert_close(near.head["weight"].numpy(), want.head["weight"].numpy())


@settings(max_examples=12, deadline=None)
@given(
    rule=st.sampled_from(sorted(RULES)),
    order=st.permutations(range(3)),
    ratio=st.sampled_from([0.0, 0.5]),
    mix=st.sampled_from([1.0, 0.5]),
)
def test_flights_of_one_version_merged_in_turn_all_count_in_any_order(rule, order, ratio, mix):
    """Asynchronous merges: the last state is the first plus every difference, whatever the order.

    B of version 0 is zero, as in a fresh run. Rank for all differences under the truncating rules.
    """
    rank = 16 if rule in PRODUCTS else RANK
    first = an_adapter(60, rank)
    first = Adapter({name: (a, torch.zeros_like(b)) for name, (a, b) in first.factors.items()}, first.head)
    flights = [a_contribution(seed, first, RANK, ratio) for seed in range(3)]

    def played(places):
        present = first
        for place in places:
            one = AggregateSettings(rule=rule)
            present = merge(present, [flights[place]], SHAPE, max(1, present.rank), C, one, mix)
        return present

    after, straight = played(order), played(range(3))
    for linear in prunable_linears(SHAPE):
        want_a, want_b, want_w = 0.0, 0.0, 0.0
        for one in flights:
            (a, b), (old_a, old_b) = full_sizes(linear, one, first, RANK)
            want_a, want_b = want_a + mix * (a - old_a), want_b + mix * (b - old_b)
            want_w = want_w + mix * (b @ a)
        got, other = after.factors[linear.name], straight.factors[linear.name]
        if rule in FACTORS:
            old_a, old_b = first.factors[linear.name]
            assert_close(got[0].numpy(), old_a.numpy() + want_a)
            assert_close(got[1].numpy(), old_b.numpy() + want_b)
        elif rule == "stack":
            assert_close(after.merged[linear.name].numpy(), C * want_w)
        else:
            assert_close((got[1] @ got[0]).numpy(), want_w)
            assert_close((other[1] @ other[0]).numpy(), want_w)


def test_a_rule_of_the_users_own_merges_updates_carried_over_to_the_present(monkeypatch):
    """The rule sees the present state and, for each client, what it would have sent had it started from there."""
    seen = []

    def median(merging):
        seen.append(merging)
        return merging.contributions[0].adapter

    monkeypatch.setitem(RULES, "mine", RuleEntry("mine", median))
    present, start = an_adapter(52), an_adapter(50)
    one = a_contribution(3, start, weight=0.5)
    after = merged("mine", present, [one], 0.5)
    assert seen[0].previous is present
    for name, (a, b) in after.factors.items():
        for got, new, old, now in zip(
            (a, b), one.adapter.factors[name], start.factors[name], present.factors[name], strict=True
        ):
            torch.testing.assert_close(got, now + 0.25 * (new - old))
    stepped = merged("mine", present, [one], lambda name, change: torch.zeros_like(change))
    for name, (a, b) in stepped.factors.items():
        old_a, old_b = present.factors[name]
        assert_close((b @ a).numpy(), (old_b @ old_a).numpy())


@pytest.mark.parametrize(("rule", "ranks"), [("average_factors", (2, 4)), ("zero_pad", (6,)), ("hetlora", (6,))])
def test_ranks_that_a_rule_cannot_merge_are_refused_for_stale_updates_too(rule, ranks):
    from fedsim.errors import ConfigError

    present, start = an_adapter(52), an_adapter(50)
    with pytest.raises(ConfigError, match=rf"aggregate\.rule '{rule}'"):
        merged(rule, present, [a_contribution(seed, start, rank) for seed, rank in enumerate(ranks)])


def test_inputs_are_left_alone():
    for rule in RULES:
        present, contributions = rounds(rule)
        before = [tensor.clone() for one in contributions for pair in one.adapter.factors.values() for tensor in pair]
        old = [tensor.clone() for pair in present.factors.values() for tensor in pair]
        merged(rule, present, contributions, 0.5)
        after = [tensor for one in contributions for pair in one.adapter.factors.values() for tensor in pair]
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        now = [tensor for pair in present.factors.values() for tensor in pair]
        assert all(torch.equal(*pair) for pair in zip(old, now, strict=True))
