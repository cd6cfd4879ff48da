"""The cohort's two operations against plain formulas and numerical gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.learn.cohort.kernels import RowMap, lora_linears

SCALE = 1.7


@st.composite
def linears(draw):
    """Input ``x``, and one to three Linears of it: weights shared or per client, with bias and LoRA or not."""
    sizes = st.integers(1, 4)
    clients, tokens, d_in = draw(sizes), draw(sizes), draw(sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def tensor(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    frozen, factors = [], []
    for _ in range(draw(st.integers(1, 3))):
        d_out, rank, own = draw(sizes), draw(sizes), draw(st.booleans())
        weight = tensor(clients, d_out, d_in) if own else tensor(d_out, d_in)
        # A column-pruned Linear has weights of its own and a bias that all share.
        bias_per_client = own and draw(st.booleans())
        bias = draw(st.sampled_from([None, tensor(clients, d_out) if bias_per_client else tensor(d_out)]))
        frozen.append((weight, bias))
        factors.append(draw(st.sampled_from([None, (tensor(clients, rank, d_in), tensor(clients, rank, d_out))])))
    return tensor(clients, tokens, d_in), frozen, factors


def plain(x, frozen, factors):
    """``x W' + b + c (x A') B'``, client by client."""
    outputs = []
    for (weight, bias), pair in zip(frozen, factors, strict=True):
        rows = []
        for client, own in enumerate(x):
            y = own @ (weight[client] if weight.dim() == 3 else weight).T
            if bias is not None:
                y = y + (bias[client] if bias.dim() == 2 else bias)
            if pair is not None:
                y = y + SCALE * own @ pair[0][client].T @ pair[1][client]
            rows.append(y)
        outputs.append(torch.stack(rows))
    return outputs


def leaves_of(x, factors):
    return [tensor.requires_grad_(True) for tensor in (x, *(factor for pair in factors if pair for factor in pair))]


@settings(max_examples=60, deadline=None)
@given(linears())
def test_lora_linears_equal_the_plain_formula_with_its_gradients(case):
    x, frozen, factors = case
    leaves = leaves_of(x, factors)
    mine, theirs = lora_linears(x, frozen, factors, SCALE), plain(x, frozen, factors)
    assert len(mine) == len(frozen)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    weights = [torch.cos(torch.arange(one.numel(), dtype=torch.float64)).view(one.shape) for one in mine]
    grads = [
        torch.autograd.grad(sum((w * y).sum() for w, y in zip(weights, outputs, strict=True)), leaves)
        for outputs in (mine, theirs)
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@settings(max_examples=12, deadline=None)
@given(linears())
def test_lora_linears_pass_the_numerical_gradient_check(case):
    x, frozen, factors = case
    leaves = leaves_of(x, factors)

    def call(x, *flat):
        rest = iter(flat)
        return lora_linears(x, frozen, [pair and (next(rest), next(rest)) for pair in factors], SCALE)

    assert torch.autograd.gradcheck(call, leaves)


def test_an_input_without_gradient_costs_no_product_for_it_and_factors_still_learn():
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight, a, b = torch.ones(5, 4).double(), torch.ones(2, 1, 4).double(), torch.ones(2, 1, 5).double()
    leaves = [a.requires_grad_(True), b.requires_grad_(True)]
    (y,) = lora_linears(x, [(weight, None)], [(a, b)], SCALE)
    (want,) = plain(x, [(weight, None)], [(a, b)])
    for one, other in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        torch.testing.assert_close(one, other)
    assert not x.requires_grad


def test_frozen_weights_in_bf16_round_the_large_product_alone():
    """bf16 keeps eight bits: the result strays by some 2^-8 of the product, and the LoRA term not at all."""
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 16, generator=draw), torch.randn(5, 16, generator=draw)
    a, b = torch.randn(2, 2, 16, generator=draw), torch.randn(2, 2, 5, generator=draw)
    (low,) = lora_linears(x, [(weight.bfloat16(), None)], [(a, b)], SCALE)
    (full,) = lora_linears(x, [(weight, None)], [(a, b)], SCALE)
    assert low.dtype == torch.float32
    error = (low - full).abs().max()
    assert 0 < error < 16 * 2**-8 * (x.abs().max() * weight.abs().max())
    (zero_weight,) = lora_linears(x, [(0 * weight.bfloat16(), None)], [(a, b)], SCALE)
    torch.testing.assert_close(zero_weight, SCALE * x @ a.transpose(1, 2) @ b)


@st.composite
def row_maps(draw):
    """Source row of every target row, -1 for none; each source row at most once."""
    sources, targets = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    pairs = draw(st.integers(0, min(sources, targets)))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    source = np.full(targets, -1)
    source[generator.choice(targets, pairs, replace=False)] = generator.choice(sources, pairs, replace=False)
    return source, sources


def row_map(source, sources):
    back = np.full(sources, -1)
    back[source[source >= 0]] = np.flatnonzero(source >= 0)

    def half(places):
        empty = np.flatnonzero(places < 0)
        return torch.from_numpy(np.maximum(places, 0)), torch.from_numpy(empty) if len(empty) else None

    return RowMap(*half(source), *half(back)), back


@settings(max_examples=60, deadline=None)
@given(row_maps())
def test_row_maps_equal_indexing_with_exact_gradients(case):
    source, sources = case
    moved, back = row_map(source, sources)
    for function, places, rows in ((moved.forth, source, sources), (moved.reverse, back, len(source))):
        values = torch.randn(rows, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        want = torch.stack([values[place] if place >= 0 else torch.zeros(2).double() for place in places])
        values.requires_grad_(True)
        assert torch.equal(function(values), want)
        assert torch.autograd.gradcheck(function, (values,))


def test_what_is_not_finite_stays_out_of_empty_rows():
    """The filler of an empty row is read from row 0, and must leave no NaN behind."""
    moved, _ = row_map(np.array([1, -1]), 2)
    values = torch.tensor([[torch.nan], [2.0]], requires_grad=True)
    assert moved.forth(values).tolist() == [[2.0], [0.0]]
    (grad,) = torch.autograd.grad(moved.forth(values), values, torch.tensor([[3.0], [torch.nan]]))
    assert grad.tolist() == [[0.0], [3.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_clients_numbers_never_reach_another(bad):
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 2, 8, generator=draw), torch.randn(5, 8, generator=draw)
    a, b = torch.randn(3, 2, 8, generator=draw), torch.randn(3, 2, 5, generator=draw)
    outputs, grads = [], []
    for spoiled in (False, True):
        own = x.clone()
        own[1, 0, 0] = bad if spoiled else 0.0
        leaves = [tensor.clone().requires_grad_(True) for tensor in (own, a, b)]
        (y,) = lora_linears(leaves[0], [(weight, None)], [(leaves[1], leaves[2])], SCALE)
        outputs.append(y.detach())
        grads.append(torch.autograd.grad((y * y).sum(), leaves))
    assert not outputs[1][1].isfinite().all()
    for one, other in zip((outputs[0], *grads[0]), (outputs[1], *grads[1]), strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])
