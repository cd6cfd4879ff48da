"""Trackers follow a run: they are told every round, may fail, and neither stop nor change it."""

from __future__ import annotations

import importlib.util
import json
import sys

import pandas as pd
import pytest

import fedsim
from fedsim.errors import ConfigError
from fedsim.runner import trackers as module
from fedsim.runner.config import build_config, config_hash
from fedsim.runner.progress import Progress
from fedsim.runner.trackers import GuardedTrackers, TensorBoardTracker, WandbTracker, check_trackers
from fedsim.settings import RecordSettings

TIMING = {
    "method": "fedspine",
    "fleet": {"clients": 6},
    "server": {"rounds": 5, "clients_per_round": 4, "checkpoint_every": 2},
    "train": {"local_steps": 4, "batch_size": 4, "max_length": 32, "engine": "none"},
    "prune": {"warmup_rounds": 1, "end_round": 4, "max_step": 0.5},
    "cost": {"model": "roberta-base", "batch_size": 8, "seq_len": 64},
}
STUB = """
import json, pathlib
class Settings:
    model_fields = {"silent": 0, "disable_git": 0}
    def __init__(self, **values):
        self.values = values
class Run:
    def __init__(self, values):
        self.folder = pathlib.Path(values["dir"]) / "wandb"
        self.folder.mkdir()
        self.told = {"init": {**values, "settings": values["settings"].values}, "rounds": []}
        self.summary = {}
    def log(self, values, step):
        self.told["rounds"].append([step, values])
    def finish(self, exit_code):
        self.told |= {"exit_code": exit_code, "summary": self.summary}
        (self.folder / "told.json").write_text(json.dumps(self.told))
def init(**values):
    return Run(values)
"""


class Listener:
    """Remembers what it was told; fails where it is asked to."""

    def __init__(self, fails_at=None):
        self.fails_at, self.told = fails_at, []

    def _hear(self, name, value):
        self.told.append((name, value))
        if name == self.fails_at:
            raise OSError(28, "No space left on device")

    def start(self, config, manifest):
        self._hear("start", (config, manifest))

    def round(self, values):
        self._hear("round", values)

    def finish(self, summary):
        self._hear("finish", summary)


@pytest.fixture
def listener(monkeypatch):
    """A listener in TensorBoard's place, whether that is installed or not."""

    def install(fails_at=None):
        heard = Listener(fails_at)
        monkeypatch.setitem(module.TRACKERS, "tensorboard", lambda directory, records, first: heard)
        monkeypatch.setattr("fedsim.runner.run.check_trackers", lambda records: None)
        return heard

    return install


def follow(out, **records):
    return fedsim.run({**TIMING, "records": {"trackers": ["tensorboard"], **records}}, out=out, quiet=True)


def assert_same_results(one, other):
    assert one.manifest["trace_hash"] == other.manifest["trace_hash"]
    assert one.manifest["config_hash"] == other.manifest["config_hash"]
    pd.testing.assert_frame_equal(one.rounds.drop(columns="host_s"), other.rounds.drop(columns="host_s"))
    pd.testing.assert_frame_equal(one.client_rounds, other.client_rounds)


def test_a_tracker_is_told_the_rows_of_the_records(listener, tmp_path):
    heard = listener()
    run = follow(tmp_path / "followed")
    names = [name for name, _ in heard.told]
    assert names == ["start", *["round"] * 5, "finish"]
    told = pd.DataFrame([values for name, values in heard.told if name == "round"])
    pd.testing.assert_frame_equal(told.astype(float), run.rounds.astype(float))
    config, manifest = heard.told[0][1]
    assert config == run.config
    assert manifest["status"] == "running"
    assert heard.told[-1][1]["trace_hash"] == run.manifest["trace_hash"]
    assert_same_results(run, fedsim.run(TIMING, out=tmp_path / "alone", quiet=True))


@pytest.mark.parametrize("place", ["start", "round", "finish"])
def test_a_tracker_that_fails_is_one_warning(listener, tmp_path, capsys, place):
    heard = listener(fails_at=place)
    run = follow(tmp_path / "followed")
    assert run.finished
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert [name for name, _ in heard.told].count(place) == 1  # it is not asked again
    assert_same_results(run, fedsim.run(TIMING, out=tmp_path / "alone", quiet=True))


def test_one_that_fails_leaves_the_others_on():
    warnings, bad, good = [], Listener("round"), Listener()
    both = GuardedTrackers({"bad": bad, "good": good}, warnings.append)
    with both:
        both.start({}, {})
        both.round({"round": 0})
        both.round({"round": 1})
        both.finish({"rounds": 2})
    assert len(bad.told) == 2
    assert [name for name, _ in good.told] == ["start", "round", "round", "finish"]
    assert good.told[-1] == ("finish", {"rounds": 2})  # leaving the block ends nothing twice
    assert len(warnings) == 1
    assert "'bad'" in warnings[0]
    assert not both


