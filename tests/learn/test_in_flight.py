"""Flights of several versions at once: what waits or was trained unread, resumed in the middle, given up, dropped."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch
from test_learner import make_learner, request, states_equal, submit
from test_learner_fleet import make_learner as make_stand_in

from fedsim.contracts.learning import LocalRequests
from fedsim.contracts.program import LocalProgram, Phase
from fedsim.cost.shapes import load_shape
from fedsim.learn.standins.timing_only import TimingLearner
from fedsim.methods.scaffold import ControlVariates
from fedsim.structure import Structure

PLAIN = LocalProgram((Phase(4, 1e-2, estimate=True),))


def copied(state):
    return {name: np.array(array) for name, array in state.items()}


def equal_results(one, other):
    for name in ("clients", "ratio", "loss_before", "loss_after", "lora_importance", "outcome", "rank"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    for left, right in zip(one.payload, other.payload, strict=True):
        assert left.structure.same_as(right.structure)
        for name, pair in left.adapter.factors.items():
            assert all(torch.equal(*both) for both in zip(pair, right.adapter.factors[name], strict=True))


def merge_rest(learner, tickets, mix=1.0):
    """Read and merge what is in flight, one after another, as an asynchronous server does."""
    results = []
    for ticket in tickets:
        result = learner.result(ticket[None])
        learner.aggregate(result, mix=mix, weights=np.array([0.75]))
        results.append(result)
    return results


TREES = {
    "device": {},
    "common": {"prune.structure": "common", "prune.reversible": False},
    "common-back": {"prune.structure": "common", "prune.reversible": True},
    "static": {"prune.criterion": "random"},
    "average": {"aggregate.rule": "average_factors", "control.policy": "uniform"},
    "stack": {"aggregate.rule": "stack"},
}


@pytest.mark.parametrize("engine", ["reference", "sliced"])
@pytest.mark.parametrize("tree", TREES)
def test_a_run_resumed_in_mid_flight_goes_on_to_the_bit(tiny_folders, tree, engine):
    """Three versions in flight: one trained and unread, two untrained, one of them of the present version."""
    folder, options = tiny_folders["roberta"], {**TREES[tree], "train.engine": engine}
    one, other = make_learner(folder, options), make_learner(folder, options)
    waiting = [submit(one, request(0), request(1))]
    one.aggregate(one.result(submit(one, request(2), request(3))))
    one.peek(waiting[0][:1])  # trains both
    waiting.append(submit(one, request(2, 1, 0.4), request(3, 1, 0.2)))
    one.aggregate(one.result(waiting[0][1:]))
    waiting.append(submit(one, request(1, 1, 0.4)))
    left = np.concatenate([waiting[0][:1], *waiting[1:]])

    state = copied(one.state())
    versions = {name.split(".")[2] for name in state if name.startswith("flights.version.")}
    assert len(versions) == 2, "each older version in flight once"
    other.restore(state)
    assert states_equal(state, other.state())
    results = [merge_rest(learner, left, 0.5) for learner in (one, other)]
    for pair in zip(*results, strict=True):
        equal_results(*pair)
    assert states_equal(one.state(), other.state())
    assert not any(name.startswith("flights.") for name in one.state())


def test_tickets_go_on_after_a_resume(tiny_folders):
    one, other = (make_learner(tiny_folders["bert"]) for _ in range(2))
    first = submit(one, request(0), request(1))
    one.discard(first[:1])
    other.restore(copied(one.state()))
    assert submit(other, request(2)).tolist() == submit(one, request(2)).tolist() == [3]
    with pytest.raises(KeyError):
        other.discard(first[:1])
    equal_results(other.peek(first[1:]), one.result(first[1:]))


def test_what_was_given_up_before_a_resume_is_never_trained():
    learner = make_stand_in()
    requests = LocalRequests(np.arange(3), np.zeros(3, dtype=int), 0, np.zeros(3), np.full(3, 2), PLAIN)
    tickets = learner.submit(requests)
    learner.discard(tickets[1:2])
    again = make_stand_in()
    again.restore(copied(learner.state()))
    again.result(tickets[[2]])
    assert [job.request.client for job in again._parts.engine.trainer.jobs] == [0, 2]


def test_two_flights_of_version_0_merged_in_turn_both_count(tiny_folders):
    """The final adapter's product is the sum of what each would have made of the first alone."""
    options = {"aggregate.rule": "lowrank", "model.lora_rank_max": 8}
    learner = make_learner(tiny_folders["roberta"], options)
    first = learner.adapter
    tickets = submit(learner, request(0, rank=2), request(1, rank=2))
    updates = [learner.peek(tickets[[place]]).payload[0] for place in (0, 1)]
    for place in (0, 1):
        learner.aggregate(learner.result(tickets[[place]]))
    for name, (a, b) in learner.adapter.factors.items():
        want = sum(update.adapter.factors[name][1] @ update.adapter.factors[name][0] for update in updates)
        torch.testing.assert_close(b @ a, want, rtol=0, atol=1e-6)
    for name, tensor in learner.adapter.head.items():
        changes = sum(update.adapter.head[name] - first.head[name] for update in updates)
        torch.testing.assert_close(tensor, first.head[name] + changes)


