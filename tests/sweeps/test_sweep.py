"""Whole sweeps in real processes: same records however they ran, failures kept apart, stops that cost nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import fedsim
from fedsim.cli import main
from fedsim.data.corpus import load_corpus
from fedsim.data.partition import partition
from fedsim.errors import ConfigError, RunError
from fedsim.methods.catalogue import METHODS as METHOD_REGISTRY
from fedsim.records.reader import find_runs
from fedsim.sweeps.cell_jobs import Done
from fedsim.sweeps.cells import plan_sweep
from fedsim.sweeps.ledger import open_ledger, read_ledger

PLUGIN = str(Path(__file__).with_name("sweep_plugin.py"))
SMALL = {
    "records": {"events": True},
    "model": {"lora_rank": 4, "lora_rank_max": 8},
    "fleet": {"name": "fedspine-80-modes", "clients": 8, "mode_period": 2},
    "server": {"rounds": 6, "clients_per_round": 5, "checkpoint_every": 1},
    "train": {"engine": "none", "local_steps": 4},
    "prune": {"warmup_rounds": 2, "end_round": 5, "max_step": 0.5},
    "cost": {"model": "roberta-base"},
}
TRAINED = {
    **SMALL,
    "model": {"name": "tiny", "lora_rank": 4, "lora_rank_max": 8},
    "data": {"name": "synthetic", "max_samples": 160},
    "server": {"rounds": 3, "clients_per_round": 3, "checkpoint_every": 1},
    "train": {"local_steps": 3, "batch_size": 4, "max_length": 16},
    "prune": {"warmup_rounds": 1, "end_round": 2, "max_step": 0.5},
    "evaluate": {"every_rounds": 2, "panel": 2, "max_samples": 20},
}
METHODS = {"method": ["fedspine", "fedlora"]}


@pytest.fixture(autouse=True)
def registry_as_it_was():
    """The plugin's methods are gone afterwards: other tests look at every method there is."""
    before = dict(METHOD_REGISTRY)
    yield
    METHOD_REGISTRY.clear()
    METHOD_REGISTRY.update(before)
    sys.modules.pop("fedsim_user_sweep_plugin", None)


