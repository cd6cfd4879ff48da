"""The rules zero_pad, hetlora, flexlora and stack against their definitions, written out with full matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsim.errors import ConfigError
from fedsim.learn.merge.padded import norm_weights
from fedsim.learn.merge.rules import Contribution, merge
from fedsim.learn.model.adapter import Adapter, folded, restrict
from fedsim.learn.model.linears import kept_columns, kept_rows, prunable_linears
from fedsim.settings import AggregateSettings
from fedsim.structure import ModelShape, Structure, kept_counts

SHAPE = ModelShape("small", "roberta", 2, 24, 4, 4, 6, 40, 10, 8)
GROUPED = ModelShape("grouped", "llama", 1, 8, 4, 2, 2, 5, 10, 0, gated=True)
C, RANK_MAX = 2.0, 6
RULES = ("zero_pad", "hetlora", "flexlora", "stack")


def contribution(seed, rank, ratio=0.0, samples=10, shape=SHAPE):
    draw = np.random.default_rng(seed)
    heads, channels = kept_counts(shape, ratio)
    structure = Structure(
        np.zeros((shape.layers, shape.head_groups), dtype=bool), np.zeros((shape.layers, shape.ffn), dtype=bool)
    )
    factors = {}
    for layer in range(shape.layers):
        structure.head_mask[layer, draw.permutation(shape.head_groups)[:heads]] = True
        structure.channel_mask[layer, draw.permutation(shape.ffn)[:channels]] = True
    for linear in prunable_linears(shape):
        rows, columns = kept_rows(linear, structure, shape), kept_columns(linear, structure, shape)
        a = draw.standard_normal((rank, linear.d_in if columns is None else len(columns)))
        b = draw.standard_normal((linear.d_out if rows is None else len(rows), rank))
        factors[linear.name] = (torch.from_numpy(a).float(), torch.from_numpy(b).float())
    head = {"weight": torch.from_numpy(draw.standard_normal((2, shape.hidden))).float()}
    return Contribution(Adapter(factors, head), structure, samples, float(draw.random()))


def merged(rule, contributions, shape=SHAPE, previous=None, importance_weight=0.0):
    before = previous or contribution(99, RANK_MAX, shape=shape).adapter
    settings = AggregateSettings(rule=rule, importance_weight=importance_weight)
    return before, merge(before, contributions, shape, RANK_MAX, C, settings)


def scattered(one, linear, shape):
    """One client's factors at full width, as float64 arrays, zeros where it keeps nothing; and which features it kept.

    For a Linear that loses rows the kept ones index B, else A's columns.
    """
    a, b = (factor.double().numpy() for factor in one.adapter.factors[linear.name])
    rows, columns = kept_rows(linear, one.structure, shape), kept_columns(linear, one.structure, shape)
    rows = np.arange(linear.d_out) if rows is None else rows
    columns = np.arange(linear.d_in) if columns is None else columns
    full_a, full_b = np.zeros((len(a), linear.d_in)), np.zeros((linear.d_out, len(a)))
    full_a[:, columns], full_b[rows] = a, b
    return full_a, full_b, rows, columns


def padded(a, b, rank):
    return np.vstack([a, np.zeros((rank - len(a), a.shape[1]))]), np.hstack([b, np.zeros((len(b), rank - b.shape[1]))])


def mixed(shape=SHAPE, ratios=(0.0, 0.3, 0.6)):
    return [
        contribution(seed, rank, ratio, samples, shape)
        for seed, (rank, ratio, samples) in enumerate(zip((2, 4, 3), ratios, (10, 20, 5), strict=True))
    ]


@pytest.mark.parametrize("shape", [SHAPE, GROUPED], ids=["encoder", "grouped"])
@pytest.mark.parametrize("rule", ["zero_pad", "hetlora"])
def test_padded_rules_are_means_of_padded_factors(rule, shape):
    """Entry by entry: the mean over those that kept the feature; what nobody kept or trained holds."""
    clients = mixed(shape)
    before, after = merged(rule, clients, shape)
    for linear in prunable_linears(shape):
        full = [scattered(one, linear, shape) for one in clients]
        weights = np.array([10.0, 20.0, 5.0])
        if rule == "hetlora":
            weights = np.array([np.linalg.norm(b @ a) for a, b, _, _ in full])
        weights = weights / weights.sum()
        old_a, old_b = (factor.double().numpy() for factor in before.factors[linear.name])
        want_a, want_b = np.zeros_like(old_a), np.zeros_like(old_b)
        row_weight, column_weight = np.zeros(linear.d_out), np.zeros(linear.d_in)
        for weight, (a, b, rows, columns) in zip(weights, full, strict=True):
            a, b = padded(a, b, RANK_MAX)
            want_a, want_b = want_a + weight * a, want_b + weight * b
            row_weight[rows] += weight
            column_weight[columns] += weight
        for place in range(linear.d_out):
            want_b[place] = want_b[place] / row_weight[place] if row_weight[place] else old_b[place]
        for place in range(linear.d_in):
            want_a[:, place] = want_a[:, place] / column_weight[place] if column_weight[place] else old_a[:, place]
        want_a[4:], want_b[:, 4:] = old_a[4:], old_b[:, 4:]  # no client has more than 4 components
        a, b = after.factors[linear.name]
        np.testing.assert_allclose(a, want_a, rtol=0, atol=2e-6)
        np.testing.assert_allclose(b, want_b, rtol=0, atol=2e-6)


def test_padding_shrinks_components_that_few_have():
    """The aggregation bias: beside a short client of equal weight the third component comes back halved."""
    long, short = contribution(1, 3), contribution(2, 2)
    _, after = merged("zero_pad", [long, short])
    name = prunable_linears(SHAPE)[0].name
    a, b = after.factors[name]
    torch.testing.assert_close(a[2], 0.5 * long.adapter.factors[name][0][2])
    torch.testing.assert_close(b[:, 2], 0.5 * long.adapter.factors[name][1][:, 2])


def test_hetlora_weighs_by_the_norm_of_the_update_and_by_data_where_there_is_none():
    draws = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(r, 7, generator=draws), torch.randn(5, r, generator=draws)) for r in (1, 3, 8)]
    norms = np.array([float(torch.linalg.matrix_norm(b.double() @ a.double())) for a, b in pairs])
    np.testing.assert_allclose(norm_weights(pairs, np.ones(3)), norms / norms.sum(), rtol=1e-12)
    zero = [(a, torch.zeros_like(b)) for a, b in pairs]
    assert norm_weights(zero, np.array([0.5, 0.3, 0.2])).tolist() == [0.5, 0.3, 0.2]
    one_zero = norm_weights([pairs[0], zero[1]], np.array([0.5, 0.5]))
    assert one_zero.tolist() == [1.0, 0.0]


def test_flexlora_counts_lost_features_as_zeros():
    clients = mixed()
    _, after = merged("flexlora", clients)
    weights = np.array([10.0, 20.0, 5.0]) / 35.0
    for linear in prunable_linears(SHAPE):
        full = [scattered(one, linear, SHAPE) for one in clients]
        mean = sum(w * C * b @ a for w, (a, b, _, _) in zip(weights, full, strict=True))
        values = np.linalg.svd(mean, compute_uv=False)
        a, b = (factor.double().numpy() for factor in after.factors[linear.name])
        error = np.linalg.norm(mean - C * b @ a)
        assert error == pytest.approx(np.linalg.norm(values[RANK_MAX:]), abs=5e-6 * values[0])


def test_flexlora_is_lowrank_where_nothing_is_pruned():
    clients = mixed(ratios=(0.0, 0.0, 0.0))
    _, one = merged("flexlora", clients)
    _, other = merged("lowrank", clients)
    for name in one.factors:
        assert all(torch.equal(x, y) for x, y in zip(one.factors[name], other.factors[name], strict=True))


@pytest.mark.parametrize("shape", [SHAPE, GROUPED], ids=["encoder", "grouped"])
def test_stack_merges_the_exact_mean_over_two_rounds(shape):
    """No truncation whatever the ranks; two rounds add up; the next round's factors start afresh."""
    clients = mixed(shape)
    _, once = merged("stack", clients, shape)
    assert once.rank == 0
    _, twice = merged("stack", clients, shape, previous=once)
    weights = np.array([10.0, 20.0, 5.0]) / 35.0
    for linear in prunable_linears(shape):
        total, weight = np.zeros((linear.d_out, linear.d_in)), np.zeros((linear.d_out, linear.d_in))
        for share, one in zip(weights, clients, strict=True):
            a, b, rows, columns = scattered(one, linear, shape)
            total += share * C * b @ a
            weight[np.ix_(rows, columns)] += share
        mean = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
        scale = np.abs(mean).max()
        np.testing.assert_allclose(once.merged[linear.name], mean, rtol=0, atol=2e-6 * scale)
        np.testing.assert_allclose(twice.merged[linear.name], 2 * mean, rtol=0, atol=4e-6 * scale)
    fresh, other = (restrict(twice, Structure.full(shape), 3, shape, (0, client, 5)) for client in (1, 2))
    for name, (a, b) in fresh.factors.items():
        assert torch.count_nonzero(b) == 0
        assert a.shape[0] == 3
        assert not torch.equal(a, other.factors[name][0])
        assert torch.equal(a, restrict(twice, Structure.full(shape), 3, shape, (0, 1, 5)).factors[name][0])


