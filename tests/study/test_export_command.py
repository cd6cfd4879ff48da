"""``fedsim export`` of a small finished run: the models that the run tested, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import fedsim
from fedsim.cli import main
from fedsim.data.corpus import load_corpus
from fedsim.errors import ModelError, RunError
from fedsim.resources import resource_folder
from fedsim.runner.build import _with_test_sample
from fedsim.runner.config import build_config

SMALL = {
    "method": "fedspine",
    "model": {"name": "tiny", "lora_rank": 4, "lora_rank_max": 8},
    "data": {"name": "synthetic", "max_samples": 240},
    "fleet": {"clients": 6},
    "server": {"rounds": 4, "clients_per_round": 3, "checkpoint_every": 2},
    "train": {"local_steps": 6, "batch_size": 4, "max_length": 32, "learning_rate": 5e-3, "precision": "fp32"},
    "prune": {"warmup_rounds": 1, "end_round": 4, "max_step": 0.5},
    "evaluate": {"every_rounds": 4, "panel": 6, "max_samples": 120},
    "cost": {"model": "roberta-base", "batch_size": 8, "seq_len": 64},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Its panel is the whole fleet."""
    return fedsim.run(SMALL, out=tmp_path_factory.mktemp("runs") / "small", quiet=True)


@pytest.fixture
def copied(finished, tmp_path):
    """A run that a test may damage."""
    shutil.copytree(finished.path, tmp_path / "run")
    return tmp_path / "run"


