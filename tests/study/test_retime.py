"""A finished run on another clock is what a run there gives, where nothing hangs on the clock; else it is refused."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import yaml

import fedsim
from fedsim.cli import main
from fedsim.cost.bands import SAMPLES
from fedsim.errors import ConfigError, RunError
from fedsim.runner.config import build_config
from fedsim.study.check_run import check_run
from fedsim.study.draw_bands import draw_bands
from fedsim.study.profile_error import drawn_links, profile_error, read_draws, time_again
from fedsim.study.retime import checked_jobs, fleet_of, retime_run, times_on

TIMING = {
    "train.engine": "none",
    "fleet.clients": 12,
    "server.rounds": 8,
    "prune.warmup_rounds": 2,
    "prune.end_round": 6,
    "records.events": False,
}


def played(out, method="fedspine_uniform", **changes):
    return fedsim.run("quickstart", method=method, out=out, quiet=True, **(TIMING | changes))


@pytest.fixture(scope="module")
def uniform(tmp_path_factory):
    return played(tmp_path_factory.mktemp("runs") / "uniform")


@pytest.mark.parametrize("method", ["fedspine_uniform", "fedlora", "prune_then_tune", "flora", "hetlora"])
def test_a_run_retimed_on_its_own_fleet_is_itself(method, tmp_path):
    run = played(tmp_path / "run", method, **{"prune.recovery_rounds": 1})
    _, jobs, fleet = checked_jobs(run)
    times = times_on(jobs, fleet)
    rows = run.client_rounds
    for name in ("download_s", "compute_s", "upload_s", "energy_j"):
        assert getattr(times, name) == pytest.approx(rows[name].to_numpy(), rel=1e-12)
    assert times.end_s == pytest.approx(run.rounds["end_s"].to_numpy(), rel=1e-12)


def test_another_fleet_is_as_a_run_there(uniform, tmp_path):
    out = retime_run(uniform, tmp_path / "anew", "fedspine-80-modes")
    anew, there = fedsim.load(out), played(tmp_path / "there", **{"fleet.name": "fedspine-80-modes"})
    for name in ("start_s", "end_s", "duration_s", "idle_fraction", "energy_j"):
        assert anew.rounds[name].to_numpy() == pytest.approx(there.rounds[name].to_numpy(), rel=1e-9)
    for name in ("download_s", "compute_s", "upload_s", "idle_s", "energy_j"):
        assert anew.client_rounds[name].to_numpy() == pytest.approx(there.client_rounds[name].to_numpy(), abs=1e-9)
    assert list(anew.client_rounds["mode"]) == list(there.client_rounds["mode"])
    assert check_run(out).is_sound, check_run(out).as_text()
    assert anew.manifest["simulated_s"] == pytest.approx(there.manifest["simulated_s"])
    assert any("timed anew from a finished run (fleet fedspine-80-modes)" in label for label in anew.manifest["labels"])
    # What was learned is the run's own.
    assert list(anew.client_rounds["prune_ratio"]) == list(uniform.client_rounds["prune_ratio"])


def test_other_links_and_modes(uniform, tmp_path):
    links = fedsim.load(retime_run(uniform, tmp_path / "links", links="fedspine-80-modes"))
    assert list(links.client_rounds["compute_s"]) == pytest.approx(list(uniform.client_rounds["compute_s"]))
    assert links.manifest["simulated_s"] > uniform.manifest["simulated_s"]
    out = tmp_path / "modes"
    words = ["retime", str(uniform.path), "--mode", "uniform", "--out", str(out)]
    assert main(words) == 0
    modes = fedsim.load(out)
    assert modes.client_rounds["mode"].nunique() > 3
    assert yaml.safe_load((out / "fedspine-80-uniform.yaml").read_text())["devices"][0]["mode"] == "uniform"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"server.deadline_s": 100.0}, "server.deadline_s is 100"),
        ({"server.time_budget_s": 1e6}, "server.time_budget_s is 1e"),
        ({"server.clients_per_round": 6, "server.over_selection": 0.3}, "server.over_selection is 0.3"),
    ],
)
def test_what_hangs_on_the_clock_is_refused(changes, said, tmp_path):
    run = played(tmp_path / "run", **changes)
    with pytest.raises(RunError, match=said):
        retime_run(run, tmp_path / "anew", "fedspine-80-modes")


def test_a_policy_that_looks_at_the_clock_is_refused_and_so_is_nothing_to_change(uniform, tmp_path):
    run = played(tmp_path / "run", "fedspine")
    with pytest.raises(RunError, match="control.policy is sucb, whose choices hang on the clock"):
        retime_run(run, tmp_path / "anew", "fedspine-80-modes")
    with pytest.raises(ConfigError, match="nothing is to change"):
        retime_run(uniform, tmp_path / "anew")
    with pytest.raises(RunError):
        retime_run(uniform, tmp_path / "run", "fedspine-80-modes")


def test_records_that_do_not_fit_are_refused(uniform):
    run = replace(uniform)
    run.client_rounds["prune_ratio_target"] += 0.1
    with pytest.raises(RunError, match="is not reproduced by its own configuration"):
        checked_jobs(run)


def test_jobs_that_fit_no_more_are_refused(uniform):
    config, jobs, _ = checked_jobs(fedsim.load(uniform.path))
    fleet = fleet_of(config)
    bigger = replace(jobs, work=replace(jobs.work, peak_memory_bytes=jobs.work.peak_memory_bytes + 7e9))
    with pytest.raises(RunError, match=r"jobs fit on other devices than in the run .* now does not fit"):
        times_on(bigger, fleet)


def test_draws_of_a_blind_policy_are_runs_of_that_draw(tmp_path):
    """With links held, draw k is the run with `profile_draw` k."""
    run = played(tmp_path / "run")
    config, jobs, _ = checked_jobs(run)
    result = profile_error(run, 3)
    assert result.end_s.shape == (3, 8)
    assert not result.replayed
    there = played(tmp_path / "there", profile_draw=2)
    held = replace(fleet_of(config), links=fleet_of(config).links)
    assert times_on(jobs, held).end_s == pytest.approx(run.rounds["end_s"].to_numpy())
    own = build_config(there.config)
    from fedsim.runner.run import perturbation

    assert times_on(jobs, fleet_of(own, perturbation(2))).end_s == pytest.approx(there.rounds["end_s"].to_numpy())


def test_a_policy_that_looks_is_played_again(tmp_path):
    run = played(tmp_path / "run", "fedspine_balanced")
    result = profile_error(run, 2)
    assert result.replayed
    assert (result.same_arms < 1).any()
    assert "was played again, timing only" in result.as_text()
    assert (np.diff(result.end_s, axis=1) > 0).all()


def test_links_are_drawn_within_their_bands(uniform):
    config = build_config(uniform.config)
    fleet = fleet_of(config)
    ratios = np.array([drawn_links(config, fleet, draw).latency_s[0] / fleet.links.latency_s[0] for draw in range(60)])
    assert 0.2 <= ratios.min() < 0.5
    assert 5 < ratios.max() <= 10


def test_compare_says_bands_and_order(tmp_path, capsys):
    runs = {method: played(tmp_path / method, method) for method in ("fedspine_uniform", "fedlora")}
    for run in runs.values():
        time_again(run.path, 20, lambda text: None)
    again = [fedsim.load(run.path) for run in runs.values()]
    bands = draw_bands(again)
    assert bands is not None
    assert bands["draws"] == 20
    assert 0 <= bands["order_held"] <= 20
    low, high = bands["rows"]["fedlora"]["total_s"]
    assert low < runs["fedlora"].manifest["simulated_s"] < high
    assert main(["compare", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["profile_error"]["draws"] == 20
    assert main(["compare", str(tmp_path)]) == 0
    assert "the order of methods by total time held in" in capsys.readouterr().out
    assert read_draws(again[0]).end_s.shape == (20, 8)


def test_it_is_quick(tmp_path):
    """An 80-client run of 100 rounds: 100 draws within 20 s, a retiming within 5 s."""
    run = played(tmp_path / "run", **{"fleet.clients": 80, "server.rounds": 100, "prune.end_round": 60})
    began = time.process_time()
    profile_error(run, SAMPLES)
    assert time.process_time() - began < 20
    began = time.process_time()
    retime_run(run, tmp_path / "anew", "fedspine-80-modes")
    assert time.process_time() - began < 5
