"""Whole runs on each engine: the same clock, the same learning to rounding, and a resumed run to the bit."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

import fedsim
import fedsim.runner.run as run_module
from fedsim.errors import ConfigError

CONFIG = {
    "method": "fedspine_uniform",
    "model": {"name": "tiny", "lora_rank": 4, "lora_rank_max": 8},
    "data": {"name": "synthetic", "max_samples": 240, "partition": "dirichlet", "alpha": 10.0},
    "fleet": {"clients": 6},
    "server": {"rounds": 5, "clients_per_round": 4, "checkpoint_every": 1},
    "train": {"local_steps": 4, "batch_size": 4, "max_length": 32, "learning_rate": 5e-3, "precision": "fp32"},
    "prune": {"warmup_rounds": 1, "end_round": 4, "max_step": 0.5},
    "evaluate": {"every_rounds": 2, "panel": 3, "max_samples": 60},
    "cost": {"model": "roberta-base", "batch_size": 8, "seq_len": 64},
}


def run(out, **overrides):
    return fedsim.run(CONFIG, out=out, quiet=True, **{"train.torch_device": "cpu", **overrides})


@pytest.fixture(scope="module")
def auto(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "auto", **{"train.engine": "auto"})


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "reference", **{"train.engine": "reference"})


LEARNED = ["loss_before", "loss_after", "reward", "lora_importance", "reward_loss", "reward_importance"]


@pytest.mark.parametrize("engine", ["auto", "masked"])
def test_engines_agree_on_a_whole_run(auto, reference, tmp_path, engine):
    """The policy is `uniform`, which reads no losses: equal clocks to the bit, learning to rounding (1e-7)."""
    mine = auto if engine == "auto" else run(tmp_path / engine, **{"train.engine": engine})
    assert mine.manifest["trace_hash"] == reference.manifest["trace_hash"]
    rows, want = mine.client_rounds, reference.client_rounds
    pd.testing.assert_frame_equal(rows.drop(columns=LEARNED), want.drop(columns=LEARNED), check_exact=True)
    assert want["prune_ratio"].max() > 0.4
    for column in LEARNED:
        np.testing.assert_allclose(rows[column], want[column], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(rows["lora_importance"], want["lora_importance"], rtol=1e-3)  # all of it is below 1e-4
    accuracy, expected = mine.rounds["accuracy"].dropna(), reference.rounds["accuracy"].dropna()
    assert len(accuracy) == 3
    np.testing.assert_allclose(accuracy, expected, atol=2 / 60)  # two of the 60 test sentences
    np.testing.assert_allclose(mine.rounds["loss"].dropna(), reference.rounds["loss"].dropna(), rtol=1e-3)


def test_the_manifest_names_the_path_and_its_precision(auto, reference):
    assert auto.manifest["engine"] == "sliced"
    assert auto.manifest["precision"] == "fp32"
    assert auto.manifest["chunk_clients"] >= 1
    assert reference.manifest["engine"] == "reference"
    assert reference.manifest["chunk_clients"] == 1


def weights(run):
    return load_file(run.path / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("stopped_after", [1, 3])
def test_a_resumed_run_is_bit_equal(auto, tmp_path, monkeypatch, stopped_after):
    """Stopped before the first cut and among the cuts."""
    real = run_module.save_checkpoint

    def save_and_die(folder, next_round, state, meta):
        real(folder, next_round, state, meta)
        if next_round == stopped_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", **{"train.engine": "auto"})
    resumed = fedsim.run(CONFIG, out=tmp_path / "run", quiet=True, resume=True, **{"train.torch_device": "cpu"})
    assert resumed.manifest["trace_hash"] == auto.manifest["trace_hash"]
    pd.testing.assert_frame_equal(resumed.client_rounds, auto.client_rounds, check_exact=True)
    pd.testing.assert_frame_equal(
        resumed.rounds.drop(columns="host_s"), auto.rounds.drop(columns="host_s"), check_exact=True
    )
    mine, want = weights(resumed), weights(auto)
    assert all(np.array_equal(mine[name], want[name]) for name in want)


def test_chunks_by_a_memory_budget_change_rounding_only(auto, tmp_path):
    with pytest.raises(ConfigError) as refused:
        run(tmp_path / "none", **{"train.engine": "auto", "train.memory_budget_bytes": 1})
    one_client = int(re.search(r"about (\d+) bytes", str(refused.value))[1])
    small = run(tmp_path / "small", **{"train.engine": "auto", "train.memory_budget_bytes": one_client})
    assert small.manifest["chunk_clients"] == 1
    assert auto.manifest["chunk_clients"] > 1
    assert small.manifest["trace_hash"] == auto.manifest["trace_hash"]
    np.testing.assert_allclose(
        small.client_rounds["loss_after"], auto.client_rounds["loss_after"], rtol=1e-3, atol=1e-4
    )
