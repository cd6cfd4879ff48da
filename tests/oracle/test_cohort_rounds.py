"""Oracle: ten federated rounds of both cohort engines equal ten rounds of the reference engine.

Through the learner, with aggregation in between: what one round changes the next one starts from, so that an error
too small to see in one would grow. Jobs are trained in float64; between rounds the learner keeps adapters and scores
in float32, whatever the engine. So engines differ where a number falls on the seam of two float32 numbers, if at all.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.contracts.learning import LocalRequests
from fedsim.learn.engine import make_engine
from fedsim.learn.learner import LearnerParts, LoraLearner
from fedsim.learn.model.adapter import Adapter, initial_adapter
from fedsim.learn.model.backbone import load_backbone
from fedsim.learn.train.importance import find_criterion
from fedsim.learn.train.jobs import TrainRule
from fedsim.runner.config import build_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "learn"))
from cohort_toys import CLIENTS, LABELS, local_program, toy_data, toy_text
from tiny_checkpoints import ARCHITECTURES, save_tiny

ROUNDS = 10
PANEL = np.array([0, 1, 4])
BASE = {
    "method": "fedspine",
    "model": {"lora_rank": 2, "lora_rank_max": 4},
    "train": {"batch_size": 5, "max_length": 16, "precision": "fp32", "torch_device": "cpu"},
}

SCENARIOS = {
    "own structures": ("bert", {}),
    "one mask, may grow back": (
        "roberta",
        {"model.pooling": "mean", "prune.structure": "common", "prune.reversible": True, "prune.importance_every": 3},
    ),
    "unequal layers": (
        "llama",
        {"prune.selection": "global", "train.recovery_steps": 0, "prune.reversible": False},
    ),
    "magnitude, may grow back": (
        "bert",
        {"model.pooling": "mean", "prune.criterion": "magnitude", "prune.reversible": True},
    ),
    "random, weighted by importance": (
        "llama",
        {"model.pooling": "mean", "prune.criterion": "random", "aggregate.importance_weight": 1.0},
    ),
    "no pruning, some linears, one rank": (
        "roberta",
        {"method": "fedlora", "model.lora_targets": ["query", "value"], "aggregate.rule": "average_factors"},
    ),
    "no pruning, ranks above the adapter's": (
        "bert",
        {"method": "fedlora", "model.pooling": "mean", "aggregate.rule": "lowrank"},
    ),
    "distilbert, own structures": ("distilbert", {}),
    "mpnet, own structures": ("mpnet", {"prune.reversible": True}),
    "mpnet, one mask, all tokens": ("mpnet", {"model.pooling": "mean", "prune.structure": "common"}),
    "mpnet, no pruning": ("mpnet", {"method": "fedlora", "aggregate.rule": "lowrank"}),
    "qwen2, unequal layers": ("qwen2", {"prune.selection": "global"}),
}


def cast(adapter, dtype):
    factors = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in adapter.factors.items()}
    return Adapter(factors, {name: tensor.to(dtype) for name, tensor in adapter.head.items()})


class DoubleTrainer:
    """Jobs' adapters to float64, updates' back to float32."""

    def __init__(self, trainer):
        self._trainer = trainer

    def train(self, jobs):
        doubled = {id(one.adapter): cast(one.adapter, torch.float64) for one in jobs}
        updates = self._trainer.train([replace(one, adapter=doubled[id(one.adapter)]) for one in jobs])
        return [replace(update, adapter=cast(update.adapter, torch.float32)) for update in updates]


class DoubleTester:
    """The global adapter to float64."""

    def __init__(self, tester):
        self._tester = tester

    def measure(self, adapter, structures):
        return self._tester.measure(cast(adapter, torch.float64), structures)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save_tiny(name, tmp_path_factory.mktemp(name)) for name in ARCHITECTURES}


def make_learners(folder, tree):
    """The same learner on each engine: one backbone, in float64."""
    config = build_config({**BASE, "model": {**BASE["model"], "name": str(folder)}}, tree)
    backbone = load_backbone(config.model, LABELS, config.seed, torch.device("cpu"))
    backbone.model.to(torch.float64)
    uniform = config.aggregate.rule == "average_factors"
    rank = config.model.lora_rank if uniform else config.model.lora_rank_max
    adapter = initial_adapter(backbone, config.model.lora_targets, rank, config.seed)
    doubled = cast(adapter, torch.float64)
    criterion, prunes = find_criterion(config.prune.criterion), config.method != "fedlora"
    rule = TrainRule(
        config.seed,
        config.train.batch_size,
        criterion if prunes else None,
        config.prune.importance_every,
        config.prune.selection,
    )
    learners = {}
    for name in ("reference", "masked", "sliced"):
        own = config.model_copy(update={"train": config.train.model_copy(update={"engine": name})})
        test = toy_text(20, seed=7)
        engine = make_engine(own, backbone, doubled, toy_data(), test, rule, "fp32")
        assert engine.name == name
        engine = replace(engine, trainer=DoubleTrainer(engine.trainer), tester=DoubleTester(engine.tester))
        learners[name] = LoraLearner(LearnerParts(own, backbone, engine, criterion), adapter)
    return config, learners


def plan(config, round_index):
    """Three of six clients, with mixed ranks and ratios that rise from the third round on."""
    draw = np.random.default_rng(round_index)
    clients = np.sort(draw.choice(CLIENTS, 3, replace=False))
    prunes = config.method != "fedlora" and round_index >= 2
    ranks = {"average_factors": (2,), "lowrank": (1, 2, 4, 6)}[config.aggregate.rule]
    return LocalRequests(
        clients=clients,
        flight=np.full(len(clients), round_index),
        version=round_index,
        ratio_asked=np.where(prunes, np.minimum(0.6, 0.07 * round_index + 0.1 * (clients % 3)), 0.0),
        rank=draw.choice(ranks, 3),
        program=local_program(
            recovery=1 if config.train.recovery_steps is None else config.train.recovery_steps, rate=5e-3, cuts=prunes
        ),
    )


@pytest.mark.parametrize("name", SCENARIOS)
def test_ten_rounds_equal_the_references(folders, name):
    architecture, tree = SCENARIOS[name]
    config, learners = make_learners(folders[architecture], tree)
    reference = learners.pop("reference")
    gains, cuts = [], 0
    for round_index in range(ROUNDS):
        requests = plan(config, round_index)
        want = reference.result(reference.submit(requests))
        reference.aggregate(want)
        gains.append(float((want.loss_before - want.loss_after).mean()))
        cuts += int((want.kept_after[1] < want.kept_before[1]).any())
        for own in learners.values():
            results = own.result(own.submit(requests))
            own.aggregate(results)
            for column in ("clients", "ratio", "outcome", "kept_before", "kept_after"):
                assert np.array_equal(getattr(results, column), getattr(want, column)), (round_index, column)
            for column in ("loss_before", "loss_after", "lora_importance"):
                np.testing.assert_allclose(getattr(results, column), getattr(want, column), rtol=1e-6, atol=1e-9)
            assert_same_state(own.state(), reference.state())
            if round_index in (1, ROUNDS - 1):
                assert_same_evaluation(own, reference)
    assert cuts >= (3 if config.method != "fedlora" else 0)
    last = np.arange(CLIENTS)
    ratios = np.full(CLIENTS, 0.6)
    if config.method != "fedlora":
        achieved = reference.cut(last, ratios)
        for own in learners.values():
            assert np.array_equal(own.cut(last, ratios), achieved)
            assert_same_evaluation(own, reference)
    assert np.mean(gains) > 0.01  # the jobs do learn


def assert_same_state(mine, theirs):
    """Adapters, structures and scores; how many clients a cohort engine takes at a time is its own affair."""
    assert mine.keys() - {"chunk_clients"} == theirs.keys()
    for key in theirs.keys() - {"cohorts"}:  # how jobs were grouped is an engine's own affair, too
        values = mine[key]
        if values.dtype.kind != "f":
            assert np.array_equal(values, theirs[key]), key
        else:
            np.testing.assert_allclose(values, theirs[key], rtol=1e-5, atol=1e-6, err_msg=key)


def assert_same_evaluation(mine, theirs):
    one, other = (learner.evaluate(PANEL, 0.4) for learner in (mine, theirs))
    assert one.accuracy == other.accuracy
    assert one.accuracy_consensus == other.accuracy_consensus
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
