"""The learner's books at fleet size, behind a stand-in for training: what is held, computed and touched how often."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedsim.contracts.common import Outcome
from fedsim.contracts.learning import LocalRequests
from fedsim.contracts.program import LocalProgram, Phase
from fedsim.learn import store as store_module
from fedsim.learn import structures_plan as plan_module
from fedsim.learn.learner import LearnerParts, LoraLearner
from fedsim.learn.model.adapter import Adapter
from fedsim.learn.model.linears import kept_columns, kept_rows, prunable_linears
from fedsim.learn.train.importance import Criterion, GroupScores, random_scores
from fedsim.learn.train.jobs import Update, target_structure
from fedsim.runner.config import build_config
from fedsim.structure import ModelShape

SHAPE = ModelShape("toy", "bert", 1, 8, 4, 4, 2, 12, 10, 8)


class StandIn:
    """Trains nothing: random factors of the right widths, random scores, and the pruning that is asked for."""

    def __init__(self):
        self.jobs = []

    def train(self, jobs):
        self.jobs.extend(jobs)
        return [self._update(job) for job in jobs]

    def _update(self, job):
        draw = np.random.default_rng([job.request.client, job.request.flight])
        scores = GroupScores(draw.random((1, 4)), draw.random((1, 12)))
        structure = (
            target_structure(job, job.start, scores, SHAPE, "layer_local") if job.request.program.cuts else job.start
        )
        factors = {}
        for linear in prunable_linears(SHAPE):
            rows, columns = kept_rows(linear, structure, SHAPE), kept_columns(linear, structure, SHAPE)
            a = draw.random((job.request.rank, linear.d_in if columns is None else len(columns)))
            b = draw.random((linear.d_out if rows is None else len(rows), job.request.rank))
            factors[linear.name] = (torch.from_numpy(a).float(), torch.from_numpy(b).float())
        adapter = Adapter(factors, {"weight": torch.zeros(2, 8)})
        return Update(adapter, structure, scores if job.guide is None else None, 5, 1.0, 0.5, 0.1, Outcome.OK)


def make_learner(scored_by=None, **prune):
    config = build_config({"method": "fedspine", "prune": prune}, {})
    factors = {
        linear.name: (torch.ones(2, linear.d_in), torch.zeros(linear.d_out, 2)) for linear in prunable_linears(SHAPE)
    }
    backbone = SimpleNamespace(shape=SHAPE, device=torch.device("cpu"))
    engine = SimpleNamespace(trainer=StandIn(), plan=None)
    parts = LearnerParts(config, backbone, engine, scored_by or Criterion(estimate=lambda model: None))
    return LoraLearner(parts, Adapter(factors, {"weight": torch.zeros(2, 8)}))


def play(learner, clients, round_index=0, ratio=0.0):
    clients = np.asarray(clients, dtype=np.int64)
    learner.aggregate(
        learner.result(
            learner.submit(
                LocalRequests(
                    clients=clients,
                    flight=np.full(len(clients), round_index),
                    version=round_index,
                    ratio_asked=np.full(len(clients), ratio),
                    rank=np.full(len(clients), 2),
                    program=LocalProgram((Phase(1, 1e-3, estimate=True), Phase(0, 1e-3, cut_before=ratio > 0))),
                )
            )
        )
    )


def states_equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_the_state_holds_who_took_part_and_nobody_else():
    learner = make_learner()
    play(learner, [3, 70_000])
    play(learner, [3, 130_000], 1)
    state = learner.state()
    assert state["structure_clients"].tolist() == state["score_clients"].tolist() == [3, 70_000, 130_000]
    assert state["structure_bits"].shape == (3, 2)
    assert state["scores"].shape == (3, 16)
    other = make_learner()
    other.restore({key: np.array(value) for key, value in state.items()})
    for each in (learner, other):
        play(each, [3, 5], 2, 0.5)
        each.cut(np.array([3, 4, 130_000]), np.array([0.6, 0.6, 0.6]))
    assert states_equal(learner.state(), other.state())


def test_a_job_sees_the_scores_that_a_resumed_run_would_see():
    learner = make_learner()
    play(learner, [1])
    play(learner, [1], 1)
    trainer = learner._parts.engine.trainer
    made = trainer._update(trainer.jobs[0]).scores
    seen = trainer.jobs[1].scores
    assert not np.array_equal(seen.channels, made.channels)
    assert np.array_equal(seen.channels, made.channels.astype(np.float32).astype(np.float64))


def test_a_round_touches_its_participants_rows_only(monkeypatch):
    touched = []
    for name in ("get", "put", "total"):
        real = getattr(store_module.Rows, name)

        def counted(self, *arguments, name=name, real=real):
            touched.append(name)
            return real(self, *arguments)

        monkeypatch.setattr(store_module.Rows, name, counted)
    counts = []
    for known in (40, 400):
        learner = make_learner()
        play(learner, range(known))
        touched.clear()
        play(learner, [0, 1, 2, known], 1, 0.5)
        counts.append(list(touched))
    assert counts[0] == counts[1]
    assert "total" not in counts[1]


@pytest.mark.parametrize("structure", ["device", "common"])
def test_what_no_client_can_change_is_computed_once(structure):
    asked = []
    criterion = Criterion(
        static=lambda backbone, seed, client: asked.append(client) or random_scores(SHAPE, 0, 0),
        same_for_all=structure == "device",
    )
    learner = make_learner(criterion, criterion="random", structure=structure)
    play(learner, range(50), 0, 0.3)
    play(learner, range(25, 75), 1, 0.5)
    learner.cut(np.arange(100), np.full(100, 0.6))
    assert asked == [0]


def test_scores_of_a_static_criterion_are_drawn_again_when_room_is_short(monkeypatch):
    asked = []
    criterion = Criterion(
        static=lambda backbone, seed, client: asked.append(client) or random_scores(SHAPE, seed, client)
    )
    states = []
    for room in (1, 1 << 20):
        monkeypatch.setattr(plan_module, "_STATIC_BYTES", room)
        learner = make_learner(criterion, criterion="random")
        play(learner, range(10), 0, 0.3)
        play(learner, range(10), 1, 0.6)
        states.append(learner.state())
        assert len(asked) == (20 if room == 1 else 10)
        asked.clear()
    assert states_equal(*states)
    masks = states[0]["structure_bits"]
    assert len(np.unique(masks, axis=0)) > 5


def test_a_common_mask_is_chosen_once_for_each_ratio_and_anew_after_an_aggregation(monkeypatch):
    chosen = []
    real = plan_module.select
    monkeypatch.setattr(plan_module, "select", lambda *arguments: chosen.append(arguments[3]) or real(*arguments))
    learner = make_learner(structure="common", reversible=False)
    play(learner, range(30))
    play(learner, range(30), 1, 0.3)
    assert chosen == [0.3]
    play(learner, range(30), 2, 0.3)
    assert chosen == [0.3, 0.3]


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("structure", ["device", "common"])
def test_a_cut_of_all_is_the_cut_of_each(structure, reversible):
    learner, single = (make_learner(structure=structure, reversible=reversible) for _ in range(2))
    for each in (learner, single):
        play(each, range(6))
        play(each, range(6), 1, 0.4)
    clients, ratios = np.arange(12), np.tile([0.2, 0.5, 0.6], 4)
    together = learner.cut(clients, ratios)
    apart = [single.cut(clients[i : i + 1], ratios[i : i + 1])[0] for i in range(12)]
    assert together.tolist() == apart
    assert states_equal(learner.state(), single.state())
