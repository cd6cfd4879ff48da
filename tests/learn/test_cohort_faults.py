"""What goes wrong for one client, or for the machine: numbers that are not finite, and memory that runs out."""

from __future__ import annotations

import dataclasses
import logging
import weakref

import numpy as np
import pytest
import torch
from cohort_toys import LABELS, Toy, assert_same_updates, job, rule, toy, toy_data
from tiny_checkpoints import ARCHITECTURES, VOCAB

from fedsim.contracts.common import Outcome
from fedsim.errors import ResourceError
from fedsim.learn.cohort.forward import CohortModel
from fedsim.learn.cohort.plan import ChunkPlan, cohorts
from fedsim.learn.model.backbone import load_backbone
from fedsim.settings import ModelSettings
from fedsim.structure import Structure

TIGHT = {"relative": 1e-10, "absolute": 1e-12}
FORMS = pytest.mark.parametrize("sliced", [False, True], ids=["masked", "sliced"])
SICK, SICK_ROW = 2, 1
"""A client, and its place in the chunk."""


@pytest.fixture
def bert(tiny_folders) -> Toy:
    return toy(str(tiny_folders["bert"]))


def some_jobs(toy: Toy):
    """Five clients, the sick one in the middle, that prune to mixed ratios."""
    adapter, full = toy.adapter(), Structure.full(toy.backbone.shape)
    starts = [full, toy.structure(1), full, toy.structure(2), full]
    return [job(adapter, start, c, 0.1 * (c + 1), rank=1 + c % 3, prune=True) for c, start in enumerate(starts)]


def without_sick(items):
    return [item for place, item in enumerate(items) if place != SICK]


# -- numbers that are not finite --------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sick_client_spoils_nobody_else(tiny_folders, architecture, value, sliced):
    """A token that only one client has carries a number that is not finite, all the way through the model."""
    settings = ModelSettings(name=str(tiny_folders[architecture]))
    backbone = load_backbone(settings, LABELS, seed=3, device=torch.device("cpu"))
    backbone.model.to(torch.float64)
    data, token = toy_data(), VOCAB - 1
    data.text.input_ids[data.text.input_ids == token] = 7
    data.text.input_ids[data.parts[SICK], 0] = token
    with torch.no_grad():
        backbone.encoder.get_input_embeddings().weight[token, 3] = value
    own = Toy(backbone, "native", "all", torch.float64, data)
    jobs = some_jobs(own)
    updates = own.cohort(rule(), sliced).train(jobs)
    assert [update.outcome for update in updates] == [Outcome.NON_FINITE if c == SICK else Outcome.OK for c in range(5)]
    assert np.isnan(updates[SICK].loss_after)
    healthy = own.cohort(rule(), sliced).train(without_sick(jobs))
    assert_same_updates(without_sick(updates), healthy, **TIGHT)
    (alone,) = own.reference(rule()).train(jobs[SICK : SICK + 1])
    assert alone.outcome == Outcome.NON_FINITE


def spoil(monkeypatch, at_call, change):
    """Let `change` spoil the sick client's losses at one forward pass; the probe before training is number 0."""
    real, calls = CohortModel.losses, []

    def losses(self, batch, stack):
        calls.append(None)
        values = real(self, batch, stack)
        return change(values) if len(calls) - 1 == at_call else values

    monkeypatch.setattr(CohortModel, "losses", losses)


def factor_of(values, number):
    """1 for all clients but the sick one (a chunk has an order of its own)."""
    factor = torch.ones_like(values)
    factor[SICK_ROW] = number
    return factor


def spoilt_loss(values):
    return values * factor_of(values, torch.inf)


def spoilt_number(values):
    """A loss that is not finite though its gradient is."""
    return values + (factor_of(values, torch.inf) - 1.0)


def spoilt_gradient(values):
    """A finite loss whose gradient is not."""
    factor = factor_of(values, torch.nan)
    values.register_hook(lambda grad: grad * factor)
    return values


@FORMS
@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("change", [spoilt_loss, spoilt_number, spoilt_gradient])
def test_a_fault_at_any_step_ends_that_client_only(bert, monkeypatch, sliced, step, change):
    """Before the cut, at the cut (step 3 of 3) and in the last gradients."""
    jobs = some_jobs(bert)
    assert cohorts(jobs)[0][SICK_ROW] == SICK
    healthy = bert.cohort(rule(), sliced).train(jobs)
    spoil(monkeypatch, step, change)
    updates = bert.cohort(rule(), sliced).train(jobs)
    assert updates[SICK].outcome == Outcome.NON_FINITE
    assert_same_updates(without_sick(updates), without_sick(healthy), **TIGHT)
    # Its averaged scores are never spoilt: an estimate that is not finite is skipped.
    assert np.isfinite(updates[SICK].scores.heads).all()
    assert np.isfinite(updates[SICK].scores.channels).all()


