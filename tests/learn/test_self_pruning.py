"""Rank self-pruning (HETLoRA): what is penalised, what is dropped, and that both engines do the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from cohort_toys import assert_same_updates, job, toy
from cohort_toys import rule as toy_rule

from fedsim.learn.model.adapter import Adapter
from fedsim.learn.train.self_pruning import kept_rank, self_pruned, tail_norm, tail_norms
from fedsim.structure import Structure

RULE = dataclasses.replace(toy_rule(), rank_decay=0.6, rank_penalty=0.3)


def test_the_kept_rank_is_a_floor_and_never_none():
    assert [kept_rank(rank, 0.99) for rank in (1, 2, 8, 16, 100, 200)] == [1, 1, 7, 15, 99, 198]
    assert [kept_rank(rank, 0.5) for rank in (1, 2, 3, 4)] == [1, 1, 1, 2]
    assert kept_rank(10, 1.0) == 10
    assert kept_rank(10, 0.7) == 7  # 7.000000000000001 or 6.999999999999999


def test_the_tail_of_a_cohort_is_that_of_each_client():
    draws = torch.Generator().manual_seed(0)
    ranks = np.array([4, 1, 3])
    single, stacked = [[] for _ in ranks], []
    for d_in, d_out in ((5, 7), (6, 2)):
        stack_a, stack_b = torch.zeros(3, 4, d_in), torch.zeros(3, 4, d_out)
        for client, rank in enumerate(ranks):
            a, b = torch.randn(rank, d_in, generator=draws), torch.randn(d_out, rank, generator=draws)
            stack_a[client, :rank], stack_b[client, :rank] = a, b.T
            single[client].append((a, b))
        stacked.append((stack_a, stack_b))
    want = []
    for client, rank in enumerate(ranks):
        keep = int(0.6 * rank) or 1
        want.append(sum(float(a[keep:].norm()) * float(b[:, keep:].norm()) for a, b in single[client]))
    assert want[1] == 0.0
    np.testing.assert_allclose([float(tail_norm(pairs, 0.6)) for pairs in single], want, rtol=1e-6)
    np.testing.assert_allclose(tail_norms(stacked, ranks, 0.6), want, rtol=1e-6)


def test_an_untrained_adapter_gets_a_gradient_of_zero():
    a, b = torch.randn(4, 5, requires_grad=True), torch.zeros(3, 4, requires_grad=True)
    tail_norm([(a, b)], 0.5).backward()
    assert torch.equal(a.grad, torch.zeros_like(a))
    assert torch.equal(b.grad, torch.zeros_like(b))


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_the_penalty_is_the_same_in_both_engines(tiny_folders, architecture):
    """Mixed ranks on pruned structures: what a mask hides, and rows beyond a client's rank, are not penalised."""
    own = toy(str(tiny_folders[architecture]))
    starts = [Structure.full(own.backbone.shape), own.structure(1), own.structure(2)]
    adapter = own.adapter()
    jobs = [
        job(adapter, start, client + 1, ratio=ratio, rank=rank, prune=ratio > 0)
        for client, (start, ratio, rank) in enumerate(zip(starts, (0.0, 0.0, 0.0), (4, 2, 3), strict=True))
    ]
    want = own.reference(RULE).train(jobs)
    plain = own.reference(toy_rule()).train(jobs)
    assert any(
        not torch.equal(one.adapter.factors[name][1], other.adapter.factors[name][1])
        for one, other in zip(want, plain, strict=True)
        for name in one.adapter.factors
    )
    for sliced in (False, True):
        assert_same_updates(own.cohort(RULE, sliced).train(jobs), want, relative=1e-9, absolute=1e-11)


def scaled(update, places, factor):
    """The update with some of its components' B multiplied."""
    factors = {}
    for name, (a, b) in update.adapter.factors.items():
        b = b.clone()
        b[:, places] *= factor
        factors[name] = (a, b)
    return dataclasses.replace(update, adapter=Adapter(factors, update.adapter.head))


def test_a_tail_that_shrank_is_dropped_and_one_that_grew_stays(tiny_folders):
    own = toy(str(tiny_folders["roberta"]))
    adapter, structure = own.adapter(), own.structure(1)
    one = job(adapter, structure, 0, rank=4)
    (start,) = own.reference(toy_rule(None)).train([job(adapter, structure, 0, rank=4, rate=1e-30)])
    tail = slice(kept_rank(4, 0.6), None)
    shape = own.backbone.shape
    dropped = self_pruned(one, scaled(start, tail, 0.9), 0.6, 5, shape)
    assert dropped.adapter.rank == 2
    for name, (a, b) in dropped.adapter.factors.items():
        assert torch.equal(a, start.adapter.factors[name][0][:2])
        assert torch.equal(b, start.adapter.factors[name][1][:, :2])
    assert self_pruned(one, scaled(start, tail, 1.1), 0.6, 5, shape).adapter.rank == 4
    assert self_pruned(one, scaled(start, slice(0, 2), 0.1), 0.6, 5, shape).adapter.rank == 4  # that is not the tail
    shrunk = scaled(start, tail, 0.9)
    assert self_pruned(one, shrunk, 1.0, 5, shape) is shrunk


def test_a_heavy_penalty_makes_clients_give_up(tiny_folders):
    """With B off zero a penalty that outweighs the loss shrinks the tail in a few steps."""
    own = toy(str(tiny_folders["bert"]))
    full = Structure.full(own.backbone.shape)
    one = job(own.adapter(), full, 3, rank=4, steps=6, rate=1e-2)
    ranks = []
    for penalty in (0.0, 50.0):
        rule = dataclasses.replace(toy_rule(None), rank_decay=0.6, rank_penalty=penalty)
        (update,) = own.cohort(rule, True).train([one])
        before, after = (tail_norm(list(a.factors.values()), 0.6) for a in (one.adapter, update.adapter))
        ranks.append((float(after / before), self_pruned(one, update, 0.6, 5, own.backbone.shape).adapter.rank))
    assert ranks[1][0] < 0.7 < ranks[0][0]
    assert ranks[1][1] == 2
