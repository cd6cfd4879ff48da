"""``fedsim check``: silent on what runs write, and every invariant found out when it is broken."""

import json
import shutil

import numpy as np
import pytest
from made_up import rewrite

import fedsim
from fedsim.cli import main
from fedsim.errors import RunError
from fedsim.study.check_run import check_run

TIMING = {
    "method": "fedspine",
    "model": {"name": "roberta-base", "lora_rank": 8},
    "fleet": {"name": "fedspine-80-modes", "clients": 12, "mode_period": 2},
    "server": {"rounds": 8, "clients_per_round": 6, "over_selection": 0.5, "deadline_s": 40.0},
    "train": {"engine": "none", "max_length": 128},
    "prune": {"warmup_rounds": 2, "end_round": 6},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return fedsim.run(TIMING, out=tmp_path_factory.mktemp("runs") / "run", quiet=True).path


def test_a_run_is_sound_and_says_what_was_looked_at(sound, capsys):
    assert {"ok", "late"} <= set(fedsim.load(sound).client_rounds["outcome"])
    assert main(["check", str(sound)]) == 0
    told = capsys.readouterr().out
    assert "left out" not in told
    assert told.count(": ok\n") == 7
    assert told.endswith(f"nothing wrong: {sound}\n")


def altered(sound, tmp_path, table, change):
    """A copy with a changed table whose digest is right: only the numbers can tell."""
    path = shutil.copytree(sound, tmp_path / "run")
    rewrite(path, table, change)
    return path


def put(column, value, row=9):
    def change(rows):
        old = rows.loc[row, column]
        rows.loc[row, column] = value(old) if callable(value) else value
        return rows

    return change


@pytest.mark.parametrize(
    ("table", "change", "said"),
    [
        ("client_rounds", put("compute_s", lambda old: old + 1e-3), "do not lead from its dispatch"),
        ("client_rounds", put("idle_s", -1.0), "negative or missing seconds"),
        ("client_rounds", put("dispatch_s", lambda old: old - 1e-3), "left before its version was made"),
        ("client_rounds", put("staleness", 1), "staleness that is not merge - version"),
        ("client_rounds", put("version", 2), "staleness that is not merge - version"),
        ("client_rounds", put("flight", 7), "flights twice or missing"),
        ("client_rounds", put("bytes_up", lambda old: old + 100.0), "another bytes_up than its flights"),
        ("client_rounds", put("bytes_down", np.nan), "negative or missing bytes"),
        ("client_rounds", put("energy_j", lambda old: -old), "negative or missing bytes or energy"),
        ("client_rounds", put("outcome", "well"), "unknown outcome"),
        ("client_rounds", put("reward_time", 1.5), "outside [0, 1]"),
        ("client_rounds", put("prune_ratio", 1.0), "ratio outside"),
        ("client_rounds", put("lora_rank", 0), "rank below 1"),
        ("rounds", put("end_s", lambda old: old + 1.0, row=3), "duration that is not end - start"),
        ("rounds", put("participants", 3, row=3), "other participants"),
        ("rounds", put("dropped", 9, row=3), "other lost updates"),
        ("rounds", put("energy_j", lambda old: old * 1.001, row=3), "another energy_j"),
        ("rounds", put("idle_fraction", lambda old: old + 0.01, row=3), "another idle_fraction"),
        ("rounds", put("lora_rank_mean", lambda old: old + 0.01, row=3), "another lora_rank_mean"),
        ("rounds", put("round", 5, row=3), "does not stand in its place"),
        ("events", put("value", lambda old: old + 1.0), "the events hash to"),
    ],
)
def test_every_broken_number_is_found(sound, tmp_path, capsys, table, change, said):
    path = altered(sound, tmp_path, table, change)
    assert main(["check", str(path)]) == 1
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("name", ["rounds.parquet", "checkpoint/round-000008/state.safetensors"])
def test_every_recorded_file_is_compared(sound, tmp_path, name):
    path = shutil.copytree(sound, tmp_path / "run")
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 16
    (path / name).write_bytes(content)
    found = check_run(path)
    assert not found.is_sound
    assert any(name in fault and "SHA-256" in fault for fault in found.verdicts[0].faults)
    (path / name).unlink()
    assert any(fault == f"'{name}': it is missing" for fault in check_run(path).verdicts[0].faults)


def test_an_unfinished_run_is_not_checked(sound, tmp_path):
    path = shutil.copytree(sound, tmp_path / "run")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "status": "stopped"}))
    with pytest.raises(RunError, match="unfinished"):
        check_run(path)


@pytest.mark.parametrize(
    "server",
    [
        {"mode": "semi_async", "buffer": 3, "concurrency": 8},
        {"mode": "async", "concurrency": 8, "max_staleness": 3},
    ],
)
def test_servers_that_do_not_wait_are_held_to_the_same(tmp_path, server):
    tree = {**TIMING, "server": {"rounds": 20, **server}}
    run = fedsim.run(tree, out=tmp_path / "run", quiet=True)
    assert run.client_rounds["staleness"].max() > 0
    found = check_run(run.path)
    assert found.is_sound, found.as_text()
    path = altered(run.path, tmp_path / "altered", "client_rounds", put("idle_s", lambda old: old + 1e3, row=3))
    assert not check_run(path).is_sound
