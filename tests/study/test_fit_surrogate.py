"""Fitting a surrogate: to a small real run, to a run whose model is known, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from made_up import write_run

import fedsim
from fedsim.cli import main
from fedsim.errors import ConfigError, RunError
from fedsim.learn.standins.surrogate_model import read_surrogate
from fedsim.records.reader import Run, load
from fedsim.study.fit_surrogate import fit, fit_surrogate
from fedsim.study.surrogate_rows import source_rows

REAL = {
    "method": "fedspine",
    "model": {"name": "tiny", "lora_rank": 4, "lora_rank_max": 8},
    "data": {"name": "synthetic", "max_samples": 1200},
    "fleet": {"clients": 8},
    "server": {"rounds": 12, "checkpoint_every": 1},
    "train": {"local_steps": 5, "batch_size": 8, "max_length": 32, "learning_rate": 5e-3},
    "prune": {"warmup_rounds": 4, "end_round": 10, "importance_every": 2},
    "evaluate": {"every_rounds": 2, "panel": 3, "max_samples": 100},
    "cost": {"model": "roberta-base", "batch_size": 8, "seq_len": 64},
}
SPENT = ["host_s"]
BAND_LOSS = 0.08
"""Root mean square distance of the mean loss per round, real against surrogate (the real one falls by 0.5)."""
BAND_ACCURACY = 0.04
"""The same for accuracy at each evaluation: the standard error of 80% of 100 sentences."""


def surrogate_of(file, **sections):
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in REAL.items()}
    tree["train"] |= {"engine": "surrogate", "surrogate": str(file)}
    for section, values in sections.items():
        tree[section] = {**tree[section], **values} if isinstance(values, dict) else values
    return tree


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A real run: eight clients, twelve rounds."""
    return fedsim.run(REAL, out=tmp_path_factory.mktemp("runs") / "real", quiet=True)


@pytest.fixture(scope="module")
def file(real, tmp_path_factory):
    path = tmp_path_factory.mktemp("fits") / "s.json"
    fit_surrogate(real.path, path)
    return path


def root_mean_square(one, other):
    return float(np.sqrt(np.mean((np.asarray(one) - np.asarray(other)) ** 2)))


def test_it_reproduces_the_mean_losses_and_the_accuracy_of_its_source(real, file, tmp_path):
    """Many simulated clients, so that their mean is the model's and not luck."""
    many = fedsim.run(surrogate_of(file, fleet={"clients": 200}), out=tmp_path / "many", quiet=True)
    for name in ("loss_before", "loss_after"):
        one, other = (run.client_rounds.groupby("round")[name].mean() for run in (real, many))
        assert one.max() - one.min() > 0.3  # there is a curve to reproduce
        assert root_mean_square(one, other) < (1 if name == "loss_before" else 1.5) * BAND_LOSS
    tested = real.rounds["accuracy"].notna()
    assert real.rounds["accuracy"].max() > 0.75
    for name in ("accuracy", "accuracy_consensus"):
        assert root_mean_square(real.rounds[name][tested], many.rounds[name][tested]) < BAND_ACCURACY


def test_the_file_says_what_it_is_and_how_well_it_fits(real, file):
    model, _ = read_surrogate(file)
    assert model.source.config_hash == real.manifest["config_hash"]
    assert (model.source.method, model.source.model, model.source.clients) == ("fedspine", "tiny", 8)
    assert model.source.data_sha256 == real.manifest["data"]["sha256"]
    assert model.seen.rank == [2.0, 8.0]
    assert set(model.quality) == {
        "loss_before",
        "loss_after",
        "accuracy",
        "accuracy_consensus",
        "loss",
        "lora_importance",
    }
    assert model.quality["loss_before"].rows == 96
    assert model.quality["accuracy"].rows == 6
    assert model.quality["accuracy"].r2 > 0.8
    again = fit(real)
    assert again == model