def test_a_run_that_breaks_ends_its_trackers_as_stopped(listener, tmp_path, monkeypatch):
    heard = listener()

    def broken(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedsim.runner.run.simulate", broken)
    with pytest.raises(KeyboardInterrupt):
        follow(tmp_path / "followed")
    assert [name for name, _ in heard.told] == ["start", "finish"]
    assert heard.told[-1][1] is None


def test_trackers_have_no_part_in_the_hash_and_may_change_at_resume(listener, tmp_path, monkeypatch):
    followed = {**TIMING, "records": {"trackers": ["tensorboard", "wandb"], "wandb_mode": "online"}}
    assert config_hash(build_config(TIMING)) == config_hash(build_config(followed))
    assert config_hash(build_config(TIMING)) != config_hash(build_config({**TIMING, "records": {"events": False}}))
    heard = listener()
    round_done = Progress.round_done

    def stopped(progress, report, learning):
        round_done(progress, report, learning)
        if report.merge_index == 2:  # the newest checkpoint is that before round 2
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "round_done", stopped)
        with pytest.raises(KeyboardInterrupt):
            fedsim.run(TIMING, out=tmp_path / "run", quiet=True)
    assert heard.told == []
    config = {**TIMING, "records": {"trackers": ["tensorboard"]}}
    again = fedsim.run(config, out=tmp_path / "run", resume=True, quiet=True)
    assert [values["round"] for name, values in heard.told if name == "round"] == [2, 3, 4]
    assert_same_results(again, fedsim.run(TIMING, out=tmp_path / "alone", quiet=True))


def test_a_missing_package_is_said_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"records.trackers: value 'tensorboard' needs .* not installed \(pip install"
    ):
        follow(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_the_packages_name_is_not_the_package(tmp_path, monkeypatch):
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="not installed"):
        check_trackers(RecordSettings(trackers=["wandb"]))


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ConfigError, match=r"records.trackers.*'tensorboard' or 'wandb'"):
        build_config({**TIMING, "records": {"trackers": ["mlflow"]}})


@pytest.fixture
def stub_wandb(tmp_path, monkeypatch):
    """A package ``wandb`` that writes down what it is told."""
    (tmp_path / "site" / "wandb").mkdir(parents=True)
    (tmp_path / "site" / "wandb" / "__init__.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield
    sys.modules.pop("wandb", None)


@pytest.mark.usefixtures("stub_wandb")
def test_wandb_is_offline_in_the_run_directory_and_told_nothing_of_the_host(tmp_path):
    run = follow(tmp_path / "run", trackers=["wandb"])
    told = json.loads((run.path / "wandb" / "told.json").read_text())
    init = told["init"]
    assert init["mode"] == "offline"
    assert init["dir"] == str(run.path)
    assert init["settings"] == {"silent": True, "disable_git": True}  # of ours, those that this version knows
    assert init["config"]["manifest"]["config_hash"] == run.manifest["config_hash"]
    assert [step for step, _ in told["rounds"]] == list(range(5))
    assert told["rounds"][2][1]["end_s"] == run.rounds["end_s"][2]
    assert all("accuracy" not in values for _, values in told["rounds"])  # timing only: there is none to log
    assert told["exit_code"] == 0
    assert told["summary"]["trace_hash"] == run.manifest["trace_hash"]


@pytest.mark.usefixtures("stub_wandb")
def test_wandb_online_only_where_asked_and_force_clears_its_folder(tmp_path):
    follow(tmp_path / "run", trackers=["wandb"])
    config = {**TIMING, "records": {"trackers": ["wandb"], "wandb_mode": "online"}}
    run = fedsim.run(config, out=tmp_path / "run", force=True, quiet=True)  # the stub's mkdir fails on a leftover
    assert json.loads((run.path / "wandb" / "told.json").read_text())["init"]["mode"] == "online"


def read_back(folder):
    """Scalars of all event files, as TensorBoard itself reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def test_tensorboard_reads_back_every_round(tmp_path):
    pytest.importorskip("tensorboard")
    run = follow(tmp_path / "run")
    events = read_back(run.path / "tensorboard")
    assert {"end_s", "idle_fraction", "energy_j"} <= set(events.Tags()["scalars"])
    assert "accuracy" not in events.Tags()["scalars"]
    scalars = events.Scalars("end_s")
    assert [one.step for one in scalars] == list(range(5))
    assert [one.value for one in scalars] == pytest.approx(run.rounds["end_s"].tolist(), rel=1e-6)
    texts = {name: events.Tensors(name)[0].tensor_proto.string_val[0].decode() for name in events.Tags()["tensors"]}
    assert set(texts) == {"config", "manifest", "summary"}
    assert run.manifest["trace_hash"] in texts["summary"]


def test_rounds_played_again_replace_the_old_ones_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    for first, values in ((0, [10.0, 11.0, 12.0]), (2, [22.0, 23.0])):
        tracker = TensorBoardTracker(tmp_path, RecordSettings(), first)
        tracker.start({}, {})
        for place, value in enumerate(values):
            tracker.round({"round": first + place, "end_s": value, "accuracy": None})
        tracker.finish(None)
    scalars = read_back(tmp_path / "tensorboard").Scalars("end_s")
    assert [(one.step, one.value) for one in scalars] == [(0, 10.0), (1, 11.0), (2, 22.0), (3, 23.0)]


def test_real_wandb_offline(tmp_path):
    """Where it is installed: the offline file appears in the run directory, and the run is what it was."""
    pytest.importorskip("wandb")
    run = follow(tmp_path / "run", trackers=["wandb"])
    assert list((run.path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert_same_results(run, fedsim.run(TIMING, out=tmp_path / "alone", quiet=True))


def test_makers_touch_nothing(tmp_path):
    for maker in (TensorBoardTracker, WandbTracker):
        maker(tmp_path, RecordSettings(), 0).finish(None)
    assert list(tmp_path.iterdir()) == []
