"""Fleet files that say who is there when, what is shared and what breaks: read, refused by name, and played."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

import fedsim
from fedsim.errors import ConfigError, ProfileError, RunError
from fedsim.fleet.fleet import load_fleet
from fedsim.settings import FleetSettings

TX2 = {"profile": "jetson-tx2"}
BASE = {
    "name": "toy",
    "devices": [{"profile": "jetson-tx2"}, {"profile": "jetson-xavier-nx"}],
    "links": {"near": {"down_mbps": 20, "up_mbps": 10}, "far": {"down_mbps": 2, "up_mbps": 1}},
}
RUN = {
    "method": "fedspine",
    "server": {"rounds": 5, "checkpoint_every": 1},
    "train": {"engine": "none"},
    "cost": {"model": "roberta-base", "batch_size": 8, "seq_len": 64},
    "evaluate": {"panel": 2},
}


def written(folder, clients=8, **changes):
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump({**BASE, **changes}))
    return FleetSettings(name=str(path), clients=clients)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"availability": {"kind": "on_off", "mean_on_s": 0, "mean_off_s": 5}}, "mean_on_s is 0 s"),
        ({"availability": {"kind": "daily", "on_s": 80000, "spread_s": 7200}}, "fit into period_s"),
        ({"availability": {"kind": "trace", "file": "none.csv"}}, "none.csv' cannot be read"),
        ({"dropout": {"compute": 1.0}}, "no client would ever finish"),
        ({"dropout": {"compute": 1.5}}, "compute is 1.5 1"),
        ({"throttle": {"steps": [{"after_busy_s": 5, "rate": 0.5}] * 2, "recover_s": 9}}, "must rise"),
        (
            {"access_points": {"a": {}, "b": {}}, "devices": [{**TX2, "access_point": "a"}]},
            "'b' has no",
        ),
        (
            {"access_points": {"a": {}}, "devices": [{**TX2, "access_point": "c"}]},
            "unknown access point",
        ),
        (
            {"devices": [{**TX2, "join_s": 9, "leave_s": 9}]},
            "client 0 joins at 9 s and leaves at 9 s",
        ),
        ({"server_link": {"down_mbps": -1}}, "down_mbps is -1 Mb/s"),
        ({"roaming": {"mean_stay_s": 0.1}}, "mean_stay_s is 0.1 s"),
        ({"mode_period_s": 10, "mode_period": 3}, "exclude each other"),
        ({"replay": {"folder": "nowhere", "attribution": "nobody"}}, "there is no folder"),
        ({"links": {"near": {"down_mbps": 1e308, "up_mbps": 1}}}, "which no link has"),
        ({"availability": {"kind": "on_of", "mean_on_s": 5, "mean_off_s": 5}}, "on_of"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, changes, sentence):
    with pytest.raises(ProfileError) as caught:
        load_fleet(written(tmp_path, **changes), "fp32", 0)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ("0 1\n5 2\n5 3\n", "line 3: 5 s does not come after 5 s"),
        ("0 1\n5 -2\n", "line 2: a time of 5 s and -2 Mbit/s"),
        ("0 1\n5 0\n", "line 2: a bandwidth of 0"),
        ("0 1\n500 1\n", "line 2: a gap of 500 s"),
        ("0 1\nfive 1\n", "line 2: must be two numbers"),
        ("0 1\n", "fewer than two lines"),
        ("0 1\n1 1e308\n", "line 2: a time of 1 s and 1e+308"),
    ],
)
def test_a_bandwidth_trace_that_cannot_be_is_refused_by_line(tmp_path, rows, sentence):
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "one.txt").write_text(rows)
    with pytest.raises(ProfileError) as caught:
        load_fleet(written(tmp_path, replay={"folder": "traces", "attribution": "a test"}), "fp32", 0)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ("a,5,4\n", "end_s must be after start_s"),
        ("a,0,4\na,3,9\n", "row 2 (client a, 3 to 9 s): it begins before"),
        ("a,-1,4\n", "at least 0"),
        ("a,0,90\n", "it ends after repeat_s"),
        ("", "has no rows"),
    ],
)
def test_an_availability_file_that_cannot_be_is_refused_by_row(tmp_path, rows, sentence):
    (tmp_path / "on.csv").write_text("client,start_s,end_s\n" + rows)
    with pytest.raises(ProfileError) as caught:
        load_fleet(written(tmp_path, availability={"kind": "trace", "file": "on.csv", "repeat_s": 50}), "fp32", 0)
    assert sentence in str(caught.value)


def test_an_availability_file_is_followed_and_repeats(tmp_path):
    (tmp_path / "on.csv").write_text("client,start_s,end_s\nx,0,10\ny,5,20\nx,30,40\n")
    rule = {"kind": "trace", "file": "on.csv", "repeat_s": 50}
    there = load_fleet(written(tmp_path, clients=3, availability=rule), "fp32", 0).dynamics.presence
    seen = {at_s: there.on(at_s).tolist() for at_s in (0.0, 7.0, 10.0, 35.0, 52.0, 69.0)}
    x, y = [True, False, True], [False, True, False]
    assert seen == {0.0: x, 7.0: [True] * 3, 10.0: y, 35.0: x, 52.0: x, 69.0: y}


def test_modes_by_the_clock(tmp_path):
    devices = [{**TX2, "mode": "uniform"}]
    fleet = load_fleet(written(tmp_path, clients=300, devices=devices, mode_period_s=100), "fp32", 4)
    clock, everyone = fleet.mode_clock, np.arange(300)
    times_s, who, modes = fleet.mode_changes_between(0.0, 1000.0)
    # Between two changes the mode stays; at a change it is the new one.
    for at_s in (0.0, 55.5, 700.0, 1000.0):
        now = clock.modes(everyone, clock.epoch(everyone, np.full(300, at_s)))
        last = clock.modes(everyone, clock.epoch(everyone, np.zeros(300)))
        for time_s, client, mode in sorted(zip(times_s, who, modes, strict=True)):
            if time_s <= at_s:
                last[client] = mode
        assert np.array_equal(now, last)
    assert len(np.unique(times_s % 100)) > 100  # each client has its own moments
    ones = np.ones(300)
    whole = fleet.busy_joules(everyone, 0 * ones, 250 * ones)
    parts = fleet.busy_joules(everyone, 0 * ones, 120 * ones) + fleet.busy_joules(everyone, 120 * ones, 250 * ones)
    assert np.allclose(whole, parts, rtol=1e-12)


def test_arrays_and_unwanted_periods_are_refused(tmp_path):
    fleet = written(tmp_path, dropout={"compute": 0.1})
    with pytest.raises(ConfigError, match=r"server.clock: value 'arrays' is not allowed.*dropout"):
        fedsim.run({**RUN, "fleet": fleet.model_dump(), "server": {"rounds": 1, "clock": "arrays"}}, out=tmp_path / "r")


def test_a_fleet_that_never_finishes_ends_with_a_sentence(tmp_path):
    (tmp_path / "on.csv").write_text("client,start_s,end_s\nx,0,1\n")
    fleet = written(tmp_path, availability={"kind": "trace", "file": "on.csv"})
    with pytest.raises(RunError, match="no client is there any more"):
        fedsim.run({**RUN, "fleet": fleet.model_dump()}, out=tmp_path / "r", quiet=True)


def everything(folder):
    return written(
        folder,
        clients=10,
        availability={"kind": "on_off", "mean_on_s": 400, "mean_off_s": 60},
        dropout={"download": 0.02, "compute": 0.05, "upload": 0.02},
        throttle={"steps": [{"after_busy_s": 20, "rate": 0.7}, {"after_busy_s": 40, "rate": 0.4}], "recover_s": 60},
        roaming={"mean_stay_s": 30},
        access_points={"a": {"half_duplex": True}, "b": {}},
        server_link={"down_mbps": 30, "up_mbps": 8},
        mode_period_s=25,
        devices=[
            {**TX2, "mode": "uniform", "join_s": {"low": 0, "high": 50}},
            {"profile": "jetson-nano"},
        ],
    )


def test_killed_in_a_world_that_changes_and_resumed(tmp_path):
    config = {**RUN, "fleet": everything(tmp_path).model_dump(), "server": {"rounds": 25, "checkpoint_every": 1}}
    whole = fedsim.run(config, out=tmp_path / "whole", quiet=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "fedsim.cli", "run", str(tmp_path / "run.yaml"), "--out", str(out), "--quiet"]
    child = subprocess.Popen(command)
    until_s = time.monotonic() + 60
    while not any((out / "checkpoint").glob("*")) and child.poll() is None and time.monotonic() < until_s:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    again = fedsim.run(config, out=out, resume=True, quiet=True)
    assert again.manifest["trace_hash"] == whole.manifest["trace_hash"]
    for name in ("client_rounds", "events"):
        assert getattr(again, name).equals(getattr(whole, name))
    events = whole.events["event"].value_counts()
    assert events["dropped"] > 1
    assert events["mode"] > 20


def test_the_campus_plays(tmp_path):
    run = fedsim.run({**RUN, "fleet": {"name": "fedspine-80-campus"}}, out=tmp_path / "campus", quiet=True)
    fleet = load_fleet(FleetSettings(name="fedspine-80-campus"), "fp32", 0)
    assert np.bincount(fleet.dynamics.sharing.point_of).tolist() == [20] * 4
    assert dict(zip(*np.unique(fleet.device_of, return_counts=True), strict=True)) == {
        "jetson-agx-xavier": 10,
        "jetson-tx2": 30,
        "jetson-xavier-nx": 40,
    }
    assert run.manifest["player"] == "processes"
    assert set(run.client_rounds["outcome"]) >= {"ok"}