def test_a_stacked_adapter_folds_into_plain_factors_without_loss():
    _, after = merged("stack", mixed())
    plain = folded(after, C)
    assert not plain.merged
    for name, (a, b) in plain.factors.items():
        scale = float(after.merged[name].abs().max())
        torch.testing.assert_close(C * b @ a, after.merged[name], rtol=0, atol=1e-5 * scale)
    unmerged = contribution(1, 2).adapter
    assert folded(unmerged, C) is unmerged


@pytest.mark.parametrize("rule", ["zero_pad", "hetlora", "flexlora"])
def test_one_whole_client_comes_back(rule):
    only = contribution(1, 4)
    _, after = merged(rule, [only])
    for name, (a, b) in only.adapter.factors.items():
        got_a, got_b = after.factors[name]
        if rule != "flexlora":  # what is held of the components that it lacks is no part of it
            got_a, got_b = got_a[:4], got_b[:, :4]
        torch.testing.assert_close(got_b @ got_a, b @ a, rtol=0, atol=5e-5)


@pytest.mark.parametrize("rule", RULES)
def test_heads_are_averaged_by_data_and_an_empty_round_changes_nothing(rule):
    clients = mixed()
    before, after = merged(rule, clients)
    want = sum(n / 35 * one.adapter.head["weight"] for n, one in zip((10, 20, 5), clients, strict=True))
    torch.testing.assert_close(after.head["weight"], want)
    assert merged(rule, [], previous=before)[1] is before


@pytest.mark.parametrize("rule", ["zero_pad", "hetlora"])
def test_a_rank_above_the_global_one_is_refused(rule):
    with pytest.raises(ConfigError, match=f"'{rule}' pads .* global rank 6, but a client has rank 7"):
        merged(rule, [contribution(1, 7)])
