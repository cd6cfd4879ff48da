"""Whole runs: same results again, after a kill, and with more clients; what must not be overwritten; bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

import fedsim
from fedsim.cli import main
from fedsim.control.timed import TimedPolicy
from fedsim.errors import ConfigError, DataError, ModelError, ProfileError, RunError

SMALL = {
    "method": "fedspine",
    "model": {"name": "tiny", "lora_rank": 4, "lora_rank_max": 8},
    "data": {"name": "synthetic", "max_samples": 240},
    "fleet": {"clients": 6},
    "server": {"rounds": 6, "clients_per_round": 4, "checkpoint_every": 1},
    "train": {"local_steps": 4, "batch_size": 4, "max_length": 32, "learning_rate": 5e-3},
    "prune": {"warmup_rounds": 1, "end_round": 5, "max_step": 0.5},
    "evaluate": {"every_rounds": 2, "panel": 3, "max_samples": 40},
    "cost": {"model": "roberta-base", "batch_size": 8, "seq_len": 64},
}
TIMING = {**SMALL, "train": {**SMALL["train"], "engine": "none"}}
SPENT = ["host_s"]


def assert_same_run(one, other):
    """Same trace, records (but for host seconds) and weights."""
    assert one.manifest["trace_hash"] == other.manifest["trace_hash"]
    pd.testing.assert_frame_equal(one.rounds.drop(columns=SPENT), other.rounds.drop(columns=SPENT), check_exact=True)
    pd.testing.assert_frame_equal(one.client_rounds, other.client_rounds, check_exact=True)
    pd.testing.assert_frame_equal(one.events, other.events, check_exact=True)
    for name in ("adapter_model.safetensors", "head.safetensors"):
        if (one.path / "adapter" / name).exists():
            mine, theirs = load_file(one.path / "adapter" / name), load_file(other.path / "adapter" / name)
            assert mine.keys() == theirs.keys()
            assert all(np.array_equal(mine[key], theirs[key]) for key in mine)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted small run with real training."""
    return fedsim.run(SMALL, out=tmp_path_factory.mktemp("runs") / "whole", quiet=True)


def test_records_add_up_and_name_everything(whole):
    rounds, rows = whole.rounds, whole.client_rounds
    assert len(rounds) == 6
    assert len(rows) == 6 * 4
    parts = rows[["wait_s", "download_s", "compute_s", "upload_s", "idle_s"]].sum(axis=1)
    durations = rows["round"].map(rounds.set_index("round")["duration_s"])
    np.testing.assert_allclose(parts, durations, rtol=0, atol=1e-9)
    assert (np.diff(rounds["end_s"]) > 0).all()
    idle = rows.groupby("round")["idle_s"].sum() / rows.groupby("round")["round"].count() / rounds["duration_s"]
    np.testing.assert_allclose(rounds["idle_fraction"], idle)
    assert rounds["accuracy"].notna().tolist() == [False, True, False, True, False, True]
    assert set(rows["outcome"]) == {"ok"}
    assert rows[["loss_before", "loss_after", "reward"]].notna().all().all()
    manifest = whole.manifest
    assert manifest["status"] == "finished"
    assert manifest["labels"] == ["reconstruction"]
    assert manifest["clock"]["model"] == "roberta-base"
    assert manifest["final_prune_ratio"]["mean"] == pytest.approx(0.5, abs=0.07)  # whole heads: four a layer
    assert manifest["model"]["sha256"]
    assert manifest["data"]["sha256"]


def test_the_same_run_again_is_identical(whole, tmp_path):
    assert_same_run(whole, fedsim.run(SMALL, out=tmp_path / "again", quiet=True))


