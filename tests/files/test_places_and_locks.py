"""Paths as people type them, and file systems that cannot do everything."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

import fedsim.files
import fedsim.locks
from fedsim.errors import FedsimError, RunError
from fedsim.files import atomic_write_text, sync_folder
from fedsim.locks import acquire, release
from fedsim.places import check_name, temporary_name, user_path


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch):
    monkeypatch.setattr(fedsim.files, "_said", set())


def test_home_is_written_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/runs/x") == tmp_path / "runs" / "x"
    assert user_path("a/~/b").parts == ("a", "~", "b")
    with pytest.raises(FedsimError, match="no home folder of that name"):
        user_path("~nobody-of-that-name/x")


@pytest.mark.parametrize("name", ["x" * 256, "ä" * 128, "ok/" + "y" * 300 + "/ok", "a\0b"])
def test_names_that_no_file_system_holds(name):
    with pytest.raises(FedsimError, match="bytes long|null character"):
        user_path(name)


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", "..", ".hidden", "", " ", "line\nfeed", "n" * 200])
def test_names_stay_within_their_folder(name):
    with pytest.raises(RunError, match="not allowed as a name|too long"):
        check_name("method", name)


def test_a_name_of_the_greatest_length_is_written(tmp_path):
    for name in ("x" * 255, "ä" * 127):
        atomic_write_text(tmp_path / name, "whole")
        assert (tmp_path / name).read_text() == "whole"
        assert len(os.fsencode(temporary_name(tmp_path / name, ".tmp").name)) <= 255
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_flock_a_warning(tmp_path, monkeypatch, capsys, number):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fedsim.locks.fcntl, "flock", flock)
    for _ in range(2):
        release(acquire(tmp_path / ".lock", "busy"))
    said = capsys.readouterr().err
    assert said.count("is not locked") == 1


def test_a_lock_that_another_holds_is_refused(tmp_path):
    held = acquire(tmp_path / ".lock", "busy")
    with pytest.raises(RunError, match="^busy$"):
        acquire(tmp_path / ".lock", "busy")
    release(held)
    release(acquire(tmp_path / ".lock", "busy"))


def test_a_folder_that_cannot_be_synced_is_warned_of_and_a_failing_disk_is_not_hidden(tmp_path, monkeypatch, capsys):
    real = os.fsync

    def no_folders(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)
    atomic_write_text(tmp_path / "a", "x")
    assert "power cut" in capsys.readouterr().err

    def failing(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)
    with pytest.raises(RunError, match="Input/output"):
        atomic_write_text(tmp_path / "a", "y")
    assert (tmp_path / "a").read_text() == "x"


def test_without_fcntl_a_run_folder_opens(tmp_path):
    code = (
        "import sys; sys.modules['fcntl'] = None\n"
        "from fedsim.records.folder import RunDirectory\n"
        f"RunDirectory.create({str(tmp_path / 'r')!r}, force=False).close()\n"
        "import fedsim.sweeps.ledger\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no file locks" in done.stderr
