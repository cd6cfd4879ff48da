"""Lost updates are counted from the records, however the run came to its end."""

import numpy as np
import pytest
from made_up import config_of, rewrite, write_run

from fedsim.errors import RunError
from fedsim.records.lost import LostUpdates, lost_updates
from fedsim.records.reader import Run, load


def rewritten(path, outcomes):
    """The run at `path` with these outcomes in its records, in turn."""
    rewrite(path, "client_rounds", lambda table: table.assign(outcome=np.resize(outcomes, len(table))))
    return load(path)


def test_outcomes_other_than_ok_are_counted_by_name(tmp_path):
    run = rewritten(write_run(tmp_path / "run", rounds=4, clients=8), ["late", "ok", "dropped", "late"])
    table = run.client_rounds
    sent = len(table)
    counted = lost_updates(load(run.path))
    assert counted == LostUpdates(sent, int(table["outcome"].ne("ok").sum()), counted.by_outcome)
    assert counted.by_outcome == table["outcome"].value_counts().drop("ok").to_dict()
    assert list(counted.by_outcome) == ["dropped", "late"]
    assert counted.text == f"{counted.lost} of {sent} updates lost (dropped {sent // 4}, late {sent // 2})"
    assert lost_updates(run) == counted, "a table that was read already gives the same"


def test_none_lost(tmp_path):
    counted = lost_updates(rewritten(write_run(tmp_path / "run", rounds=3, clients=8), ["ok"]))
    assert (counted.lost, counted.by_outcome, counted.text) == (0, {}, "no update lost")
    assert counted.sent > 0


def test_all_lost(tmp_path):
    counted = lost_updates(rewritten(write_run(tmp_path / "run", rounds=3, clients=8), ["late"]))
    assert counted.lost == counted.sent == counted.by_outcome["late"]


def test_runs_that_do_not_record_clients_have_no_count(tmp_path):
    path = write_run(tmp_path / "run", config=config_of("fedlora", 0, 4, client_rounds=False), clients=8)
    assert lost_updates(load(path)) is None


def test_only_the_outcomes_of_a_finished_run_are_read(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", rounds=3, clients=8)
    monkeypatch.setattr(Run, "_read", lambda *_: pytest.fail("the whole table was read"))
    assert lost_updates(load(path)).sent > 0


def test_unfinished_runs_count_what_they_have(tmp_path):
    run = load(write_run(tmp_path / "run", rounds=15, clients=16, stop_before=8))
    assert not run.finished
    assert lost_updates(run).sent == len(run.client_rounds)


def test_damage_is_one_sentence(tmp_path):
    path = write_run(tmp_path / "run", rounds=3, clients=8)
    (path / "client_rounds.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(RunError, match="damaged"):
        lost_updates(load(path))
    (path / "client_rounds.parquet").unlink()
    with pytest.raises(RunError, match="is missing"):
        lost_updates(load(path))