def test_importance_is_the_recorded_one_over_the_largest_of_its_round(real):
    rows = source_rows(real)
    assert np.isfinite(rows.importance).all()
    assert rows.importance.min() >= 0
    largest = pd.Series(rows.importance).groupby(rows.round_index).max()
    np.testing.assert_allclose(largest, 1.0, atol=1e-6)
    assert rows.importance.std() > 0.05
    trained = real.client_rounds[real.client_rounds["outcome"] == "ok"]
    share = trained["lora_importance"] / trained.groupby("round")["lora_importance"].transform("max")
    np.testing.assert_array_equal(rows.importance, share)
    np.testing.assert_allclose(rows.importance, trained["reward_importance"], rtol=1e-12)


def test_a_run_whose_records_lack_importance_is_fitted_without_and_says_so(real):
    older = load(real.path)
    older.__dict__["client_rounds"] = real.client_rounds.assign(lora_importance=None)
    model = fit(older)
    assert model.importance is None
    assert "no importance: the run's records do not hold it, so the reward goes without that term" in model.notes


def test_a_pass_that_learns_nothing_is_no_dose(real):
    """Round 0 of prune_then_tune trains at a rate of zero."""
    passed = Run(real.path, {**real.config, "method": "prune_then_tune"}, real.manifest)
    rows = source_rows(passed)
    assert (rows.dose[rows.round_index == 0] == 0).all()
    np.testing.assert_allclose(rows.round_dose, [0.0, *(1 - np.arange(1, 12) / 12)])


def as_if_trained(run):
    """A surrogate run that passes for a trained one: its model is known, and the fit should find it again."""
    manifest = {key: value for key, value in run.manifest.items() if key != "surrogate"} | {"engine": "reference"}
    return Run(
        run.path, {**run.config, "train": {**run.config["train"], "engine": "auto", "surrogate": None}}, manifest
    )


def test_a_known_model_is_found_again(file, tmp_path):
    known, _ = read_surrogate(file)
    tree = json.loads(file.read_text())
    tree["seen"] |= {"loss_before": [1e-3, 20.0], "loss_after": [1e-3, 20.0]}  # no clipping, which the fit knows not of
    tree["contribution"] = {"rank_reference": 4.0, "rank_slope": 0.3}
    tree["curve"] |= {"half": 3.0, "power": 4.0, "drop": 0.5, "tail": 0.4, "damage": 1.2}
    tree["local"] |= {"advance": 1.0, "least_spread": 0.2, "change": 0.9, "deviation": -0.2, "cut": 0.5}
    tree["noise"] = {"client": 0.4, "before": 0.3, "after": 0.5}
    path = tmp_path / "known.json"
    path.write_text(json.dumps(tree))
    known, _ = read_surrogate(path)
    config = surrogate_of(path, fleet={"clients": 80}, server={"rounds": 24}, prune={"end_round": 18})
    found = fit(as_if_trained(fedsim.run(config, out=tmp_path / "run", quiet=True)))
    reached = np.linspace(0.0, 10.0, 21)
    for ratio in (0.0, 0.5):
        one, other = (model.curve.log_loss(reached, np.full(21, ratio)) for model in (known, found))
        assert root_mean_square(one, other) < 0.12
    assert found.noise.client == pytest.approx(0.4, rel=0.2)
    assert found.noise.before == pytest.approx(0.3, rel=0.1)
    assert found.noise.after == pytest.approx(0.5, rel=0.1)
    assert found.local.deviation == pytest.approx(-0.2, abs=0.05)
    assert 0.1 <= found.contribution.rank_slope <= 0.5
    assert known.importance is not None
    assert found.importance is not None
    assert found.importance.rank == pytest.approx(known.importance.rank, abs=0.1)
    assert found.importance.noise == pytest.approx(known.importance.noise, rel=0.1)
    for name in ("accuracy", "accuracy_consensus", "loss"):
        assert found.quality[name].rmse < 0.02


