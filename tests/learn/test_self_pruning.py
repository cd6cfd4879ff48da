"""Rank self-pruning (HETLoRA): what is penalised, what is dropped, and that both engines do the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from cohort_toys import assert_same_updates, job, local_program, rule, toy

from fedsim.contracts.program import Trained
from fedsim.learn.model.adapter import Adapter
from fedsim.learn.train.objective import as_trained, resized
from fedsim.methods.hetlora import SelfPruning, kept_rank
from fedsim.structure import Structure

GIVING_UP = SelfPruning(decay=0.6, weight=0.3)


def under(one, objective, **program):
    """The job with another objective."""
    return dataclasses.replace(
        one, request=dataclasses.replace(one.request, program=local_program(objective=objective, **program))
    )


def tail_norm(adapter, decay=0.6):
    """Of one client, factor by factor."""
    keep = kept_rank(adapter.rank, decay)
    return sum(float(a[keep:].norm()) * float(b[:, keep:].norm()) for a, b in adapter.factors.values())


def test_the_kept_rank_is_a_floor_and_never_none():
    assert [kept_rank(rank, 0.99) for rank in (1, 2, 8, 16, 100, 200)] == [1, 1, 7, 15, 99, 198]
    assert [kept_rank(rank, 0.5) for rank in (1, 2, 3, 4)] == [1, 1, 1, 2]
    assert kept_rank(10, 1.0) == 10
    assert kept_rank(10, 0.7) == 7  # 7.000000000000001 or 6.999999999999999


def test_the_tail_of_a_cohort_is_that_of_each_client():
    draws = torch.Generator().manual_seed(0)
    ranks = np.array([4, 1, 3])
    single, stacked = [{} for _ in ranks], {}
    for name, (d_in, d_out) in {"one": (5, 7), "other": (6, 2)}.items():
        stack_a, stack_b = torch.zeros(3, 4, d_in), torch.zeros(3, 4, d_out)
        for client, rank in enumerate(ranks):
            a, b = torch.randn(rank, d_in, generator=draws), torch.randn(d_out, rank, generator=draws)
            stack_a[client, :rank], stack_b[client, :rank] = a, b.T
            single[client][name] = (a, b)
        stacked[name] = (stack_a, stack_b)
    want = [tail_norm(Adapter(pairs, {})) for pairs in single]
    assert want[1] == 0.0
    np.testing.assert_allclose(GIVING_UP.tail_norms(Trained(stacked, {}), ranks), want, rtol=1e-6)
    ones = [
        float(GIVING_UP.tail_norms(as_trained(Adapter(pairs, {})), np.array([rank]))[0])
        for pairs, rank in zip(single, ranks, strict=True)
    ]
    np.testing.assert_allclose(ones, want, rtol=1e-6)
    penalty = GIVING_UP.penalty(Trained(stacked, {}), Trained(stacked, {}), ranks)
    np.testing.assert_allclose(penalty, 0.3 * np.array(want), rtol=1e-6)


def test_an_untrained_adapter_gets_a_gradient_of_zero():
    a, b = torch.randn(1, 4, 5, requires_grad=True), torch.zeros(1, 4, 3, requires_grad=True)
    now = Trained({"one": (a, b)}, {})
    GIVING_UP.penalty(now, now, np.array([4])).sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))
    assert torch.equal(b.grad, torch.zeros_like(b))


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_the_penalty_is_the_same_in_both_engines(tiny_folders, architecture):
    """Mixed ranks on pruned structures: what a mask hides, and rows beyond a client's rank, are not penalised."""
    own = toy(str(tiny_folders[architecture]))
    starts = [Structure.full(own.backbone.shape), own.structure(1), own.structure(2)]
    adapter = own.adapter()
    plain = [
        job(adapter, start, client + 1, rank=rank)
        for client, (start, rank) in enumerate(zip(starts, (4, 2, 3), strict=True))
    ]
    jobs = [under(one, GIVING_UP) for one in plain]
    want = own.reference(rule()).train(jobs)
    assert any(
        not torch.equal(one.adapter.factors[name][1], other.adapter.factors[name][1])
        for one, other in zip(want, own.reference(rule()).train(plain), strict=True)
        for name in one.adapter.factors
    )
    for sliced in (False, True):
        assert_same_updates(own.cohort(rule(), sliced).train(jobs), want, relative=1e-9, absolute=1e-11)


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
    one = under(job(adapter, structure, 0, rank=4), GIVING_UP)
    (start,) = own.reference(rule(None)).train([job(adapter, structure, 0, rank=4, rate=1e-30)])
    tail = slice(kept_rank(4, 0.6), None)
    shape = own.backbone.shape
    dropped = resized(one, scaled(start, tail, 0.9), 5, shape)
    assert dropped.adapter.rank == 2
    for name, (a, b) in dropped.adapter.factors.items():
        assert torch.equal(a, start.adapter.factors[name][0][:2])
        assert torch.equal(b, start.adapter.factors[name][1][:, :2])
    assert resized(one, scaled(start, tail, 1.1), 5, shape).adapter.rank == 4
    assert resized(one, scaled(start, slice(0, 2), 0.1), 5, shape).adapter.rank == 4  # that is not the tail
    shrunk = scaled(start, tail, 0.9)
    for objective in (None, SelfPruning(decay=1.0, weight=0.3)):
        assert resized(under(one, objective), shrunk, 5, shape) is shrunk


def test_an_objective_may_not_keep_what_is_not_there(tiny_folders):
    @dataclasses.dataclass(frozen=True)
    class Grasping(SelfPruning):
        def ranks_after(self, now, start, ranks):
            return ranks + 1

    own = toy(str(tiny_folders["bert"]))
    one = job(own.adapter(), Structure.full(own.backbone.shape), 2)
    (update,) = own.reference(rule(None)).train([one])
    with pytest.raises(ValueError, match=r"client 2: an objective keeps 5 components of 4"):
        resized(under(one, Grasping(0.6, 0.3)), update, 5, own.backbone.shape)


def test_a_heavy_penalty_makes_clients_give_up(tiny_folders):
    """With B off zero a penalty that outweighs the loss shrinks the tail in a few steps."""
    own = toy(str(tiny_folders["bert"]))
    one = job(own.adapter(), Structure.full(own.backbone.shape), 3, rank=4)
    ranks = []
    for weight in (0.0, 50.0):
        job_here = under(one, SelfPruning(0.6, weight), steps=6)
        (update,) = own.cohort(rule(None), True).train([job_here])
        grown = tail_norm(update.adapter) / tail_norm(one.adapter)
        ranks.append((grown, resized(job_here, update, 5, own.backbone.shape).adapter.rank))
    assert ranks[1][0] < 0.7 < ranks[0][0]
    assert ranks[1][1] == 2
