"""Finished runs of the last version whose records had no schema version stay readable.

``run_of_schema_0`` was made by commit ca26905 with ``fedsim.run("quickstart", method=..., **options)``: six clients and
six rounds, a trained run of fedspine and a timing-only run of fedspine_balanced. The checkpoint and the adapter of the
first are left out, for their size.
"""

import shutil
from pathlib import Path

import pytest

from fedsim.cli import main
from fedsim.errors import RunError
from fedsim.records.columns import CLIENT_ROUNDS
from fedsim.records.folder import RunDirectory
from fedsim.records.reader import load
from fedsim.runner.run import run
from fedsim.study.check_run import check_run
from fedsim.study.reward_terms import reward_terms

HERE = Path(__file__).parent / "run_of_schema_0"
NEW = "flight version staleness dispatch_s ratio_before local_steps lora_importance reward_loss reward_progress "
NEW += "reward_importance reward_time"


@pytest.fixture(params=["trained", "timing"])
def old(request, tmp_path):
    return shutil.copytree(HERE / request.param, tmp_path / request.param)


def test_columns_that_it_lacks_are_null_and_the_others_as_they_were(old):
    found = load(old)
    assert found.stated.schema_version == 0
    rows = found.client_rounds
    assert list(rows.columns) == [column.name for column in CLIENT_ROUNDS]
    assert len(rows) == 36
    assert rows[NEW.split()].isna().all(axis=None)
    assert (
        rows.drop(columns=NEW.split())[["client", "device", "compute_s", "bytes_up", "reward"]].notna().all(axis=None)
    )
    assert found.rounds["end_s"].iloc[-1] == found.manifest["simulated_s"]
    assert found.outcome_counts() == {"ok": 36}


def test_it_is_compared_reported_and_checked(old, tmp_path, capsys):
    assert main(["compare", str(old)]) == 0
    assert main(["report", str(old), "--out", str(tmp_path / "page.html")]) == 0
    assert "<svg" in (tmp_path / "page.html").read_text()
    capsys.readouterr()
    assert main(["check", str(old)]) == 0
    told = capsys.readouterr().out
    assert "files: left out: the run has no digests, written by fedsim 0.1.0 (records' schema 0)" in told
    assert "flights: versions and staleness: left out: the records have no flights" in told
    assert "trace and its hash: ok" in told


def test_the_terms_of_its_rewards_are_said_to_be_absent():
    with pytest.raises(RunError, match="records do not hold the terms of its rewards"):
        reward_terms(load(HERE / "trained"))


def test_an_unfinished_one_is_not_gone_on_with(old):
    found = load(old)
    with RunDirectory.open_for_resume(old) as directory:
        directory.write_manifest({**found.manifest, "status": "stopped"})
    with pytest.raises(RunError, match=r"written by fedsim .*schema 0.*go on with the version that began it"):
        run(found.config, out=old, resume=True, quiet=True)


def test_alteration_is_noticed_without_digests(old):
    table = old / "client_rounds.parquet"
    table.write_bytes(table.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"written by fedsim 0\.1\.0 .*restore it from a copy") as refused:
        _ = load(old).client_rounds
    assert "delete" not in str(refused.value)
    assert not check_run(old).is_sound