def test_resuming_changes_nothing(file, tmp_path, monkeypatch):
    config = surrogate_of(file, fleet={"clients": 30})
    whole = fedsim.run(config, out=tmp_path / "whole", quiet=True)
    import fedsim.runner.run as run_module

    real_save = run_module.save_checkpoint

    def save_and_die(folder, next_round, state, meta):
        real_save(folder, next_round, state, meta)
        if next_round == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        fedsim.run(config, out=tmp_path / "killed", quiet=True)
    monkeypatch.undo()
    resumed = fedsim.run(config, out=tmp_path / "killed", resume=True, quiet=True)
    assert resumed.manifest["trace_hash"] == whole.manifest["trace_hash"]
    pd.testing.assert_frame_equal(
        whole.rounds.drop(columns=SPENT), resumed.rounds.drop(columns=SPENT), check_exact=True
    )
    pd.testing.assert_frame_equal(whole.client_rounds, resumed.client_rounds, check_exact=True)
    again = fedsim.run(config, out=tmp_path / "again", quiet=True)
    pd.testing.assert_frame_equal(whole.client_rounds, again.client_rounds, check_exact=True)


def test_a_changed_file_is_not_resumed_with(file, tmp_path, monkeypatch):
    own = tmp_path / "s.json"
    own.write_bytes(file.read_bytes())
    import fedsim.runner.run as run_module

    real_save = run_module.save_checkpoint

    def save_and_die(*arguments):
        real_save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        fedsim.run(surrogate_of(own), out=tmp_path / "run", quiet=True)
    monkeypatch.undo()
    own.write_text(own.read_text() + "\n")
    with pytest.raises(RunError, match="was started with another surrogate file"):
        fedsim.run(surrogate_of(own), out=tmp_path / "run", resume=True, quiet=True)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_before": 5}, "is unfinished; a surrogate is fitted to a finished run"),
        ({"client_rounds": False}, "has no client_rounds .records.client_rounds: false."),
        ({"with_accuracy": False}, "has 0 evaluations; a surrogate needs at least 5"),
        ({"rounds": 3}, "has 3 rounds; a surrogate needs at least 4"),
        ({"manifest": {"engine": "none"}}, "is timing only"),
        ({"manifest": {"engine": "surrogate"}}, "is itself a surrogate run"),
    ],
)
def test_runs_that_teach_nothing_are_refused(tmp_path, options, message, capsys):
    path = write_run(tmp_path / "run", **{"rounds": 8, "clients": 8, **options})
    with pytest.raises(RunError, match=message):
        fit_surrogate(path, tmp_path / "s.json")
    assert main(["fit-surrogate", str(path), "--out", str(tmp_path / "s.json")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "s.json").exists()


def test_a_surrogate_is_never_fitted_to_a_surrogate(file, tmp_path):
    run = fedsim.run(surrogate_of(file), out=tmp_path / "run", quiet=True)
    with pytest.raises(RunError, match="is itself a surrogate run"):
        fit(load(run.path))
    disguised = Run(run.path, run.config, {**run.manifest, "engine": "reference"})
    with pytest.raises(RunError, match="is itself a surrogate run"):
        fit(disguised)


def test_losses_that_never_change_fit_without_a_crash(tmp_path):
    """A made-up run whose losses are constants: no progress is found, and none is claimed."""
    model = fit(load(write_run(tmp_path / "run", rounds=16, clients=8)))
    assert np.ptp(model.curve.log_loss(np.linspace(0, 10, 5), np.zeros(5))) < 1e-6
    assert model.quality["loss_before"].r2 <= 1e-9
    assert model.importance is None
    assert any("no importance" in note for note in model.notes)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"engine": "surrogate"}, "train.surrogate: value null is not allowed with train.engine surrogate"),
        ({"surrogate": "s.json"}, "train.surrogate: value 's.json' is not allowed with train.engine auto"),
        ({"engine": "none", "surrogate": "s.json"}, "not allowed with train.engine none"),
        ({"engine": "surrogate", "surrogate": "no.json"}, "file 'no.json' cannot be read"),
    ],
)
def test_engine_and_file_go_together(tmp_path, train, message):
    with pytest.raises(ConfigError, match=message):
        fedsim.run({**REAL, "train": {**REAL["train"], **train}}, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_command_writes_the_file_and_prints_residuals(real, tmp_path, capsys):
    assert main(["fit-surrogate", str(real.path), "--out", str(tmp_path / "s.json")]) == 0
    said = capsys.readouterr().out
    assert "RMSE" in said
    assert "accuracy_consensus" in said
    assert read_surrogate(tmp_path / "s.json")[0].source.method == "fedspine"
