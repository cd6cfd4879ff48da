"""The merge against its definition: full matrices, one entry and one client at a time, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.learn.merge import rules as aggregate
from fedsim.learn.merge.rules import Contribution, merge
from fedsim.learn.model.adapter import Adapter
from fedsim.learn.model.linears import kept_columns, kept_rows, prunable_linears
from fedsim.settings import AggregateSettings
from fedsim.structure import ModelShape, Structure

ENCODER = ModelShape("small", "bert", 2, 6, 3, 3, 2, 7, 10, 8)
GROUPED = ModelShape("grouped", "llama", 1, 8, 4, 2, 2, 5, 10, 0, gated=True)
C = 2.0


def _adapter(shape, structure, rank, draw):
    factors = {}
    for linear in prunable_linears(shape):
        rows, columns = kept_rows(linear, structure, shape), kept_columns(linear, structure, shape)
        a = draw.standard_normal((rank, linear.d_in if columns is None else len(columns)))
        b = draw.standard_normal((linear.d_out if rows is None else len(rows), rank))
        factors[linear.name] = (torch.from_numpy(a).float(), torch.from_numpy(b).float())
    return Adapter(factors, {"weight": torch.from_numpy(draw.standard_normal((2, 3))).float()})


def _structure(shape, keep, draw):
    """Each group kept with probability `keep`, one left at least."""
    heads = draw.random((shape.layers, shape.head_groups)) < keep
    channels = draw.random((shape.layers, shape.ffn)) < keep
    for mask in (heads, channels):
        mask[np.arange(shape.layers), draw.integers(mask.shape[1], size=shape.layers)] = True
    return Structure(heads, channels)


def _product(factors):
    a, b = factors
    return C * b.double().numpy() @ a.double().numpy()


def dense_mean(previous, contributions, weights, shape):
    """Definition: entry (i, j) averages over the clients that kept row i and column j, else holds its old value."""
    means = {}
    for linear in prunable_linears(shape):
        old = _product(previous.factors[linear.name])
        mean = np.empty((linear.d_out, linear.d_in))
        for i in range(linear.d_out):
            for j in range(linear.d_in):
                numerator = denominator = 0.0
                for contribution, weight in zip(contributions, weights, strict=True):
                    rows = kept_rows(linear, contribution.structure, shape)
                    columns = kept_columns(linear, contribution.structure, shape)
                    rows = list(range(linear.d_out) if rows is None else rows)
                    columns = list(range(linear.d_in) if columns is None else columns)
                    if i in rows and j in columns:
                        a, b = contribution.adapter.factors[linear.name]
                        entry = float(b[rows.index(i)].double() @ a[:, columns.index(j)].double())
                        numerator += weight * C * entry
                        denominator += weight
                mean[i, j] = numerator / denominator if denominator else old[i, j]
        means[linear.name] = mean
    return means


cases = st.fixed_dictionaries(
    {
        "shape": st.sampled_from([ENCODER, GROUPED]),
        "ranks": st.lists(st.integers(1, 4), min_size=1, max_size=4),
        "keep": st.sampled_from([0.2, 0.6, 1.0]),
        "importance_weight": st.sampled_from([0.0, 0.7]),
        "seed": st.integers(0, 10**6),
    }
)


def _problem(case):
    draw, shape = np.random.default_rng(case["seed"]), case["shape"]
    previous = _adapter(shape, Structure.full(shape), 3, draw)
    contributions = []
    for rank in case["ranks"]:
        structure = _structure(shape, case["keep"], draw)
        adapter = _adapter(shape, structure, rank, draw)
        contributions.append(Contribution(adapter, structure, int(draw.integers(1, 50)), float(draw.random())))
    largest = max(c.importance for c in contributions)
    weights = [c.samples * (1 + case["importance_weight"] * c.importance / largest) for c in contributions]
    return previous, contributions, weights, shape


@pytest.mark.parametrize("factored", [True, False, None], ids=["factored", "dense", "by_the_rule"])
@settings(max_examples=12, deadline=None)
@given(case=cases, rank_max=st.integers(1, 10))
def test_lowrank_is_the_truncated_dense_mean(factored, case, rank_max):
    previous, contributions, weights, shape = _problem(case)
    asked = AggregateSettings(importance_weight=case["importance_weight"])
    with pytest.MonkeyPatch.context() as patch:
        if factored is not None:
            patch.setattr(aggregate, "factored_is_cheaper", lambda d_out, d_in, rank_sum: factored)
        merged = merge(previous, contributions, shape, rank_max, C, asked)
    for name, mean in dense_mean(previous, contributions, weights, shape).items():
        a, b = merged.factors[name]
        assert a.shape == (rank_max, mean.shape[1])
        assert b.shape == (mean.shape[0], rank_max)
        values = np.linalg.svd(mean, compute_uv=False)
        tolerance = 5e-6 * values[0]
        # Distance to the mean, not to its SVD: well defined when singular values coincide, and as sharp.
        error = np.linalg.norm(mean - _product((a, b)))
        assert error == pytest.approx(np.linalg.norm(values[rank_max:]), abs=tolerance)
        if rank_max >= len(values):
            np.testing.assert_allclose(_product((a, b)), mean, rtol=0, atol=tolerance)


@settings(max_examples=15, deadline=None)
@given(case=cases)
def test_average_factors_is_the_entrywise_mean_of_the_factors(case):
    case = {**case, "ranks": [3] * len(case["ranks"])}
    previous, contributions, weights, shape = _problem(case)
    asked = AggregateSettings(rule="average_factors", importance_weight=case["importance_weight"])
    merged = merge(previous, contributions, shape, 3, C, asked)
    for linear in prunable_linears(shape):
        for which, kept in ((0, kept_columns), (1, kept_rows)):
            old = previous.factors[linear.name][which].double().numpy()
            numerator, denominator = np.zeros(old.shape), np.zeros(old.shape)
            for contribution, weight in zip(contributions, weights, strict=True):
                index = kept(linear, contribution.structure, shape)
                index = slice(None) if index is None else index
                where = (slice(None), index) if which == 0 else (index, slice(None))
                numerator[where] += weight * contribution.adapter.factors[linear.name][which].double().numpy()
                denominator[where] += weight
            expected = np.where(denominator > 0, numerator / np.maximum(denominator, 1e-30), old)
            np.testing.assert_allclose(merged.factors[linear.name][which].numpy(), expected, rtol=1e-5, atol=1e-5)
