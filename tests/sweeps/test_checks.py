"""What a sweep refuses before any of its cells runs."""

from __future__ import annotations

import subprocess

import pytest

from fedsim.errors import ConfigError
from fedsim.sweeps import checks
from fedsim.sweeps.cells import plan_sweep
from fedsim.sweeps.checks import check_cells

TRAINED = {
    "model": {"name": "tiny", "lora_rank": 4, "lora_rank_max": 8},
    "data": {"name": "synthetic", "max_samples": 160},
    "fleet": {"name": "fedspine-80", "clients": 8},
    "server": {"rounds": 4},
}


def plan(tree, seeds="0-1", **grid):
    return plan_sweep({**TRAINED, **tree}, grid={"method": ["fedlora", "fedspine"], **grid}, seeds=seeds)


def test_data_is_read_and_split_before_anything_runs(tmp_path):
    data = {"name": None, "path": str(tmp_path / "missing.tsv")}
    with pytest.raises(ConfigError) as caught:
        check_cells(plan({"data": data}), here=True)
    heading, reason = str(caught.value).splitlines()
    assert heading.startswith("2 of 2 combinations")
    assert "method=fedlora; method=fedspine: " in reason  # one reason, said once
    assert "missing.tsv" in reason


def test_a_split_that_fails_concerns_its_own_combinations_only():
    with pytest.raises(ConfigError) as caught:
        check_cells(plan({}, **{"data.max_samples": [160, 5]}), here=True)
    heading, reason = str(caught.value).splitlines()
    assert heading.startswith("2 of 4 combinations")
    assert "data.max_samples=160" not in reason
    assert "the training data has 5 rows" in reason


def test_data_is_read_once_for_all_cells_that_share_it(monkeypatch):
    read = []
    real = checks.load_corpus
    monkeypatch.setattr(checks, "load_corpus", lambda data, seed: read.append(data.max_samples) or real(data, seed))
    check_cells(plan({}, "0-4", **{"data.max_samples": [160, 200]}), here=True)
    assert read == [160, 200]


def test_cells_that_do_not_train_need_no_data(tmp_path):
    data = {"name": None, "path": str(tmp_path / "missing.tsv")}
    check_cells(plan({"data": data, "train": {"engine": "none"}}), here=True)


def test_a_card_that_is_not_there_is_refused_where_this_computer_runs_the_cells(monkeypatch):
    def two_cards(command, **_):
        return subprocess.CompletedProcess(command, 0, stdout="2\n", stderr="")

    monkeypatch.setattr(checks.subprocess, "run", two_cards)
    devices = {"train.torch_device": ["auto", "cpu", "cuda", "cuda:1", "cuda:2"]}
    cells = plan({}, **devices)
    with pytest.raises(ConfigError) as caught:
        check_cells(cells, here=True)
    heading, reason = str(caught.value).splitlines()
    assert heading.startswith("2 of 10 combinations")
    assert "value 'cuda:2' is not allowed here (CUDA devices found: 2)" in reason
    check_cells(cells, here=False)  # the nodes of a cluster may have more
