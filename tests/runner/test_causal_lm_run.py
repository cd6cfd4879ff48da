"""Whole runs on prompts and responses: both engines, the clock, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import fedsim
from fedsim.errors import ConfigError, FedsimError, ModelError, RunError
from fedsim.plots import write_figures

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "learn"))

from causal_toys import save_causal

ROUNDS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_causal(tmp_path_factory.mktemp("causal")))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """A language in which every response counts on from its prompt's last word, by the category's step."""
    draw, path = np.random.default_rng(3), tmp_path_factory.mktemp("data") / "a.jsonl"
    with path.open("w") as file:
        for row in range(400):
            step, first = 1 + row % 2, int(draw.integers(0, 50))
            words = [f"w{(first + step * place) % 55}" for place in range(6)]
            context = "" if row % 3 else "w7"
            row_ = {"ask": words[0], "given": context, "say": " ".join(words[1:]), "kind": f"step{step}"}
            file.write(json.dumps(row_) + "\n")
    return str(path)


def overrides(model: str, data: str, **changes) -> dict[str, object]:
    return {
        "model.name": model,
        "model.lora_rank": 4,
        "model.lora_rank_max": 8,
        "data.name": None,
        "data.path": data,
        "data.task": "causal_lm",
        "data.text": "ask",
        "data.pair": "given",
        "data.label": "say",
        "data.field": "kind",
        "data.alpha": 0.5,
        "fleet.clients": 6,
        "server.rounds": ROUNDS,
        "prune.warmup_rounds": 1,
        "prune.end_round": 3,
        "prune.target": 0.3,
        "train.local_steps": 10,
        "train.learning_rate": 2e-2,
        "train.max_length": 16,
        "train.precision": "fp32",
        "evaluate.every_rounds": 1,
        "cost.model": None,
        **changes,
    }


@pytest.fixture(scope="module")
def runs(model, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return {
        engine: fedsim.run(
            "quickstart",
            method="fedspine_uniform",
            out=out / engine,
            quiet=True,
            **overrides(model, data, **{"train.engine": engine}),
        )
        for engine in ("auto", "reference")
    }


def test_perplexity_falls_and_both_engines_agree(runs):
    run = runs["auto"]
    assert run.is_language_model
    np.testing.assert_allclose(run.perplexity, np.exp(run.rounds["loss"]))
    assert run.perplexity.iloc[-1] < 0.85 * run.perplexity.iloc[0]
    assert run.client_rounds["prune_ratio"].iloc[-1] > 0.2
    for column in ("accuracy", "loss", "accuracy_consensus"):
        np.testing.assert_allclose(run.rounds[column], runs["reference"].rounds[column], rtol=2e-2)
    np.testing.assert_array_equal(run.rounds["end_s"], runs["reference"].rounds["end_s"])
    assert run.manifest["data"]["label_names"] == ["step1", "step2"]
    assert "token accuracy" in run.summary()
    assert f"perplexity {run.perplexity.iloc[-1]:.1f}" in run.summary()


def test_no_head_travels(runs):
    """Down at rank 4, unpruned: the factors of query and output, key and value, and the FFN, in fp32."""
    first = runs["auto"].client_rounds.query("round == 0")
    widths = 2 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 12))
    assert set(first["bytes_down"]) == {4 * 4 * widths}


def test_figures_have_the_perplexity_beside_the_accuracy(runs, tmp_path):
    names = {path.stem for path in write_figures([runs["auto"]], tmp_path)}
    assert {"accuracy_over_time", "perplexity_over_time"} <= names


def test_the_adapter_of_a_run_loads_onto_the_plain_model(runs, model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model)
    loaded = PeftModel.from_pretrained(plain, str(runs["auto"].path / "adapter"))
    assert loaded.peft_config["default"].task_type == "CAUSAL_LM"


def test_the_clock_counts_the_output_and_timing_only_runs_need_no_data(tmp_path):
    """tinyllama-1.1b on the clock, in both tasks: the same but for the output."""
    values = {"train.engine": "none", "server.rounds": 2, "prune.warmup_rounds": 0, "prune.end_round": 1}
    values |= {"model.name": "tinyllama-1.1b", "cost.model": "tinyllama-1.1b", "cost.precision": "fp16"}
    values |= {"cost.batch_size": 2, "cost.seq_len": 128, "model.lora_rank_max": 8}
    seconds = [
        fedsim.run("quickstart", method="fedlora", out=tmp_path / task, quiet=True, **values, **{"data.task": task})
        .client_rounds["compute_s"]
        .sum()
        for task in ("causal_lm", "classification")
    ]
    assert 1.02 < seconds[0] / seconds[1] < 1.15


@pytest.mark.parametrize(
    ("changes", "error", "pattern"),
    [
        ({"model.name": "tiny"}, ModelError, r"model 'tiny' is of type 'roberta', an encoder"),
        ({"cost.model": "roberta-base"}, ModelError, r"model 'roberta-base' is of type 'roberta', an encoder"),
        (
            {"model.pooling": "mean"},
            ConfigError,
            r"model.pooling: value 'mean' is not allowed with data.task causal_lm",
        ),
        ({"data.label": "label"}, FedsimError, r"data.label 'label' is not there \(columns: ask, given, say, kind\)"),
        ({"data.label": "given"}, FedsimError, r"data.pair and data.label are both 'given'"),
        ({"train.max_length": 1}, ConfigError, r"train.max_length: value 1 is not allowed with data.task causal_lm"),
        ({"data.path": None, "data.name": "synthetic"}, FedsimError, r"'synthetic' has no responses"),
    ],
)
def test_refusals(model, data, tmp_path, changes, error, pattern):
    with pytest.raises(error, match=pattern) as caught:
        fedsim.run("quickstart", method="fedlora", out=tmp_path / "x", quiet=True, **overrides(model, data, **changes))
    assert "\n" not in str(caught.value)


def test_a_classifying_run_has_no_perplexity(tmp_path):
    values = {"train.engine": "none", "server.rounds": 2}
    run = fedsim.run("quickstart", method="fedlora", out=tmp_path / "x", quiet=True, **values)
    with pytest.raises(RunError, match=r"data.task is not causal_lm"):
        _ = run.perplexity