def test_an_older_version_is_held_as_long_as_a_flight_needs_it():
    learner = make_stand_in()
    columns = [np.zeros(1, dtype=int), 0, np.zeros(1), np.full(1, 2), PLAIN]
    old = weakref.ref(learner.adapter)
    slow, fast = (learner.submit(LocalRequests(np.array([client]), *columns)) for client in (0, 1))
    learner.aggregate(learner.result(fast))
    gc.collect()
    learner._parts.engine.trainer.jobs.clear()
    assert old() is not None
    learner.aggregate(learner.result(slow))
    learner._parts.engine.trainer.jobs.clear()
    gc.collect()
    assert old() is None


def test_the_timing_learner_keeps_what_waits():
    shape = load_shape("roberta-base")
    one, other = TimingLearner(shape), TimingLearner(shape)
    program = LocalProgram((Phase(3, 1e-2), Phase(1, 1e-2, cut_before=True)))
    requests = LocalRequests(np.array([4, 9]), np.array([1, 2]), 3, np.array([0.2, 0.5]), np.array([2, 8]), program)
    tickets = one.submit(requests)
    more = one.submit(requests)
    one.discard(tickets[:1])
    assert one.peek(tickets[1:]).clients.tolist() == [9]
    other.restore(copied(one.state()))
    for learner in (one, other):
        result = learner.result(np.concatenate([more, tickets[1:]]))
        assert result.clients.tolist() == [4, 9, 9]
        np.testing.assert_array_equal(result.ratio, one.cut(np.zeros(3, dtype=int), np.array([0.2, 0.5, 0.5])))
        assert learner.state() == {}
        assert learner.submit(requests).tolist() == [5, 6]


def test_structures_in_flight_are_those_at_dispatch(tiny_folders):
    """A cut and a merge after the dispatch change the client, not the job; resumed or not."""
    one, other = (make_learner(tiny_folders["bert"]) for _ in range(2))
    one.aggregate(one.result(submit(one, request(0), request(1))))
    ticket = submit(one, request(0, 1, 0.2))
    one.cut(np.arange(2), np.full(2, 0.6))
    other.restore(copied(one.state()))
    for learner in (one, other):
        result = learner.result(ticket)
        assert result.kept_before[0].sum() == Structure.full(learner._parts.backbone.shape).head_mask.sum()
        assert abs(result.ratio[0] - 0.2) < 0.15


class Momentum:
    """A toy server optimizer: half of what was added before, and the mean difference."""

    def __init__(self):
        self.added = {}

    def __call__(self, name, difference):
        self.added[name] = difference + 0.5 * self.added.get(name, 0.0)
        return self.added[name]

    def state(self):
        return {name: tensor.numpy().copy() for name, tensor in self.added.items()}

    def restore(self, state):
        self.added = {name: torch.from_numpy(array) for name, array in state.items()}


@pytest.mark.parametrize("rule", ["lowrank", "average_factors", "stack"])
def test_a_server_optimizer_answers_every_merge_and_is_resumed(tiny_folders, rule):
    """By the head, which all rules average alike; then a resumed learner goes on to the bit."""

    def make():
        tree = {"aggregate.rule": rule, **({"control.policy": "uniform"} if rule == "average_factors" else {})}
        learner = make_learner(tiny_folders["bert"], tree)
        learner._parts = dataclasses.replace(learner._parts, server=Momentum())
        return learner

    one, other = make(), make()
    start, added = one.adapter.head, {}
    for turn in range(2):
        result = one.result(submit(one, request(turn, turn)))
        one.aggregate(result)
        (update,) = result.payload
        for name, now in one.adapter.head.items():
            added[name] = update.adapter.head[name] - start[name] + 0.5 * added.get(name, 0.0)
            torch.testing.assert_close(now, start[name] + added[name])
        start = one.adapter.head
    other.restore(copied(one.state()))
    for learner in (one, other):
        learner.aggregate(learner.result(submit(learner, request(3, 2))), mix=0.5)
    assert states_equal(one.state(), other.state())
    assert any(name.startswith("server.") for name in one.state())


def test_what_jobs_carry_and_leave_to_a_memory_is_resumed(tiny_folders):
    """SCAFFOLD in mid-flight: one job trained and unread, one waiting; then two merges, to the bit."""
    program = LocalProgram((Phase(3, 1e-2),), ControlVariates())

    def make():
        tree = {"aggregate.rule": "average_factors", "control.policy": "uniform"}
        learner = make_learner(tiny_folders["bert"], tree, method="fedlora")
        learner._parts = dataclasses.replace(learner._parts, objective_at=lambda version: ControlVariates())
        return learner

    def sent(learner, client, turn):
        return submit(learner, dataclasses.replace(request(client, turn), program=program))

    one, other = make(), make()
    for client in (0, 1):
        one.aggregate(one.result(sent(one, client, 0)))
    tickets = np.concatenate([sent(one, 0, 1), sent(one, 2, 0)])
    one.peek(tickets[:1])
    waiting = sent(one, 1, 1)
    state = copied(one.state())
    assert len(state["memory_clients"]) == 2
    other.restore(state)
    assert states_equal(state, other.state())
    for learner in (one, other):
        for ticket in (*tickets, *waiting):
            learner.aggregate(learner.result(ticket[None]))
    assert states_equal(one.state(), other.state())
    assert one.state()["memory_clients"].tolist() == [0, 1, 2]
    assert np.abs(one.state()["memory_shared"]).max() > 0
