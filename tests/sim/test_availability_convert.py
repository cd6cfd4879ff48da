"""The script that converts other simulators' availability traces."""

from __future__ import annotations

import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path

from fedsim.fleet.availability_file import read_availability

SCRIPT = Path(__file__).parents[2] / "experiments" / "availability" / "convert.py"


def converted(kind, source, target):
    command = [sys.executable, str(SCRIPT), kind, str(source), str(target)]
    return subprocess.run(command, capture_output=True, text=True)


def test_fedscale(tmp_path):
    trace = {7: {"active": [0, 50], "inactive": [20, 90], "finish_time": 100, "duration": 60, "model": "x"}}
    (tmp_path / "trace").write_bytes(pickle.dumps(trace))
    assert converted("fedscale", tmp_path / "trace", tmp_path / "on.csv").returncode == 0
    rhythm = read_availability(tmp_path / "on.csv", 100.0)
    assert (rhythm.start_s.tolist(), rhythm.end_s.tolist()) == ([0.0, 50.0], [20.0, 90.0])


def test_a_pickle_that_would_run_code_is_not_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "trace").write_bytes(pickle.dumps({1: Evil()}))
    ended = converted("fedscale", tmp_path / "trace", tmp_path / "on.csv")
    assert ended.returncode == 2
    assert "no plain data" in ended.stderr
    assert not (tmp_path / "ran").exists()


def test_flash(tmp_path):
    lines = ["00:00:00\twifi", "00:00:10\tscreen_off", "00:00:30\tbattery_charged_on", "00:01:00\tscreen_on"]
    messages = "\n".join(f"2020-01-31 {line}" for line in lines)
    (tmp_path / "t.json").write_text(json.dumps({"u": {"messages": messages}}))
    assert converted("flash", tmp_path / "t.json", tmp_path / "on.csv").returncode == 0
    assert (tmp_path / "on.csv").read_text().split() == ["client,start_s,end_s", "u,30.0,60.0"]


def test_the_script_needs_nothing_of_the_package():
    assert "fedsim" not in importlib.util.spec_from_file_location("convert", SCRIPT).loader.get_source("convert")