def assert_same_runs(some, others):
    """Same trace and records, whatever ran them; host seconds aside."""
    assert [run.path.name for run in some] == [run.path.name for run in others]
    for one, other in zip(some, others, strict=True):
        assert one.manifest["trace_hash"] == other.manifest["trace_hash"]
        mine, theirs = one.rounds.drop(columns="host_s"), other.rounds.drop(columns="host_s")
        pd.testing.assert_frame_equal(mine, theirs, check_exact=True)
        pd.testing.assert_frame_equal(one.client_rounds, other.client_rounds, check_exact=True)
        pd.testing.assert_frame_equal(one.events, other.events, check_exact=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished sweep of four cells, two at a time."""
    out = tmp_path_factory.mktemp("sweeps") / "whole"
    return fedsim.sweep(SMALL, grid=METHODS, seeds="0-1", out=out, workers=2, quiet=True)


def states(path):
    return [cell["state"] for cell in json.loads((path / "sweep.json").read_text())["cells"]]


def test_every_cell_is_the_run_of_its_configuration(whole, tmp_path):
    assert [cell["state"] for cell in whole.cells] == ["finished"] * 4
    assert [(run.method, run.seed) for run in whole.runs] == [
        ("fedspine", 0),
        ("fedspine", 1),
        ("fedlora", 0),
        ("fedlora", 1),
    ]
    alone = [
        fedsim.run(SMALL, method=run.method, seed=run.seed, out=tmp_path / run.path.name, quiet=True)
        for run in whole.runs
    ]
    assert_same_runs(whole.runs, alone)
    assert all(cell["host_s"] > 0 and cell["error"] is None for cell in whole.cells)


def test_records_do_not_depend_on_the_number_of_workers(whole, tmp_path):
    one_by_one = fedsim.sweep(SMALL, grid=METHODS, seeds="0-1", out=tmp_path / "one", workers=1, quiet=True)
    assert_same_runs(whole.runs[:4], one_by_one.runs)


def test_cells_that_train_are_the_same_in_a_sweep_and_alone(tmp_path):
    grid = {"method": ["fedspine"], "train.engine": ["masked", "sliced"]}
    swept = fedsim.sweep(TRAINED, grid=grid, out=tmp_path / "sweep", workers=2, quiet=True)
    assert not swept.failed, swept.summary()
    engine = {"train.engine": "masked"}
    alone = fedsim.run(TRAINED, out=tmp_path / swept.runs[0].path.name, method="fedspine", quiet=True, **engine)
    assert_same_runs(swept.runs[:1], [alone])
    weights = "adapter/adapter_model.safetensors"
    assert (swept.runs[0].path / weights).read_bytes() == (alone.path / weights).read_bytes()


def test_one_seed_gives_every_method_the_same_world(whole):
    """Common random numbers: who takes part, in which mode, over which link, with which data."""
    spine, lora = whole.runs[0].client_rounds, whole.runs[2].client_rounds
    pd.testing.assert_frame_equal(
        spine[["round", "client", "device", "mode"]], lora[["round", "client", "device", "mode"]]
    )
    # The download of round 0 carries the same bytes for both where the rank is the same: then it takes as long.
    first = (spine["round"] == 0) & (spine["lora_rank"] == lora["lora_rank"])
    assert first.any()
    np.testing.assert_array_equal(spine.loc[first, "download_s"], lora.loc[first, "download_s"])
    other_seed = whole.runs[1].client_rounds
    assert not spine[["client", "mode"]].equals(other_seed[["client", "mode"]])

    cells = plan_sweep({**SMALL, "data": {"name": "synthetic", "max_samples": 200}}, grid=METHODS, seeds="0-1").cells
    splits = []
    for cell in cells:
        corpus = load_corpus(cell.config.data, cell.config.seed)
        splits.append(partition(corpus.train, cell.config.data, 8, cell.config.seed))
    for mine, theirs in zip(splits[0], splits[2], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert not all(np.array_equal(mine, theirs) for mine, theirs in zip(splits[0], splits[1], strict=True))


def test_finished_cells_are_kept_and_more_seeds_make_it_grow(whole, capsys):
    stamps = {run.path: (run.path / "manifest.json").stat().st_mtime_ns for run in whole.runs}
    grown = fedsim.sweep(SMALL, grid=METHODS, seeds="0-2", out=whole.path, workers=2)
    assert [cell["state"] for cell in grown.cells] == ["finished"] * 6
    assert {path: (path / "manifest.json").stat().st_mtime_ns for path in stamps} == stamps
    printed = capsys.readouterr()
    assert "6 cells (2 pending, 4 finished)" in printed.out
    assert "[2/2] cell" in printed.err


def test_compare_and_load_take_the_cells(whole, capsys):
    as_expanded = [str(path) for path in sorted(whole.path.iterdir()) if not path.name.startswith(".")]
    assert str(whole.path / "sweep.json") in as_expanded
    assert main(["compare", *as_expanded]) == 0  # fedsim compare SWEEP/*
    assert main(["compare", str(whole.path)]) == 0
    assert "fedspine" in capsys.readouterr().out
    loaded = fedsim.load_sweep(whole.path)
    assert [run.path for run in loaded][:1] == [whole.runs[0].path]
    assert {run.path.resolve() for run in loaded} == {run.path.resolve() for run in find_runs([whole.path])}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grid": {"method": ["fedspine"]}}, "holds another sweep: .* of its .* cells are not among those asked for"),
        ({"grid": METHODS, "overrides": {"server.rounds": 7}}, "holds another sweep"),
    ],
)
def test_another_sweep_in_the_folder_is_refused(whole, change, words):
    before = (whole.path / "sweep.json").read_bytes()
    with pytest.raises(RunError, match=words):
        fedsim.sweep(SMALL, seeds="0-1", out=whole.path, quiet=True, **change)
    assert (whole.path / "sweep.json").read_bytes() == before


def test_foreign_files_a_damaged_book_and_a_second_sweep_at_work_are_refused(tmp_path):
    def start(folder):
        return fedsim.sweep(SMALL, grid=METHODS, out=folder, quiet=True)

    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds no sweep\.json \(first entry: 'notes\.txt'\)"):
        start(tmp_path)
    with pytest.raises(RunError, match="is a file"):
        start(tmp_path / "notes.txt")
    held = tmp_path / "held"
    ledger = open_ledger(held, plan_sweep(SMALL, grid=METHODS))
    with pytest.raises(RunError, match="another sweep is at work"):
        start(held)
    ledger.close()
    (held / "sweep.json").write_text("{")
    with pytest.raises(RunError, match=r"sweep\.json' is damaged"):
        start(held)
    with pytest.raises(RunError, match="not the folder of a sweep"):
        fedsim.load_sweep(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 0}, "--workers: value 0"),
        ({"workers": 1, "ray": "local"}, "exclude each other"),
        ({"imports": ["no_such_module_of_mine"]}, "--import 'no_such_module_of_mine' cannot be imported"),
        ({"grid": {"method": ["fedspine", "fedspin"]}}, "1 of 2 combinations .*\n.*did you mean 'fedspine'"),
        ({"grid": {"server.clients_per_round": [5, 9]}}, "1 of 2 combinations .*\n.*clients_per_round: value 9"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(tmp_path, options, words):
    with pytest.raises((ConfigError, RunError), match=words):
        fedsim.sweep(SMALL, **{"grid": METHODS, **options}, out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_cell_that_fails_takes_nothing_else_along(tmp_path, monkeypatch, capsys):
    config = tmp_path / "small.yaml"
    config.write_text(json.dumps(SMALL))
    out, mended = tmp_path / "out", tmp_path / "mended"
    monkeypatch.setenv("SWEEP_MENDED", str(mended))
    bad = ["made_to_crash", "made_to_be_killed", "made_to_fill_the_disk", "made_to_leave"]
    command = ["sweep", str(config), "--grid", f"method=fedlora,{','.join(bad)},fedspine", "--out", str(out)]
    command += ["--workers", "2", "--import", PLUGIN]
    assert main(command) == 1
    printed = capsys.readouterr()
    told = printed.out.splitlines()
    assert states(out) == ["finished", "failed", "failed", "failed", "failed", "finished"]
    errors = {cell["method"]: cell["error"] for cell in read_ledger(out)["cells"]}
    assert errors["made_to_crash"] == "ZeroDivisionError: an error that nobody foresaw"
    assert errors["made_to_be_killed"].startswith("its process was killed by SIGKILL")
    assert "the disk is full" in errors["made_to_fill_the_disk"]
    assert errors["made_to_leave"] == "its process ended with exit code 7 before the run did"
    assert "sweep_plugin.py" in read_ledger(out)["cells"][1]["traceback"]
    assert sum(line.startswith("failed: cell ") for line in told) == 4
    # Only what nobody foresaw has a traceback to read; both places name it.
    (trace,) = out.glob("*/error.txt")
    assert trace.parent.name == read_ledger(out)["cells"][1]["directory"]
    assert "sweep_plugin.py" in trace.read_text()
    assert "ZeroDivisionError: an error that nobody foresaw" in trace.read_text()
    said = f"ZeroDivisionError: an error that nobody foresaw (traceback: {trace})"
    assert said in printed.err
    assert sum(said in line for line in told) == 1

    assert main(command) == 1  # they stay failed until asked for
    assert "[" not in capsys.readouterr().err
    mended.touch()
    assert main([*command, "--rerun-failed"]) == 0
    assert states(out) == ["finished"] * 6
    assert not list(out.glob("*/error.txt"))
    assert all("traceback" not in cell and cell["error"] is None for cell in read_ledger(out)["cells"])
    # They went on from their checkpoints, and ended as if nothing had happened.
    runs = {run.method: run for run in fedsim.load_sweep(out)}
    reference = runs["made_to_leave"].rounds.drop(columns="host_s")
    for name in bad[:3]:
        pd.testing.assert_frame_equal(runs[name].rounds.drop(columns="host_s"), reference, check_exact=True)


def test_cells_run_seed_by_seed_so_that_a_stopped_sweep_holds_whole_comparisons(tmp_path, capsys):
    swept = fedsim.sweep(SMALL, grid=METHODS, seeds="3,1", out=tmp_path / "out", workers=1)
    assert [cell["seed"] for cell in swept.cells] == [3, 1, 3, 1]
    ended = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert [line.split("(")[1].split(")")[0] for line in ended] == [
        "method=fedspine, seed=3",
        "method=fedlora, seed=3",
        "method=fedspine, seed=1",
        "method=fedlora, seed=1",
    ]


def start_sweep(config, out, **environment):
    command = [sys.executable, "-m", "fedsim.cli", "sweep", str(config), "--out", str(out), "--workers", "2"]
    command += ["--grid", "method=fedlora,made_to_dawdle", "--seeds", "0-1", "--import", PLUGIN]
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where a shell started the tests in the background, SIGINT would be ignored by them and by what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_until(condition, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it never happened"
        time.sleep(0.02)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_sweep_leaves_a_readable_book_and_goes_on(tmp_path, stop):
    config, out, mended = tmp_path / "small.yaml", tmp_path / "out", tmp_path / "mended"
    config.write_text(json.dumps(SMALL))

    def dawdling():
        return list(out.glob("made_to_dawdle-seed*/checkpoint/*"))

    stopped = start_sweep(config, out, SWEEP_MENDED=str(mended))
    wait_until(lambda: len({path.parent.parent for path in dawdling()}) == 2)
    time.sleep(0.3)  # both are asleep in round 2 by now, or in the rounds before
    stopped.send_signal(stop)
    _, said = stopped.communicate(timeout=30)
    left = "interrupted" if stop == signal.SIGINT else "running"
    assert stopped.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL)
    assert states(out) == ["finished", "finished", left, left]
    assert "Traceback" not in said
    if stop == signal.SIGINT:
        assert "the same command goes on with the sweep" in said
    assert [run.method for run in fedsim.load_sweep(out)] == ["fedlora"] * 2
    assert len(fedsim.load_sweep(out, unfinished=True)) == 4

    mended.touch()  # the cells' processes must be gone too, or their run directories would be in use
    again = start_sweep(config, out, SWEEP_MENDED=str(mended))
    printed, said = again.communicate(timeout=60)
    assert again.returncode == 0, said
    assert "4 cells (2 finished, 2 interrupted)" in printed
    assert states(out) == ["finished"] * 4


def test_a_book_that_was_removed_is_made_again_from_the_runs(whole, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole.path, copy)
    (copy / "sweep.json").unlink()
    again = fedsim.sweep(SMALL, grid=METHODS, seeds="0-2", out=copy, quiet=True, workers=1)
    assert {cell["state"] for cell in again.cells} == {"finished"}
    assert_same_runs(again.runs[:2], whole.runs[:2])


def test_a_cell_that_fails_before_its_run_begins_leaves_its_traceback_and_can_run_again(tmp_path, monkeypatch, capsys):
    """Its directory holds nothing but the traceback then, which must not keep the run from beginning."""
    plan = plan_sweep(SMALL, grid=METHODS)
    ledger = open_ledger(tmp_path / "out", plan)
    ledger.begin(0)
    ledger.end(Done(0, "ValueError: no", trace="Traceback: no"))
    ledger.close()
    trace = ledger.path / plan.cells[0].directory / "error.txt"
    assert trace.read_text() == "Traceback: no"
    assert fedsim.load_sweep(ledger.path) == []
    again = fedsim.sweep(SMALL, grid=METHODS, out=ledger.path, rerun_failed=True, workers=1, quiet=True)
    assert not again.failed, again.summary()
    assert not trace.exists()


def test_a_finished_cell_that_was_damaged_says_its_cure_and_one_that_is_gone_is_missing(whole, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(whole.path, copy)
    seeds = f"0-{max(cell['seed'] for cell in read_ledger(copy)['cells'])}"
    gone = fedsim.load_sweep(copy)[0].path
    (gone / "rounds.parquet").write_bytes(b"PAR1")
    assert main(["compare", str(copy)]) == 0  # one damaged run does not stop the others
    told = " ".join(capsys.readouterr().out.split())
    assert f"run '{gone}' is left out" in told
    assert "rounds.parquet' is damaged (it has 4 bytes where" in told
    assert "delete the folder and run it again; for a sweep's cell the same sweep command runs it again" in told
    shutil.rmtree(gone)  # the cure
    left = [cell["directory"] for cell in read_ledger(copy)["cells"] if cell["directory"] != gone.name]
    assert [run.path.name for run in fedsim.load_sweep(copy)] == left
    assert main(["compare", str(copy)]) == 0
    words = f"lacks 1 of {len(left) + 1} cells: method=fedspine, seed=0 (its directory is gone: '{gone}')"
    assert words in " ".join(capsys.readouterr().out.split())
    again = fedsim.sweep(SMALL, grid=METHODS, seeds=seeds, out=copy, quiet=True, workers=1)
    assert_same_runs(again.runs, fedsim.load_sweep(whole.path))


def test_a_sweep_of_which_no_cell_ever_began_gives_way_to_another(tmp_path):
    out = tmp_path / "out"
    open_ledger(out, plan_sweep(SMALL, grid=METHODS)).close()
    other = plan_sweep(SMALL, grid={"method": ["hetlora"]})
    open_ledger(out, other).close()
    assert [cell["method"] for cell in read_ledger(out)["cells"]] == ["hetlora"]
    (out / other.cells[0].directory).mkdir()  # now one has begun
    with pytest.raises(RunError, match="holds another sweep: 1 of its 1 cells"):
        open_ledger(out, plan_sweep(SMALL, grid=METHODS))


def test_a_full_disk_under_the_book_does_not_stop_the_cells(tmp_path, monkeypatch, capsys):
    from fedsim.sweeps import ledger

    real, calls = ledger.atomic_write_json, []

    def full(path, value):
        calls.append(path)
        if 2 <= len(calls) <= 4:
            raise RunError(f"cannot write '{path}': the disk is full")
        real(path, value)

    monkeypatch.setattr(ledger, "atomic_write_json", full)
    result = fedsim.sweep(SMALL, grid=METHODS, out=tmp_path / "out", workers=1)
    assert [cell["state"] for cell in result.cells] == ["finished"] * 2
    assert states(tmp_path / "out") == ["finished"] * 2
    assert capsys.readouterr().err.count("the disk is full; the sweep goes on") == 1