def test_checkpoints_hold_no_pickle(whole):
    suffixes = {path.suffix for path in whole.path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert suffixes <= {".json", ".yaml", ".parquet", ".safetensors"}


def start_process(config, out, *extra):
    code = (
        "import json, sys, fedsim\n"
        "config, out, resume = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:] == ['resume']\n"
        "fedsim.run(config, out=out, resume=resume)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(config), str(out), *extra],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def test_a_whole_timing_only_run_loads_no_torch(tmp_path):
    code = (
        "import json, sys, fedsim\n"
        "fedsim.run(json.loads(sys.argv[1]), out=sys.argv[2], quiet=True)\n"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, json.dumps(TIMING), str(tmp_path / "run")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.slow
def test_a_killed_run_ends_like_an_uninterrupted_one(whole, tmp_path):
    out = tmp_path / "killed"
    process = start_process(SMALL, out)
    deadline_s = time.monotonic() + 120
    while not list(out.glob("checkpoint/round-00000[23]")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((out / "manifest.json").read_text())["status"] == "running"
    assert_same_run(whole, fedsim.run(SMALL, out=out, resume=True, quiet=True))


@pytest.mark.parametrize("stopped_after", range(6))
def test_resume_from_every_round_is_identical(tmp_path, stopped_after, monkeypatch):
    """An error after any round's checkpoint stands for a kill; a timing-only run shows it for every round."""
    expected = fedsim.run(TIMING, out=tmp_path / "whole", quiet=True)
    import fedsim.runner.run as run_module

    real = run_module.save_checkpoint

    def save_and_die(folder, next_round, state, meta):
        real(folder, next_round, state, meta)
        if next_round == stopped_after + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        fedsim.run(TIMING, out=tmp_path / "killed", quiet=True)
    monkeypatch.undo()
    assert_same_run(expected, fedsim.run(TIMING, out=tmp_path / "killed", resume=True, quiet=True))


def test_checkpoints_paced_by_the_host_change_no_result(tmp_path, monkeypatch):
    """One after the first round and one at the end at least; a kill in between goes on from the first."""
    import fedsim.runner.run as run_module

    expected = fedsim.run(TIMING, out=tmp_path / "whole", quiet=True)
    saved, real = [], run_module.save_checkpoint

    def save_slowly(folder, next_round, state, meta):
        real(folder, next_round, state, meta)
        saved.append(next_round)
        time.sleep(0.2)  # the next is due after four seconds, long after the end

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "save_checkpoint", save_slowly)
    options = {"quiet": True, "server.checkpoint_every": "auto"}
    with monkeypatch.context() as patch:
        patch.setattr(run_module.RecordWriter, "join", die)
        with pytest.raises(KeyboardInterrupt):
            fedsim.run(TIMING, out=tmp_path / "killed", **options)
    assert saved == [1, 6]
    shutil.rmtree(tmp_path / "killed" / "checkpoint" / "round-000006")
    assert_same_run(expected, fedsim.run(TIMING, out=tmp_path / "killed", resume=True, **options))
    assert saved == [1, 6, 2, 6]


def test_resume_between_a_part_and_its_checkpoint_is_identical(tmp_path, monkeypatch):
    expected = fedsim.run(TIMING, out=tmp_path / "whole", quiet=True)
    import fedsim.runner.run as run_module

    def die(folder, next_round, state, meta):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "save_checkpoint", die)
    with pytest.raises(KeyboardInterrupt):
        fedsim.run(TIMING, out=tmp_path / "killed", quiet=True)
    monkeypatch.undo()
    assert_same_run(expected, fedsim.run(TIMING, out=tmp_path / "killed", resume=True, quiet=True))


def test_resume_of_a_run_that_never_began_begins(tmp_path):
    run = fedsim.run(TIMING, out=tmp_path / "new", resume=True, quiet=True)
    assert run.manifest["status"] == "finished"


def test_a_finished_run_is_never_overwritten_without_force(tmp_path):
    first = fedsim.run(TIMING, out=tmp_path / "run", quiet=True)
    assert len(first.rounds)
    assert len(first.client_rounds)
    assert len(first.events)
    with pytest.raises(RunError, match=r"finished run.*--force"):
        fedsim.run(TIMING, out=tmp_path / "run", quiet=True)
    assert fedsim.run(TIMING, out=tmp_path / "run", resume=True, quiet=True).manifest == first.manifest
    unread = fedsim.load(tmp_path / "run")
    again = fedsim.run(TIMING, out=tmp_path / "run", force=True, quiet=True)
    assert_same_run(first, again)
    with pytest.raises(RunError, match="was written anew since it was loaded"):
        _ = unread.rounds


def test_resume_with_another_configuration_is_refused(tmp_path):
    fedsim.run(TIMING, out=tmp_path / "run", quiet=True)
    with pytest.raises(RunError, match=r"another configuration \(it differs in: train\)"):
        fedsim.run(TIMING, out=tmp_path / "run", resume=True, quiet=True, train__local_steps=5)


def test_a_wrong_configuration_touches_nothing(tmp_path):
    first = fedsim.run(TIMING, out=tmp_path / "run", quiet=True)
    before = {path: path.stat().st_mtime_ns for path in first.path.rglob("*")}
    with pytest.raises(ConfigError):
        fedsim.run(TIMING, out=tmp_path / "run", force=True, quiet=True, prune__target=0.79, fleet__clients=3)
    assert {path: path.stat().st_mtime_ns for path in first.path.rglob("*")} == before


def test_timing_only_has_the_clock_of_the_trained_run_where_no_loss_is_read(tmp_path):
    """Simulated time comes from the cost model alone: what the learner does in host time never shows."""
    uniform = {"method": "fedspine_uniform"}
    trained = fedsim.run({**SMALL, **uniform}, out=tmp_path / "trained", quiet=True)
    timed = fedsim.run({**TIMING, **uniform}, out=tmp_path / "timed", quiet=True)
    assert trained.manifest["trace_hash"] == timed.manifest["trace_hash"]
    assert "timing only: nothing was trained" in timed.manifest["labels"]
    assert timed.rounds["accuracy"].isna().all()


def test_adding_a_client_leaves_the_others_times_and_modes_alone(tmp_path):
    tree = {**TIMING, "method": "fedlora", "server": {"rounds": 3}}
    base = {**tree, "fleet": {"name": "fedspine-80-modes", "mode_period": 1}}
    few = fedsim.run(base, out=tmp_path / "few", quiet=True, fleet__clients=12)
    more = fedsim.run(base, out=tmp_path / "more", quiet=True, fleet__clients=13)
    columns = ["round", "client", "device", "mode", "download_s", "compute_s", "upload_s"]
    kept = more.client_rounds[more.client_rounds["client"] < 12].reset_index(drop=True)
    # Durations are differences of clock readings, and the clock stands elsewhere once a longer round has passed.
    pd.testing.assert_frame_equal(few.client_rounds[columns], kept[columns], check_exact=False, rtol=0, atol=1e-9)


def test_stopping_at_a_time_budget_and_resuming_changes_nothing(tmp_path):
    run = fedsim.run(TIMING, out=tmp_path / "run", quiet=True, server__time_budget_s=1.0)
    assert len(run.rounds) == 1
    assert run.manifest["status"] == "finished"
    # Its last round is the last one of the run, known before it is evaluated: the final cut belongs to it.
    assert run.manifest["final_prune_ratio"]["mean"] == pytest.approx(0.5, abs=0.07)


def stopped(config, out, monkeypatch, **options):
    """A run that was stopped right after its second checkpoint."""
    import fedsim.runner.run as run_module

    real = run_module.save_checkpoint

    def save_and_die(folder, next_round, state, meta):
        real(folder, next_round, state, meta)
        if next_round == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            fedsim.run(config, out=out, quiet=True, **options)


def test_resume_with_other_device_profiles_is_refused(tmp_path, monkeypatch):
    expected = fedsim.run(TIMING, out=tmp_path / "whole", quiet=True, profile_draw=1)
    stopped(TIMING, tmp_path / "run", monkeypatch, profile_draw=1)
    for other in (None, 0):
        with pytest.raises(RunError, match=r"other device profiles \(draw 1, not"):
            fedsim.run(TIMING, out=tmp_path / "run", resume=True, quiet=True, profile_draw=other)
    assert_same_run(expected, fedsim.run(TIMING, out=tmp_path / "run", resume=True, quiet=True, profile_draw=1))


def test_resume_on_changed_data_is_refused(tmp_path, monkeypatch):
    rows = [f"{word} {number}\t{label}" for number in range(60) for word, label in (("good", 1), ("bad", 0))]
    table = tmp_path / "train.tsv"
    table.write_text("\n".join(["text\tlabel", *rows]), encoding="utf-8")
    config = {**SMALL, "data": {"path": str(table)}}
    stopped(config, tmp_path / "run", monkeypatch)
    table.write_text("\n".join(["text\tlabel", *rows[2:]]), encoding="utf-8")
    with pytest.raises(RunError, match="was started with another data"):
        fedsim.run(config, out=tmp_path / "run", resume=True, quiet=True)


def test_parts_left_by_a_kill_after_the_last_manifest_are_removed(tmp_path):
    run = fedsim.run(TIMING, out=tmp_path / "run", quiet=True)
    (run.path / "parts").mkdir()
    assert fedsim.run(TIMING, out=tmp_path / "run", resume=True, quiet=True).finished
    assert not (run.path / "parts").exists()


def test_timing_only_refuses_misspelt_names_too(tmp_path):
    for key, word in (("prune.criterion", "lora_guide"), ("aggregate.rule", "lowrnk")):
        with pytest.raises(ConfigError, match="did you mean"):
            fedsim.run(TIMING, out=tmp_path / "run", quiet=True, **{key: word})


def test_the_limit_that_a_refused_target_names_is_allowed(tmp_path):
    """Equal counts of four heads cannot follow every ratio below the one-head minimum; unequal layers can."""
    for selection in ("layer_local", "global"):
        config = {**SMALL, "method": "fedspine_uniform"}
        overrides = {"server.rounds": 1, "prune.warmup_rounds": 0, "prune.end_round": 1, "prune.selection": selection}
        overrides |= {"prune.max_step": 1.0}
        with pytest.raises(ConfigError, match=r"prune.target: value 0.95") as caught:
            fedsim.run(config, out=tmp_path / "no", quiet=True, **overrides, **{"prune.target": 0.95})
        limit = float(re.search(r"at most (\d\.\d+)", str(caught.value))[1])
        run = fedsim.run(config, out=tmp_path / selection, quiet=True, **overrides, **{"prune.target": limit})
        assert run.manifest["final_prune_ratio"]["mean"] == pytest.approx(limit, abs=0.05)


def test_profile_draws_change_the_clock_and_repeat(tmp_path):
    plain = fedsim.run(TIMING, out=tmp_path / "plain", quiet=True)
    one = fedsim.run(TIMING, out=tmp_path / "one", quiet=True, profile_draw=0)
    again = fedsim.run(TIMING, out=tmp_path / "again", quiet=True, profile_draw=0)
    other = fedsim.run(TIMING, out=tmp_path / "other", quiet=True, profile_draw=1)
    hashes = [run.manifest["trace_hash"] for run in (plain, one, other)]
    assert len(set(hashes)) == 3
    assert one.manifest["trace_hash"] == again.manifest["trace_hash"]
    assert any("error bands" in label for label in one.manifest["labels"])


BAD = [
    ({"server.clients_per_round": 7}, ConfigError, "server.clients_per_round: value 7"),
    ({"prune.max_ratio": 0.95}, ConfigError, "prune.max_ratio: value 0.95"),
    ({"prune.target": 0.95, "prune.target_scope": "every_device"}, ConfigError, "prune.target: value 0.95"),
    ({"model.lora_rank_max": 128}, ConfigError, "model.lora_rank_max: value 128"),
    ({"model.name": "no/such/model/folder"}, ModelError, "no/such/model/folder"),
    ({"cost.model": "bert-bas"}, ModelError, "did you mean 'bert-base'"),
    ({"fleet.name": "fedspine-8"}, ProfileError, "fedspine-8"),
    ({"control.policy": "balance"}, ConfigError, "did you mean 'balanced'"),
    ({"prune.criterion": "lora_guide"}, ConfigError, "did you mean 'lora_guided'"),
    ({"aggregate.rule": "lowrnk"}, ConfigError, "did you mean 'lowrank'"),
    ({"data.name": None, "data.path": "nowhere.tsv"}, DataError, "nowhere.tsv"),
    ({"train.max_length": 4096}, ConfigError, "train.max_length: value 4096"),
    ({"train.torch_device": "tpu"}, ConfigError, "train.torch_device: value 'tpu'"),
    ({"data.max_samples": 5}, DataError, "fleet.clients is 6"),
]


@pytest.mark.parametrize(("overrides", "kind", "words"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_sentence_and_leaves_no_run(tmp_path, overrides, kind, words):
    with pytest.raises(kind) as caught:
        fedsim.run(SMALL, out=tmp_path / "run", quiet=True, **overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_the_command_line_exits_with_two_and_one_sentence(tmp_path, capsys):
    assert main(["run", "quickstart", "train.local_stps=3", "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("fedsim: error: unknown key 'train.local_stps'; did you mean 'local_steps'?")
    assert not (tmp_path / "run").exists()


def test_a_second_process_on_one_directory_refuses(tmp_path):
    from fedsim.records.folder import RunDirectory

    with RunDirectory.create(tmp_path / "run", force=False):
        process = start_process(TIMING, tmp_path / "run")
        _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "in use by another process" in errors


def test_a_damaged_checkpoint_is_named(tmp_path, monkeypatch):
    import fedsim.runner.run as run_module

    real = run_module.save_checkpoint

    def save_and_die(folder, next_round, state, meta):
        real(folder, next_round, state, meta)
        if next_round == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        fedsim.run(TIMING, out=tmp_path / "run", quiet=True)
    monkeypatch.undo()
    state = tmp_path / "run" / "checkpoint" / "round-000003" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-7])
    with pytest.raises(RunError, match=r"state\.safetensors"):
        fedsim.run(TIMING, out=tmp_path / "run", resume=True, quiet=True)


def test_resume_without_its_configuration_file_is_one_sentence(tmp_path):
    path = fedsim.run(TIMING, out=tmp_path / "run", quiet=True).path
    (path / "config.yaml").unlink()
    with pytest.raises(RunError, match=r"config\.yaml"):
        fedsim.run(TIMING, out=path, resume=True, quiet=True)


def test_overrides_may_stand_behind_an_option(tmp_path, capsys):
    words = ["run", "quickstart", "--out", str(tmp_path / "run"), "--quiet"]
    assert main([*words, "train.local_step=3"]) == 2
    assert "did you mean 'local_steps'" in capsys.readouterr().err
    for wrong in (["--seeds=3"], ["stray"]):
        with pytest.raises(SystemExit):
            main([*words, *wrong])
    with pytest.raises(SystemExit):
        main(["devices", "jetson-tx2", "seed=3"])


def test_the_controllers_share_of_the_host_time_is_in_the_manifest(tmp_path):
    slept_s = 0.05
    run = fedsim.run({**SMALL, "train": {"engine": "none"}}, out=tmp_path / "run", quiet=True)
    assert 0.0 < run.manifest["controller_host_s"] < run.manifest["host_s"]
    policy = TimedPolicy(SimpleNamespace(select=time.sleep, update=time.sleep))
    policy.select(slept_s)
    policy.update(slept_s)
    assert 2 * slept_s <= policy.spent_s < 20 * slept_s


def test_python_dash_m_is_the_command():
    found = subprocess.run([sys.executable, "-m", "fedsim", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("fedsim ")
