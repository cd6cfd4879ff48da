"""Truncated decompositions: the two routes against LAPACK's SVD and against each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.learn.merge.lowrank import factored_is_cheaper, truncated_svd_dense, truncated_svd_factored

widths = st.integers(1, 12)


def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _best_error(matrix: torch.Tensor, rank: int) -> float:
    """Frobenius distance of the best approximation (Eckart and Young): the singular values left out."""
    return float(torch.linalg.svdvals(matrix.double())[rank:].norm())


@settings(max_examples=60, deadline=None)
@given(d_out=widths, d_in=widths, rank=st.integers(1, 14), seed=st.integers(0, 10**6))
def test_dense_is_the_best_approximation(d_out, d_in, rank, seed):
    matrix = _normal(seed, d_out, d_in)
    b, a = truncated_svd_dense(matrix, rank)
    assert b.shape == (d_out, rank)
    assert a.shape == (rank, d_in)
    error = float((matrix.double() - b.double() @ a.double()).norm())
    assert error == pytest.approx(_best_error(matrix, rank), abs=1e-6 * float(matrix.norm()))


@settings(max_examples=60, deadline=None)
@given(d_out=widths, d_in=widths, inner=st.integers(1, 16), rank=st.integers(1, 14), seed=st.integers(0, 10**6))
def test_both_routes_are_as_near(d_out, d_in, inner, rank, seed):
    left, right = _normal(seed, d_out, inner), _normal(seed + 1, inner, d_in)
    matrix = left.double() @ right.double()
    b, a = truncated_svd_factored(left, right, rank)
    error = float((matrix - b.double() @ a.double()).norm())
    assert error == pytest.approx(_best_error(matrix, rank), abs=1e-6 * float(matrix.norm()))


@pytest.mark.parametrize(("d_out", "d_in", "inner", "rank"), [(40, 60, 12, 5), (60, 40, 12, 5), (30, 30, 50, 8)])
def test_both_routes_give_the_same_factors(d_out, d_in, inner, rank):
    left, right = _normal(1, d_out, inner).double(), _normal(2, inner, d_in).double()
    dense_b, dense_a = truncated_svd_dense(left @ right, rank)
    factored_b, factored_a = truncated_svd_factored(left, right, rank)
    torch.testing.assert_close(factored_b @ factored_a, dense_b @ dense_a, rtol=0, atol=1e-6)
    torch.testing.assert_close(factored_b, dense_b, rtol=0, atol=1e-6)
    torch.testing.assert_close(factored_a, dense_a, rtol=0, atol=1e-6)


def test_singular_values_are_split_evenly_and_descend():
    matrix = _normal(3, 20, 33)
    b, a = truncated_svd_dense(matrix, 6)
    values = torch.linalg.svdvals(matrix)[:6]
    torch.testing.assert_close(b.T @ b, torch.diag(values), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a @ a.T, torch.diag(values), rtol=1e-5, atol=1e-5)


def test_components_beyond_the_rank_are_exact_zeros():
    left, right = _normal(4, 64, 3), _normal(5, 3, 50)
    for b, a in (truncated_svd_dense(left @ right, 8), truncated_svd_factored(left, right, 8)):
        assert (b[:, :3].abs().amax(0) > 0.1).all()
        assert torch.count_nonzero(b[:, 3:]) == 0
        assert torch.count_nonzero(a[3:]) == 0
        torch.testing.assert_close(b @ a, left @ right, rtol=0, atol=1e-5)


def test_zero_update_gives_zero_factors():
    for b, a in (
        truncated_svd_dense(torch.zeros(6, 4), 3),
        truncated_svd_factored(torch.zeros(6, 2), torch.zeros(2, 4), 3),
    ):
        assert torch.equal(b, torch.zeros(6, 3))
        assert torch.equal(a, torch.zeros(3, 4))


def test_sign_does_not_depend_on_the_signs_of_the_factors():
    left, right = _normal(6, 30, 5), _normal(7, 5, 40)
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])
    b, a = truncated_svd_factored(left, right, 5)
    flipped_b, flipped_a = truncated_svd_factored(left * flips, right * flips[:, None], 5)
    torch.testing.assert_close(flipped_b, b, rtol=0, atol=1e-6)
    torch.testing.assert_close(flipped_a, a, rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(d_out=widths, d_in=widths, seed=st.integers(0, 10**6))
def test_the_largest_entry_of_each_column_is_positive(d_out, d_in, seed):
    b, _ = truncated_svd_dense(_normal(seed, d_out, d_in), min(d_out, d_in))
    for column in b.T:
        size = column.abs()
        first = int(torch.nonzero(size >= 0.9985 * size.max())[0])
        near_tie = int(((size > 0.998 * size.max()) & (size < size.max())).sum())
        assert near_tie or column[first] >= 0


def test_between_equal_entries_the_first_is_positive():
    b, _ = truncated_svd_dense(torch.tensor([[-1.0, -1.0], [1.0, 1.0 + 1e-6]]), 1)
    assert b[0, 0] > 0 > b[1, 0]


def test_flop_rule_prefers_factors_only_where_they_are_small():
    assert factored_is_cheaper(384, 1536, 64)
    assert factored_is_cheaper(1536, 384, 64)
    assert not factored_is_cheaper(64, 64, 640)
    for d_out, d_in in [(64, 64), (256, 64), (384, 384), (1536, 384), (768, 768), (768, 3072)]:
        narrow = min(d_out, d_in)
        assert factored_is_cheaper(d_out, d_in, int(0.75 * narrow)), "measured: faster up to here"
        assert not factored_is_cheaper(d_out, d_in, int(0.84 * narrow)), "measured: slower from here"
    for d_out, d_in in [(1, 1), (5, 9), (64, 64), (64, 256), (4096, 11008)]:
        cheaper = [factored_is_cheaper(d_out, d_in, rank) for rank in range(1, min(d_out, d_in) + 2)]
        assert cheaper == sorted(cheaper, reverse=True), "the rule switches once"
        assert not factored_is_cheaper(d_out, d_in, min(d_out, d_in))
