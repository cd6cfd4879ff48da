"""Programs and objectives in both engines: phases, penalties, what clients carry and remember."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from cohort_toys import SAMPLES, assert_same_updates, job, local_program, rule, toy

from fedsim.contracts.learning import LocalRequest
from fedsim.contracts.program import LocalProgram, Phase, Trained
from fedsim.errors import ConfigError
from fedsim.learn.objective_memory import ObjectiveMemory
from fedsim.learn.train.jobs import Remembered
from fedsim.learn.train.objective import as_trained
from fedsim.methods.fedprox import Proximal
from fedsim.methods.scaffold import ControlVariates
from fedsim.structure import Structure

TIGHT = {"relative": 1e-9, "absolute": 1e-11}
ENGINES = ("masked", "sliced")


def playing(one, program):
    return dataclasses.replace(one, request=dataclasses.replace(one.request, program=program))


def uneven_jobs(own, program, ratio=0.5):
    """Three clients of unlike structures and ranks."""
    starts = [Structure.full(own.backbone.shape), own.structure(1), own.structure(2)]
    adapter = own.adapter()
    return [
        playing(job(adapter, start, client + 1, ratio=max(ratio, start.ratio(own.backbone.shape)), rank=rank), program)
        for client, (start, rank) in enumerate(zip(starts, (4, 2, 3), strict=True))
    ]


def train(own, engine, jobs):
    trainer = own.reference(rule()) if engine == "reference" else own.cohort(rule(), engine == "sliced")
    return trainer.train(jobs)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("cuts", [False, True])
def test_a_proximal_term_is_the_same_in_both_engines_before_and_after_a_cut(tiny_folders, architecture, cuts):
    own = toy(str(tiny_folders[architecture]))
    jobs = uneven_jobs(own, local_program(steps=5, recovery=2, cuts=cuts, objective=Proximal(3.0)))
    want = train(own, "reference", jobs)
    plain = train(own, "reference", uneven_jobs(own, local_program(steps=5, recovery=2, cuts=cuts)))
    for one, other, start in zip(want, plain, jobs, strict=True):
        assert one.structure.same_as(start.start) != cuts
        moved = [_distance(update, start.adapter.head) for update in (one, other)]
        assert moved[0] < moved[1]
    for engine in ENGINES:
        assert_same_updates(train(own, engine, jobs), want, **TIGHT)


def _distance(update, head):
    return sum(float((tensor - head[name]).norm()) for name, tensor in update.adapter.head.items())


@pytest.mark.parametrize("engine", ["reference", *ENGINES])
@pytest.mark.parametrize("objective", [Proximal(0.0), ControlVariates()])
def test_an_objective_of_nothing_changes_no_bit(tiny_folders, engine, objective):
    own = toy(str(tiny_folders["bert"]), dtype=torch.float32)
    plain = [job(own.adapter(), Structure.full(own.backbone.shape), client) for client in (1, 2)]
    jobs = [playing(one, local_program(objective=objective)) for one in plain]
    if isinstance(objective, ControlVariates):
        nothing = as_trained(own.adapter()).mapped(torch.zeros_like)
        jobs = [dataclasses.replace(one, carried=nothing) for one in jobs]
    for one, other in zip(train(own, engine, jobs), train(own, engine, plain), strict=True):
        assert (one.loss_after, one.lora_importance) == (other.loss_after, other.lora_importance)
        for name, (a, b) in one.adapter.factors.items():
            assert torch.equal(a, other.adapter.factors[name][0])
            assert torch.equal(b, other.adapter.factors[name][1])


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_phases_are_played_alike(tiny_folders, architecture):
    """A pass that changes nothing, a warm phase, an estimate, a cut at another rate, and a cut at the very end."""
    own = toy(str(tiny_folders[architecture]))
    programs = [
        LocalProgram((Phase(2, 1e-2, estimate=True, trains=False), Phase(2, 1e-2, cut_before=True))),
        LocalProgram((Phase(1, 2e-2), Phase(2, 1e-2, estimate=True), Phase(2, 5e-3, cut_before=True))),
        LocalProgram((Phase(2, 1e-2, estimate=True), Phase(0, 1e-2, cut_before=True))),
        LocalProgram((Phase(3, 1e-2, estimate=True, trains=False),)),
    ]
    seen = []
    for program in programs:
        jobs = uneven_jobs(own, program)
        want = train(own, "reference", jobs)
        seen.append(want)
        for engine in ENGINES:
            assert_same_updates(train(own, engine, jobs), want, **TIGHT)
    assert all(update.loss_after == update.loss_before for update in seen[3])
    assert all(update.scores is not None for updates in seen for update in updates)
    first = seen[3][0].adapter
    for name, (a, b) in own.adapter().factors.items():
        assert torch.equal(first.factors[name][0], a)
        assert torch.equal(first.factors[name][1], b)


def test_the_rate_of_a_phase_counts(tiny_folders):
    """Two phases of one rate are one phase; another rate in the second is another result."""
    own = toy(str(tiny_folders["bert"]))
    one, two, other = (
        train(own, "sliced", uneven_jobs(own, LocalProgram(phases)))
        for phases in (
            (Phase(4, 1e-2),),
            (Phase(2, 1e-2), Phase(2, 1e-2)),
            (Phase(2, 1e-2), Phase(2, 1e-3)),
        )
    )
    assert_same_updates(one, two, relative=0.0, absolute=0.0)
    assert all(
        not torch.equal(mine.adapter.head[name], theirs.adapter.head[name])
        for mine, theirs in zip(one, other, strict=True)
        for name in mine.adapter.head
    )


def variates(own, seed):
    draws = torch.Generator().manual_seed(seed)
    return as_trained(own.adapter()).mapped(
        lambda tensor: 0.01 * torch.randn(tensor.shape, generator=draws, dtype=tensor.dtype)
    )


def test_carried_variates_and_what_is_kept_of_them_are_the_same_in_both_engines(tiny_folders):
    own = toy(str(tiny_folders["bert"]))
    full, adapter = Structure.full(own.backbone.shape), own.adapter()
    jobs = [
        dataclasses.replace(
            playing(job(adapter, full, client), local_program(objective=ControlVariates())),
            carried=variates(own, client),
        )
        for client in range(len(SAMPLES))
    ]
    want = train(own, "reference", jobs)
    plain = train(own, "reference", [dataclasses.replace(one, carried=None) for one in jobs])
    assert all(update.remembered is None for update in plain)
    assert all(one.loss_after != other.loss_after for one, other in zip(want, plain, strict=True))
    for engine in ENGINES:
        updates = train(own, engine, jobs)
        assert_same_updates(updates, want, **TIGHT)
        for one, other in zip(updates, want, strict=True):
            for mine, theirs in one.remembered.kept.pairs(other.remembered.kept):
                torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-11)
                assert mine.abs().max() > 0


# -- the memory -------------------------------------------------------------------------------------------------------


def asking(client, rank=4, cuts=False, objective=None):
    program = local_program(cuts=cuts, objective=objective or ControlVariates())
    return LocalRequest(client, 0, 0, 0.5 if cuts else 0.0, rank, program)


def update_of(own, kept):
    (plain,) = own.reference(rule(None)).train([job(own.adapter(), Structure.full(own.backbone.shape), 0)])
    return dataclasses.replace(plain, remembered=Remembered(ControlVariates(), kept))


def test_the_server_and_the_clients_remember(tiny_folders):
    """Two merges, written out: ``c`` moves by the clients' changes over the fleet's number."""
    own = toy(str(tiny_folders["bert"]), dtype=torch.float32)
    memory = ObjectiveMemory(own.adapter(), clients=10)
    assert memory.state() == {}
    assert all(float(tensor.abs().max()) == 0 for tensor in memory.carried(asking(3), True).tensors())
    first, second, again = variates(own, 1), variates(own, 2), variates(own, 3)
    memory.merge([3, 5], [update_of(own, first), update_of(own, second)])
    memory.merge([3], [update_of(own, again)])
    other = ObjectiveMemory(own.adapter(), clients=10)
    other.restore(memory.state())
    for each in (memory, other):
        for client, mine in ((3, again), (5, second), (7, None)):
            carried = each.carried(asking(client), True)
            tensors = (one.tensors() for one in (carried, first, second, again))
            for place, (got, a, b, c) in enumerate(zip(*tensors, strict=True)):
                shared = (a + b + (c - a)) / 10
                want = shared if mine is None else shared - list(mine.tensors())[place]
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
    assert memory.carried(dataclasses.replace(asking(3), program=local_program()), True) is None


@pytest.mark.parametrize(
    ("request_", "whole"), [(asking(1, rank=2), True), (asking(1, cuts=True), True), (asking(1), False)]
)
def test_a_memory_needs_whole_models_of_the_global_rank(tiny_folders, request_, whole):
    memory = ObjectiveMemory(toy(str(tiny_folders["bert"])).adapter(), clients=10)
    with pytest.raises(ConfigError, match=r"ControlVariates remembers .* global rank 4"):
        memory.carried(request_, whole)


def test_sets_are_as_wide_as_what_is_trained():
    tensors = Trained({"one": (torch.ones(1, 2, 3), torch.ones(1, 2, 5))}, {"w": torch.ones(1, 4)})
    assert [tuple(tensor.shape) for tensor in tensors.tensors()] == [(1, 2, 3), (1, 2, 5), (1, 4)]
    doubled = tensors.combined(tensors, torch.add)
    assert all(np.array_equal(tensor, np.full(tensor.shape, 2.0)) for tensor in doubled.tensors())