@FORMS
def test_a_fault_in_the_last_measurement_counts(bert, monkeypatch, sliced):
    jobs = some_jobs(bert)
    spoil(monkeypatch, 4, spoilt_loss)
    updates = bert.cohort(rule(), sliced).train(jobs)
    assert [update.outcome == Outcome.NON_FINITE for update in updates] == [c == SICK for c in range(5)]


# -- memory -----------------------------------------------------------------------------------------------------------


def out_of_memory_above(monkeypatch, clients, error, at_call=2):
    """Training steps of more than `clients` at once fail (not the first call: something has been taken by then)."""
    real, sizes, calls = CohortModel.losses, [], weakref.WeakKeyDictionary()

    def losses(self, batch, stack):
        calls[stack] = calls.get(stack, 0) + 1
        if calls[stack] == 1:
            sizes.append(batch.clients)
        if batch.clients > clients and calls[stack] == at_call:
            raise error
        return real(self, batch, stack)

    monkeypatch.setattr(CohortModel, "losses", losses)
    return sizes


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 12 bytes"),
    MemoryError(),
]


@FORMS
@pytest.mark.parametrize("error", ERRORS, ids=["card", "host", "python"])
def test_a_chunk_that_does_not_fit_is_halved_and_stays_so(bert, monkeypatch, caplog, sliced, error):
    jobs = some_jobs(bert)
    want = bert.cohort(rule(), sliced).train(jobs)
    sizes = out_of_memory_above(monkeypatch, 2, error)
    trainer = bert.cohort(rule(), sliced)
    with caplog.at_level(logging.WARNING):
        first = trainer.train(jobs)
        assert len(caplog.records) == 1
        assert "out of memory with 5 clients at once: from here on at most 2" in caplog.text
        second = trainer.train(jobs)
    assert len(caplog.records) == 1
    assert sizes == [5, 2, 2, 1, 2, 2, 1]
    for updates in (first, second):
        assert_same_updates(updates, want, **TIGHT)


def test_each_halving_is_said_once(bert, monkeypatch, caplog):
    jobs = some_jobs(bert)
    sizes = out_of_memory_above(monkeypatch, 1, ERRORS[0])
    with caplog.at_level(logging.WARNING):
        bert.cohort(rule(), True).train(jobs)
    assert [record.args for record in caplog.records] == [(5, 2), (2, 1)]
    assert sizes == [5, 2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("error", ERRORS, ids=["card", "host", "python"])
def test_one_client_that_does_not_fit_is_one_sentence(bert, monkeypatch, error):
    out_of_memory_above(monkeypatch, 0, error)
    with pytest.raises(
        ResourceError, match=r"one client alone does not fit into memory \(.+\): take a smaller"
    ) as raised:
        bert.cohort(rule(), True).train(some_jobs(bert))
    assert "\n" not in str(raised.value)
    assert type(raised.value)(*raised.value.args).args == raised.value.args


def test_any_other_error_passes_through_unchanged(bert, monkeypatch):
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    sizes = out_of_memory_above(monkeypatch, 0, error)
    trainer = bert.cohort(rule(), True)
    with pytest.raises(RuntimeError) as raised:
        trainer.train(some_jobs(bert))
    assert raised.value is error
    assert sizes == [5]
    assert trainer._plan.limit == 16


def test_what_a_failed_chunk_held_is_gone_before_the_memory_is_cleared(monkeypatch):
    """A traceback that is still at hand would keep a chunk's tensors alive, and clearing would free nothing."""
    held, alive = [], []

    def work(chunk):
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        if len(chunk) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(held[-1]() is not None))
    ChunkPlan(4).run(range(4), work)
    assert alive == [False, False]


@pytest.mark.parametrize(
    ("clients", "limit", "sizes"), [(17, 16, [9, 8]), (16, 16, [16]), (5, 2, [2, 2, 1]), (3, 0, [1] * 3)]
)
def test_chunks_are_even(clients, limit, sizes):
    chunks = []
    ChunkPlan(limit).run(range(clients), chunks.append)
    assert [len(chunk) for chunk in chunks] == sizes
    assert [place for chunk in chunks for place in chunk] == list(range(clients))


def test_a_job_that_cannot_prune_says_so_in_both_engines(bert):
    """No scores so far, and no estimate before the cut."""
    jobs = [job(bert.adapter(), Structure.full(bert.backbone.shape), 1, 0.5, steps=2, recovery=2)]
    for trainer in (bert.reference(rule()), bert.cohort(rule(), True)):
        with pytest.raises(RuntimeError, match="client 1 is to prune, but no importance was ever estimated"):
            trainer.train(jobs)


def test_an_adapter_of_another_model_is_refused(bert):
    adapter = bert.adapter()
    fewer = dataclasses.replace(adapter, factors=dict(list(adapter.factors.items())[:-1]))
    with pytest.raises(ValueError, match="adapter has factors for 11 linears, not for 12"):
        bert.cohort(rule(), True).train([job(fewer, Structure.full(bert.backbone.shape), 1)])
