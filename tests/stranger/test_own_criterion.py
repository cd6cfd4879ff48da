"""Criteria of one's own: keep the first channels and heads; and scores counted from the gradients of each step."""

import numpy as np
import pytest
import torch
from transformers import AutoModel

import fedsim
from fedsim.errors import ConfigError
from fedsim.learn.train.importance import GroupScores, lora_guided

SMALL = {
    "method": "fedspine_uniform",
    "data": {"max_samples": 60},
    "model": {"lora_rank": 4, "lora_rank_max": 8},
    "fleet": {"clients": 2},
    "server": {"rounds": 3},
    "train": {"local_steps": 4, "batch_size": 4, "max_length": 16},
    "prune": {"warmup_rounds": 1, "end_round": 3, "max_step": 0.5},
}
TIMING = {**SMALL, "train": {"engine": "none"}}


def first_ones(backbone, seed, client):
    shape = backbone.shape
    heads, channels = np.arange(shape.head_groups, 0, -1.0), np.arange(shape.ffn, 0, -1.0)
    return GroupScores(np.tile(heads, (shape.layers, 1)), np.tile(channels, (shape.layers, 1)))


def test_a_static_one_says_what_is_kept(tmp_path):
    fedsim.register_criterion("first_ones", static=first_ones, same_for_all=True)
    run = fedsim.run(SMALL, out=tmp_path / "run", quiet=True, prune__criterion="first_ones")
    fedsim.export_run(run, tmp_path / "model", device=1)
    weights = AutoModel.from_pretrained(tmp_path / "model").state_dict()
    layers = [weight for name, weight in weights.items() if name.endswith("intermediate.dense.weight")]
    assert len(layers) >= 2
    for weight in layers:
        kept = weight.any(dim=1)
        assert 0 < kept.sum() < len(kept)
        assert torch.equal(kept, torch.arange(len(kept)) < kept.sum())


def test_an_estimated_one_is_asked_after_backward_passes(tmp_path):
    calls = []
    fedsim.register_criterion("counted", estimate=lambda model: calls.append(model) or lora_guided(model))
    run = fedsim.run(SMALL, out=tmp_path / "run", quiet=True, prune__criterion="counted")
    assert len(calls) == 2 * 3 * 4  # clients, rounds, local steps
    assert run.manifest["engine"] == "reference"  # it has no form for clients that are trained together
    assert run.client_rounds["prune_ratio"].iloc[-1] == pytest.approx(0.5, abs=0.05)


def test_a_static_one_costs_devices_nothing(tmp_path):
    fedsim.register_criterion("free", static=first_ones)
    fedsim.register_criterion("dear", estimate=lora_guided)
    seconds = {
        name: fedsim.run(TIMING, out=tmp_path / name, quiet=True, prune__criterion=name)
        .client_rounds["compute_s"]
        .sum()
        for name in ("magnitude", "free", "lora_guided", "dear")
    }
    assert seconds["free"] == seconds["magnitude"] < seconds["lora_guided"] == seconds["dear"]


def test_exactly_one_kind_is_registered():
    for wrong in ({}, {"estimate": lora_guided, "static": first_ones}):
        with pytest.raises(ConfigError, match="needs either estimate"):
            fedsim.register_criterion("wrong", **wrong)
    with pytest.raises(ConfigError, match="needs a function"):
        fedsim.register_criterion("wrong", static="first_ones")
