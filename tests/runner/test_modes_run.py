"""Whole runs under servers that do not wait: real training, killed in mid-flight, and what their records say."""

from __future__ import annotations

import json
import signal
import time

import numpy as np
import pytest
from test_run import SMALL, TIMING, assert_same_run, start_process

import fedsim

ASYNC = {"mode": "async", "rounds": 10, "concurrency": 4, "checkpoint_every": 1, "selection": "oort"}
SEMI = {"mode": "semi_async", "rounds": 6, "concurrency": 4, "buffer": 2, "checkpoint_every": 1}
LATE = {"prune": {**SMALL["prune"], "warmup_rounds": 2, "end_round": 6}}


def small(server, base=SMALL):
    return {**base, **LATE, "server": server}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fedsim.run(small(ASYNC), out=tmp_path_factory.mktemp("modes") / "whole", quiet=True)


def test_async_trains_and_rows_are_merges(whole):
    rows, rounds = whole.client_rounds, whole.rounds
    assert rounds["participants"].tolist() == [1] * 10
    assert (rows["round"] - rows["version"] == rows["staleness"]).all()
    assert rows["staleness"].max() >= 3
    assert np.isfinite(rows["loss_after"]).all()
    assert np.isfinite(rounds["accuracy"].dropna()).all()
    cohorts = whole.manifest["cohorts"]
    assert cohorts["jobs"] >= 10
    assert cohorts["count"] <= cohorts["chunks"] <= cohorts["jobs"]
    assert cohorts["count"] < 10  # what waits is trained together


@pytest.mark.slow
def test_killed_in_mid_flight_it_goes_on_to_the_same_end(whole, tmp_path):
    out = tmp_path / "killed"
    process = start_process(small(ASYNC), out)
    deadline_s = time.monotonic() + 300
    while not list(out.glob("checkpoint/round-00000[4567]")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((out / "manifest.json").read_text())["status"] == "running"
    resumed = fedsim.run(small(ASYNC), out=out, resume=True, quiet=True)
    assert_same_run(whole, resumed)
    assert resumed.manifest["cohorts"] == whole.manifest["cohorts"]


@pytest.mark.parametrize("server", [ASYNC, SEMI], ids=["async", "semi_async"])
@pytest.mark.parametrize("after", [1, 3, 5])
def test_resume_from_any_merge_is_identical(tmp_path, server, after, monkeypatch):
    import fedsim.runner.run as run_module

    expected = fedsim.run(small(server, TIMING), out=tmp_path / "whole", quiet=True)
    real = run_module.save_checkpoint

    def save_and_die(folder, next_round, state, meta):
        real(folder, next_round, state, meta)
        if next_round == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        fedsim.run(small(server, TIMING), out=tmp_path / "killed", quiet=True)
    monkeypatch.undo()
    assert_same_run(expected, fedsim.run(small(server, TIMING), out=tmp_path / "killed", resume=True, quiet=True))


@pytest.mark.parametrize("method", ["fedspine", "fedspine_balanced", "fedlora", "hetlora", "flexlora", "fedmp"])
def test_methods_run_under_a_server_that_does_not_wait(tmp_path, method):
    run = fedsim.run(small(SEMI, TIMING), out=tmp_path / "run", quiet=True, method=method)
    assert len(run.rounds) == 6
