"""What commands write where the user says: whole, and never over somebody else's file."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from fedsim.cli import main
from fedsim.errors import ConfigError, RunError
from fedsim.file_set import INDEX, check_replaceable, publishing
from fedsim.methods.catalogue import METHODS, register_method


def put(out, **files):
    with publishing(out) as staging:
        for name, text in files.items():
            (staging / name).write_text(text)


def test_a_set_is_written_and_replaced(tmp_path):
    put(tmp_path / "figs", a="1", b="1")
    put(tmp_path / "figs", a="2")
    assert {file.name: file.read_text() for file in (tmp_path / "figs").iterdir() if file.name != INDEX} == {
        "a": "2",
        "b": "1",
    }


@pytest.mark.parametrize("how", ["foreign", "changed", "folder"])
def test_what_is_not_ours_stays_and_nothing_else_is_written(tmp_path, how):
    put(tmp_path, b="1", **({} if how == "foreign" else {"a": "1"}))
    if how == "folder":
        (tmp_path / "a").unlink()
        (tmp_path / "a").mkdir()
    else:
        (tmp_path / "a").write_text("precious")
    with pytest.raises(RunError, match="nothing is overwritten"):
        put(tmp_path, a="2", b="2")
    assert (tmp_path / "b").read_text() == "1"
    assert how == "folder" or (tmp_path / "a").read_text() == "precious"
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", "b", INDEX}


def test_a_set_that_fails_leaves_the_old_one(tmp_path):
    put(tmp_path, a="1")
    with pytest.raises(TypeError):
        put(tmp_path, a="2", b=None)
    assert (tmp_path / "a").read_text() == "1"
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", INDEX}


def test_stopped_between_two_files_every_one_in_place_is_known_as_ours(tmp_path, monkeypatch):
    put(tmp_path, a="1", b="1")
    real, calls = os.replace, []

    def stopping(source, target):
        if str(target).endswith(("/a", "/b")):
            calls.append(target)
            if len(calls) == 2:
                raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path, a="2", b="2")
    monkeypatch.undo()
    put(tmp_path, a="3", b="3")
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "3"


def test_a_single_file_is_replaced_only_where_it_is_ours(tmp_path):
    page = tmp_path / "page.html"
    check_replaceable(page, (".html",), b"MARK", "report")
    page.write_text("<html>my own</html>")
    with pytest.raises(RunError, match="no report that fedsim wrote"):
        check_replaceable(page, (".html",), b"MARK", "report")
    page.write_text("<html>MARK</html>")
    check_replaceable(page, (".html",), b"MARK", "report")
    with pytest.raises(RunError, match="does not end in"):
        check_replaceable(tmp_path / "notes.txt", (".html",), b"MARK", "report")
    with pytest.raises(RunError, match="is a folder"):
        check_replaceable(tmp_path, (".html",), b"MARK", "report")


def test_no_command_replaces_a_users_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["train.engine=none", "fleet.clients=4", "server.rounds=2", "method=fedlora", "--quiet"]
    (tmp_path / "config.yaml").write_text("seed: 7  # my notes\nmethod: fedlora\n")
    assert main(["run", "config.yaml", *short, "--out", "."]) == 2
    assert main(["run", "config.yaml", *short, "--out", ".", "--force"]) == 2
    assert "my notes" in (tmp_path / "config.yaml").read_text()
    assert main(["run", "quickstart", *short, "--out", "r"]) == 0
    for name in ("my.yaml", "notes.txt", "page.html", "r/manifest.json", "r/config.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if not name.startswith("r/"):
            (tmp_path / name).write_text("precious")
        before = (tmp_path / name).read_bytes()
        assert main(["report", "r", "--out", name]) == 2
        assert (tmp_path / name).read_bytes() == before
    assert main(["report", "r", "--out", "ours.html"]) == main(["report", "r", "--out", "ours.html"]) == 0
    assert main(["compare", "r", "--round", "1"]) == 2
    assert "--round" in capsys.readouterr().err


def test_a_method_cannot_be_named_out_of_its_folder():
    with pytest.raises((RunError, ConfigError), match="not allowed as a name"):
        register_method("../../up", replace(METHODS["fedlora"], name="../../up"))
