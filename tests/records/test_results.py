"""Reading runs back, finished or not."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from made_up import write_run

from fedsim.errors import RunError
from fedsim.records.reader import Run, find_runs, load
from fedsim.text import seconds_text


def test_a_finished_run(tmp_path):
    run = load(write_run(tmp_path / "run", seed=4, rounds=6, clients=16))
    assert run.finished
    assert (run.method, run.seed) == ("fedspine", 4)
    assert run.config["server"]["rounds"] == 6
    assert run.rounds["round"].tolist() == list(range(6))
    assert len(run.client_rounds) == 6 * 16
    assert len(run.events) == 12
    assert run.rounds is run.rounds
    assert str(tmp_path / "run") in run.summary()
    assert "6 rounds" in run.summary()


def test_tables_are_read_only_when_asked(tmp_path):
    path = write_run(tmp_path / "run", rounds=2, clients=8)
    (path / "events.parquet").unlink()
    run = load(path)
    assert len(run.rounds) == 2
    with pytest.raises(RunError, match=r"events\.parquet' is missing"):
        _ = run.events


def test_an_unfinished_run_is_read_from_its_parts(tmp_path):
    whole = load(write_run(tmp_path / "whole", rounds=6, clients=16))
    part = load(write_run(tmp_path / "part", rounds=6, clients=16, stop_before=4))
    assert not part.finished
    assert "unfinished" in part.summary()
    for table, rows in (("rounds", 4), ("client_rounds", 64), ("events", 8)):
        pd.testing.assert_frame_equal(getattr(part, table), getattr(whole, table).iloc[:rows])


def test_a_run_stopped_while_closing_a_part_shows_whole_rounds_only(tmp_path):
    path = write_run(tmp_path / "run", rounds=6, clients=16, stop_before=4)
    (path / "parts" / "client_rounds-000003-000004.parquet").unlink()
    run = load(path)
    assert run.rounds["round"].tolist() == [0, 1, 2]
    assert run.client_rounds["round"].max() == 2
    assert run.events["round"].max() == 2


def test_a_run_without_closed_rounds_has_empty_tables(tmp_path):
    run = load(write_run(tmp_path / "run", rounds=6, clients=16, stop_before=0))
    assert len(run.rounds) == 0
    assert run.rounds.columns[0] == "round"
    assert "0 rounds" in run.summary()


def test_a_table_left_out_is_said_so(tmp_path):
    run = load(write_run(tmp_path / "run", rounds=2, clients=8, events=False))
    assert not run.has("events")
    assert run.has("client_rounds")
    with pytest.raises(RunError, match=r"records\.events: false"):
        _ = run.events


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="no such run directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(RunError, match="not a run directory"):
        load(tmp_path)
    path = write_run(tmp_path / "run", rounds=1, clients=8)
    (path / "rounds.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        RunError, match=r"rounds\.parquet' is damaged \(it has 4 bytes where .*: delete the folder and run it again"
    ):
        _ = load(path).rounds
    (path / "rounds.parquet").unlink()
    with pytest.raises(RunError, match=r"rounds\.parquet' is missing: delete the folder and run it again"):
        _ = load(path).rounds
    for damage in ("- a\n", "a: [\n"):
        (path / "config.yaml").write_text(damage)
        with pytest.raises(RunError, match=r"config\.yaml' is damaged"):
            load(path)
    (path / "config.yaml").unlink()
    with pytest.raises(RunError, match=r"config\.yaml"):
        load(path)


def test_runs_are_found_at_and_below_a_folder_once_and_in_order(tmp_path):
    one = write_run(tmp_path / "study" / "b", rounds=1, clients=8)
    two = write_run(tmp_path / "study" / "a" / "draw-000", rounds=1, clients=8)
    shutil.copytree(one, one / "adapter" / "inner")  # inside a run: not a run of its own
    (tmp_path / "study" / "notes").mkdir()
    assert [run.path for run in find_runs([tmp_path / "study"])] == [two, one]
    assert [run.path for run in find_runs([one, tmp_path / "study"])] == [one, two]
    with pytest.raises(RunError, match=r"no run in .*notes"):
        find_runs([tmp_path / "study" / "notes"])
    with pytest.raises(RunError, match="no such run directory"):
        find_runs([tmp_path / "nowhere"])


def test_the_folder_of_a_sweep_is_told_from_a_run(tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(RunError, match=r"is a sweep's folder, not a run, and has no finished cell yet"):
        load(tmp_path)
    with pytest.raises(RunError, match=r"sweep '.*' has no finished cell: none of its cells has begun"):
        find_runs([tmp_path])
    write_run(tmp_path / "begun", rounds=4, clients=8, stop_before=2)
    with pytest.raises(RunError, match="no finished cell yet"):
        load(tmp_path)
    done = write_run(tmp_path / "done", rounds=2, clients=8)
    with pytest.raises(RunError, match=f"choose one of its cells' folders, such as '{done}', or .*fedsim.load_sweep"):
        load(tmp_path)
    assert [run.path.name for run in find_runs([tmp_path])] == ["begun", "done"]
    figures = tmp_path / "figures"
    figures.mkdir()
    assert [run.path.name for run in find_runs(sorted(tmp_path.iterdir()))] == ["begun", "done"]  # SWEEP/*
    with pytest.raises(RunError, match="no run in"):
        find_runs([figures])


def test_the_summary_says_what_was_lost_and_why():
    run = Run(Path("somewhere"), {}, {"status": "finished", "method": "fedlora", "seed": 0})
    rounds = {"end_s": [0.5, 1.25], "idle_fraction": 0.0, "accuracy": 0.5, "dropped": [2, 1], "participants": 2}
    outcomes = ["late", "out_of_memory", "late", "ok"]
    run.__dict__["rounds"] = pd.DataFrame(rounds)
    run.__dict__["client_rounds"] = pd.DataFrame({"outcome": outcomes})
    assert "1.25 simulated s" in run.summary()
    assert "3 of 4 updates lost (late 2, out_of_memory 1)" in run.summary()
    run.rounds["dropped"] = 0
    assert "lost" not in run.summary()


def test_a_run_is_shown_by_its_path_alone(tmp_path):
    run = load(write_run(tmp_path / "run", rounds=2, clients=8))
    assert repr(run) == f"Run(path={run.path!r})"


@pytest.mark.parametrize(("value", "text"), [(0.0123, "0.0123"), (1.5, "1.5"), (99.44, "99.4"), (1234.5, "1,234")])
def test_short_times_keep_their_digits(value, text):
    assert seconds_text(value) == text
