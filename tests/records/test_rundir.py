"""The run directory: who may write, what is never overwritten, and files that are whole or absent."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim.errors import RunError
from fedsim.files import atomic_write_bytes, atomic_write_json, atomic_write_text
from fedsim.records.folder import RunDirectory, check_usable
from fedsim.records.own_files import CONFIG_MARK

HOLDER = """
import sys, time
from fedsim.records.folder import RunDirectory
directory = RunDirectory.create(sys.argv[1], force=False)
directory.write_manifest({"status": "running"})
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A second process that holds the lock of ``tmp_path/run``."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "held"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_second_process_is_refused_and_the_lock_dies_with_a_killed_holder(tmp_path, holder):
    path = tmp_path / "run"
    for attempt in (
        lambda: RunDirectory.create(path, force=False),
        lambda: RunDirectory.create(path, force=True),
        lambda: RunDirectory.open_for_resume(path),
    ):
        with pytest.raises(RunError, match=r"run' is in use by another process"):
            attempt()
    assert json.loads((path / "manifest.json").read_text()) == {"status": "running"}
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunDirectory.open_for_resume(path) as directory:
        assert directory.manifest == {"status": "running"}


def test_the_lock_holds_within_one_process_and_ends_with_the_block(tmp_path):
    with (
        RunDirectory.create(tmp_path / "run", force=False),
        pytest.raises(RunError, match="in use"),
    ):
        RunDirectory.create(tmp_path / "run", force=True)
    RunDirectory.create(tmp_path / "run", force=False).close()


@pytest.mark.parametrize(
    ("status", "flags"),
    [("finished", ["--force", "--out"]), ("running", ["--resume", "--force"]), ("stopped", ["--resume"])],
)
def test_a_run_is_not_overwritten_without_a_flag(tmp_path, status, flags):
    with RunDirectory.create(tmp_path, force=False) as directory:
        directory.write_manifest({"status": status, "mark": 1})
    with pytest.raises(RunError) as caught:
        RunDirectory.create(tmp_path, force=False)
    assert all(flag in str(caught.value) for flag in flags)
    assert str(tmp_path) in str(caught.value)
    # The refusal leaves no lock behind, and nothing was touched.
    with RunDirectory.open_for_resume(tmp_path) as directory:
        assert directory.manifest == {"status": status, "mark": 1}


def test_force_removes_the_run_but_no_foreign_file(tmp_path):
    with RunDirectory.create(tmp_path, force=False) as directory:
        directory.write_manifest({"status": "finished"})
        directory.write_text("config.yaml", "seed: 1\n")
    own = [
        "parts/rounds-000000-000005.parquet",
        "checkpoint/round-000005/meta.json",
        "adapter/adapter_config.json",
        "tensorboard/events.out.tfevents.1",
        "rounds.parquet",
        ".rounds.parquet.12.tmp",
    ]
    foreign = ["notes.txt", "adapter/mine.txt", "checkpoint/mine/file", ".mine.tmp"]
    for name in [*own, *foreign]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with RunDirectory.create(tmp_path, force=True) as directory:
        assert directory.manifest == {}
        left = sorted(str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*") if entry.is_file())
        assert left == sorted([".lock", *foreign])


@pytest.mark.parametrize("name", ["config.yaml", "checkpoint", "adapter", "rounds.parquet", "manifest.json", "wandb"])
def test_force_overwrites_nothing_where_no_run_is(tmp_path, name):
    if "." in name:
        (tmp_path / name).write_text("{}")
    else:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("precious")
    for ask in (lambda: check_usable(tmp_path, force=True), lambda: RunDirectory.create(tmp_path, force=True)):
        with pytest.raises(RunError, match=f"{re.escape(name)}' was not made by a run"):
            ask()
    assert (tmp_path / name).exists()


def test_a_config_of_the_users_counts_as_a_foreign_file(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1  # my notes\n")
    with pytest.raises(RunError, match=r"not empty.*config\.yaml"):
        RunDirectory.create(tmp_path, force=False)
    assert "my notes" in (tmp_path / "config.yaml").read_text()


def test_what_a_killed_process_left_half_written_goes_at_resume(tmp_path):
    with RunDirectory.create(tmp_path, force=False) as directory:
        directory.write_manifest({"status": "running"})
    left = [".client_rounds.parquet.77.tmp", "adapter/.head.safetensors.77.tmp", "checkpoint/.round-000003.tmp/state"]
    for name in [*left, ".notes.tmp"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    RunDirectory.open_for_resume(tmp_path).close()
    assert not any((tmp_path / name).exists() for name in left)
    assert (tmp_path / ".notes.tmp").exists()


def test_a_folder_with_foreign_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"not empty.*thesis\.tex"):
        RunDirectory.create(tmp_path, force=False)


def test_what_a_kill_before_the_first_manifest_leaves_does_not_block_a_new_run(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "config.yaml").write_text(f"{CONFIG_MARK}seed: 1\n")
    (tmp_path / ".manifest.json.12.tmp").write_text('{"sta')
    RunDirectory.create(tmp_path, force=False).close()


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(RunError, match="does not exist"):
        RunDirectory.open_for_resume(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"no manifest\.json"):
        RunDirectory.open_for_resume(tmp_path)
    assert list(tmp_path.iterdir()) == []
    for damage in ('{"status": "run', "[]", '{"status": "odd"}'):
        (tmp_path / "manifest.json").write_text(damage)
        with pytest.raises(RunError, match=r"manifest\.json' is damaged"):
            RunDirectory.open_for_resume(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunError, match="is a file"):
        RunDirectory.create(tmp_path / "run", force=True)


def test_a_closed_directory_takes_no_writes(tmp_path):
    with RunDirectory.create(tmp_path, force=False) as directory:
        pass
    with pytest.raises(ValueError, match="closed"):
        directory.write_manifest({"status": "running"})
    with pytest.raises(ValueError, match="closed"):
        directory.write_text("config.yaml", "")


def test_atomic_writes_write(tmp_path):
    atomic_write_bytes(tmp_path / "a", b"\x00\xff")
    atomic_write_text(tmp_path / "b", "tau ≥ 5")
    atomic_write_json(tmp_path / "c", {"z": 1, "a": [None, True]})
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b").read_text(encoding="utf-8") == "tau ≥ 5"
    assert (tmp_path / "c").read_text() == '{\n  "a": [\n    null,\n    true\n  ],\n  "z": 1\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        atomic_write_json(tmp_path / "c", {"nan": float("nan")})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full (7 bytes were to be written); free some space"),
        (errno.EACCES, "no permission"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_is_one_sentence_and_leaves_the_old_file(tmp_path, monkeypatch, number, said, step):
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(RunError) as caught:
        atomic_write_bytes(target, b"new one")
    assert said in str(caught.value)
    assert str(target) in str(caught.value)
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("x")
    with pytest.raises(RunError, match="cannot write"):
        RunDirectory.create(blocker / "run", force=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match=r"no permission.*--out"):
        RunDirectory.create(tmp_path / "run", force=False)
    tmp_path.chmod(0o700)


def test_every_error_survives_being_raised_again_from_its_arguments(tmp_path):
    with pytest.raises(RunError) as caught:
        RunDirectory.open_for_resume(Path(tmp_path / "nowhere"))
    again = type(caught.value)(*caught.value.args)
    assert str(again) == str(caught.value)