def edit_manifest(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def accuracy(folder):
    config = build_config(SMALL)
    test = _with_test_sample(load_corpus(config.data, config.seed), config).test
    exported = fedsim.load_exported(folder)
    with torch.no_grad():
        return float((exported.logits(test.texts, test.pairs).argmax(dim=-1).numpy() == test.labels).mean())


def test_exports_are_the_models_that_the_run_tested(finished, tmp_path):
    """Mean accuracy of all six clients' exports, and the consensus's, are those in the records."""
    accuracies = []
    for client in range(6):
        out = tmp_path / f"client{client}"
        kind, merge = ("sliced", "dense")[client % 2], ["--merge"] * (client > 2)
        command = ["export", str(finished.path), "--device", str(client), "--format", kind, *merge, "--out", str(out)]
        assert main(command) == 0
        accuracies.append(accuracy(out))
    last = finished.rounds.iloc[-1]
    assert np.mean(accuracies) == pytest.approx(last["accuracy"], abs=1e-9)
    fedsim.export_run(finished, tmp_path / "consensus", consensus=True)
    assert accuracy(tmp_path / "consensus") == pytest.approx(last["accuracy_consensus"], abs=1e-9)


def test_what_is_printed_and_written(finished, tmp_path, capsys):
    command = ["export", str(finished.path), "--consensus", "--out", str(tmp_path / "made" / "model")]
    assert main([*command, "--format", "sliced"]) == 0
    printed = capsys.readouterr().out
    assert "consensus, sliced: pruning ratio 0." in printed
    assert "README.md" in printed
    facts = json.loads((tmp_path / "made" / "model" / "fedsim_export.json").read_text())
    manifest = finished.manifest
    assert facts["run"]["config_hash"] == manifest["config_hash"]
    assert facts["run"]["data_sha256"] == manifest["data"]["sha256"]
    assert facts["run"]["labels"] == ["reconstruction"]
    assert facts["prune_ratio"] == pytest.approx(manifest["final_prune_ratio"]["mean"], abs=0.15)
    assert facts["lora_rank"] == 8
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["model"]  # nothing temporary is left


def test_small_shapes_make_a_small_file(finished, tmp_path):
    dense = fedsim.export_run(finished, tmp_path / "dense", device=0)
    sliced = fedsim.export_run(finished, tmp_path / "sliced", device=0, format="sliced")
    assert dense.prune_ratio == sliced.prune_ratio > 0.2
    removed = dense.model_bytes - sliced.model_bytes
    prunable = 2 * (4 * 64 * 64 + 2 * 64 * 256) * 4  # tiny: two layers, hidden 64, FFN 256, fp32
    assert removed == pytest.approx(dense.prune_ratio * prunable, rel=0.02)
    assert sliced.adapter_bytes < dense.adapter_bytes


def test_a_client_that_never_took_part(tmp_path):
    """One round of two clients among six, with nothing pruned: four structures are full."""
    config = {**SMALL, "method": "fedlora", "prune": {}, "model": {"name": "tiny", "lora_rank": 4}}
    config["server"] = {"rounds": 1, "clients_per_round": 2}
    run = fedsim.run(config, out=tmp_path / "run", quiet=True)
    took_part = set(run.client_rounds["client"])
    idle = min(set(range(6)) - took_part)
    result = fedsim.export_run(run, tmp_path / "idle", device=idle)
    assert result.notes == (f"Client {idle} never took part in this run: its structure is full, nothing is pruned.",)
    assert result.notes[0] in (tmp_path / "idle" / "README.md").read_text()
    assert fedsim.export_run(run, tmp_path / "active", device=min(took_part)).notes == ()


def test_a_newcomer_of_a_pruned_fleet(finished, tmp_path):
    idle = sorted(set(range(6)) - set(finished.client_rounds["client"]))
    if not idle:
        pytest.skip("every client was sampled")
    result = fedsim.export_run(finished, tmp_path / "idle", device=idle[0])
    assert "final cut" in result.notes[0]
    assert result.prune_ratio > 0


def test_what_merge_rules_kept_apart_is_exported_too(tmp_path):
    """flora adds every round's LoRA to the base: the export must hold it, or its accuracy would be another."""
    config = {**SMALL, "method": "flora", "prune": {}}
    run = fedsim.run(config, out=tmp_path / "run", quiet=True)
    for client in range(6):
        fedsim.export_run(run, tmp_path / str(client), device=client)
    mean = np.mean([accuracy(tmp_path / str(client)) for client in range(6)])
    assert mean == pytest.approx(run.rounds["accuracy"].iloc[-1], abs=1 / 120)  # one sentence may sit on the edge


@pytest.mark.parametrize("client", [-1, 6])
def test_clients_out_of_range(finished, tmp_path, client):
    with pytest.raises(RunError, match=rf"--device: value {client} is not allowed .* clients 0 to 5"):
        fedsim.export_run(finished, tmp_path / "out", device=client)


def test_both_or_neither(finished, tmp_path, capsys):
    for words in (["--device", "1", "--consensus"], []):
        with pytest.raises(SystemExit):
            main(["export", str(finished.path), *words, "--out", str(tmp_path / "out")])
        assert "--consensus" in capsys.readouterr().err
    with pytest.raises(RunError, match="both are given"):
        fedsim.export_run(finished, tmp_path / "out", device=1, consensus=True)
    with pytest.raises(RunError, match="neither is given"):
        fedsim.export_run(finished, tmp_path / "out")
    with pytest.raises(RunError, match="did you mean 'sliced'"):
        fedsim.export_run(finished, tmp_path / "out", device=1, format="slice")


def test_a_folder_in_use(finished, tmp_path, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    assert main(["export", str(finished.path), "--consensus", "--out", str(tmp_path / "used")]) == 2
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert fedsim.export_run(finished, tmp_path / "empty", consensus=True).path.is_dir()


def test_a_folder_that_cannot_be_written(finished, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        fedsim.export_run(finished, tmp_path / "file" / "out", consensus=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "running"}, "is unfinished: go on with"),
        ({"engine": "none"}, "timing-only run: nothing was trained"),
        ({"engine": "surrogate"}, "surrogate run: nothing was trained"),
        ({"rounds": 9}, "ended after 9 rounds, but its newest checkpoint is of round 4"),
        ({"model": {"name": "tiny", "sha256": "0" * 64}}, "trained on other weights of model 'tiny'"),
    ],
)
def test_runs_that_have_no_model_to_give(copied, tmp_path, changes, message):
    edit_manifest(copied, **changes)
    with pytest.raises(RunError, match=message):
        fedsim.export_run(copied, tmp_path / "out", consensus=True)
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_sweep(copied, tmp_path, capsys):
    (tmp_path / "sweep.json").write_text("{}")
    assert main(["export", str(tmp_path), "--consensus", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"is a sweep's folder, not a run: choose one of its cells' folders, such as '{copied}'" in said
    edit_manifest(copied, status="running")
    with pytest.raises(RunError, match="is a sweep's folder, not a run, and has no finished cell yet"):
        fedsim.export_run(tmp_path, tmp_path / "out", consensus=True)


def test_a_base_model_that_has_gone(copied, tmp_path):
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("name: tiny", f"name: {tmp_path}/gone"))
    with pytest.raises(ModelError, match=r"cannot be exported without its base model: .* there is no such folder"):
        fedsim.export_run(copied, tmp_path / "out", consensus=True)


def test_a_checkpoint_of_another_model(copied, tmp_path):
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("pooling: native", "pooling: mean"))
    with pytest.raises(RunError, match="does not fit its configuration"):
        fedsim.export_run(copied, tmp_path / "out", consensus=True)


def test_the_inference_study_times_both_forms_of_a_run(finished, tmp_path):
    """It counts what was removed, and names what it cannot measure."""
    script = resource_folder("experiments") / "inference" / "measure.py"

    def measure(*arguments):
        return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)

    found = measure(finished.path, "--batch-size", "2", "--tokens", "8", "--turns", "3")
    assert found.returncode == 0, found.stderr
    removed, _, ratio = found.stdout.splitlines()
    assert "50.0% of the prunable weights removed" in removed
    median, least, most = (float(word) for word in re.findall(r"\d\.\d+", ratio))
    assert 0 < least <= median <= most
    missing = measure(tmp_path / "none")
    assert missing.returncode == 2
    assert "no such run directory" in missing.stderr
