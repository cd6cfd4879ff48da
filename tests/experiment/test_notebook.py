"""The notebooks run on finished runs, and never train."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

import fedsim

NOTEBOOKS = Path(fedsim.__file__).parent.parent / "notebooks"
TREE = {
    "fleet": {"clients": 8},
    "server": {"rounds": 3},
    "train": {"engine": "none", "local_steps": 4},
    "prune": {"warmup_rounds": 1, "end_round": 3},
}


@pytest.mark.skipif(not NOTEBOOKS.is_dir(), reason="installed without its source: there are no notebooks")
@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.py")), ids=lambda path: path.name)
def test_notebook_reads_finished_runs(path, tmp_path, monkeypatch, capsys):
    import matplotlib

    matplotlib.use("Agg")
    for method in ("fedlora", "fedspine_balanced"):
        fedsim.run({**TREE, "method": method}, out=tmp_path / method, quiet=True)
    monkeypatch.setattr(sys, "argv", [path.name, str(tmp_path)])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert "fedspine_balanced" in printed
    assert "jetson-agx-xavier" in printed
    assert "torch" not in path.read_text(encoding="utf-8")
