"""The notebooks run on finished runs and sweeps that the tests make, never train, and are in step with their pairs."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest

import fedsim
from fedsim.study.compare import compare

NOTEBOOKS = Path(fedsim.__file__).parent.parent / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.py"))
TREE = {
    "fleet": {"clients": 8},
    "server": {"rounds": 3},
    "train": {"engine": "none", "local_steps": 4},
    "prune": {"warmup_rounds": 1, "end_round": 3},
}
TRAINED = {
    "model": {"lora_rank": 4, "lora_rank_max": 8},
    "data": {"max_samples": 160},
    "fleet": {"clients": 6},
    "server": {"rounds": 4, "clients_per_round": 3, "checkpoint_every": 4},
    "train": {"local_steps": 2, "batch_size": 4, "max_length": 16},
    "prune": {"max_step": 0.5},
    "evaluate": {"every_rounds": 1, "panel": 2, "max_samples": 20},
    "cases": [
        {"method": "fedlora"},
        {"method": "fedspine"},
        {"method": "fedspine", "train.local_steps": 4, "train.recovery_steps": 1, "server.rounds": 2},
    ],
    "seeds": "0",
}
TIMED = {
    **TREE,
    "method": "fedspine",
    "cases": [
        {"control.discount": 0.9, "control.exploration": 0.02},
        {"control.discount": 0.98, "control.exploration": 0.02},
        {"control.discount": 0.98, "control.exploration": 1.0},
        {"control.discount": 0.98, "control.exploration": 1.0, "fleet.name": "fedspine-80-modes"},
    ],
    "seeds": "0",
}

pytestmark = pytest.mark.skipif(not NOTEBOOKS.is_dir(), reason="installed without its source: there are no notebooks")


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """A tiny sweep of each kind, in processes of one thread: with training, and timing only."""
    folder = tmp_path_factory.mktemp("sweeps")
    fedsim.sweep(TRAINED, out=folder / "trained", workers=1, quiet=True)
    fedsim.sweep(TIMED, out=folder / "timed", workers=1, quiet=True)
    return folder


@pytest.fixture
def execute(monkeypatch, capsys):
    """Runs a notebook's code as a script on a folder; returns its names and what it printed."""
    import matplotlib

    matplotlib.use("Agg")

    def executed(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        names = runpy.run_path(str(NOTEBOOKS / name), run_name="__main__")
        return names, capsys.readouterr().out

    return executed


def test_first_look_reads_finished_runs(execute, tmp_path):
    for method in ("fedlora", "fedspine_balanced"):
        fedsim.run({**TREE, "method": method}, out=tmp_path / method, quiet=True)
    _, printed = execute("first_look.py", tmp_path)
    assert "fedspine_balanced" in printed
    assert "jetson-agx-xavier" in printed


def test_sweep_of_trained_runs(execute, sweeps):
    names, printed = execute("sweep.py", sweeps / "trained")
    out = sweeps / "trained" / "figures"
    drawn = {path.stem for path in out.glob("*.png")}
    assert drawn == {"speedup", "accuracy_over_time", "cumulative_regret", "sensitivity_tau"}
    assert {path.stem for path in out.glob("*.csv")} == drawn
    assert "varied alone: tau\n" in printed
    table = pd.read_csv(out / "sensitivity_tau.csv")
    expected = compare(fedsim.load_sweep(sweeps / "trained")).runs.set_index("method")["time_to_target_s"]
    for tau, seconds in zip(table["value"], table["time_to_target_s"], strict=True):
        own = next(label for label in expected.index if f"train.local_steps={tau:g}" in label)
        assert seconds == pytest.approx(expected[own])
    assert list(table["value"]) == [2.0, 4.0]
    assert set(table["line"]) == {"fedspine"}, "rounds and recovery steps follow tau: they part no lines"
    assert names["baseline"] is None
    assert names["comparison"].baseline == "fedlora"


def test_sweep_of_timing_only_runs_takes_one_fleet_and_holds_all_else(execute, sweeps, monkeypatch):
    monkeypatch.setenv("FEDSIM_SWEEP", str(sweeps / "timed"))
    _, printed = execute("sweep.py", "-f")  # as a kernel starts: the folder comes from the environment
    out = sweeps / "timed" / "figures"
    said = (
        "Only fleet fedspine-80, that of the first run: times compare on one fleet alone; left out: fedspine-80-modes."
    )
    assert f"3 of 4 runs: those on fleet fedspine-80. {said}" in printed
    assert "timing only" in printed
    assert "varied alone: lambda, s\n" in printed
    drawn = {path.stem for path in out.glob("*.png")}
    assert drawn == {"speedup", "cumulative_regret", "sensitivity_lambda", "sensitivity_s"}
    table = pd.read_csv(out / "sensitivity_lambda.csv")
    runs = fedsim.load_sweep(sweeps / "timed")[:2]  # the third differs in s too, the fourth in the fleet
    assert list(table["value"]) == [0.9, 0.98]
    assert table["line"].nunique() == 1
    assert list(table["simulated_s"]) == pytest.approx([run.rounds["end_s"].iloc[-1] for run in runs])
    assert list(table["idle_fraction"]) == pytest.approx([run.rounds["idle_fraction"].mean() for run in runs])
    assert list(pd.read_csv(out / "sensitivity_s.csv")["value"]) == [0.02, 1.0]


def captions_of(monkeypatch):
    """What stands under the figures that are drawn from here on."""
    from fedsim.plots import controllers as regret
    from fedsim.plots import figures, summary

    said = []
    for module in (figures, regret, summary):
        monkeypatch.setattr(module, "caption", lambda _, text: said.append(text))
    return said


def test_every_figure_of_a_sweep_over_fleets_names_the_one_it_shows(execute, sweeps, monkeypatch):
    said = captions_of(monkeypatch)
    _, printed = execute("sweep.py", sweeps / "timed", "fedspine-80-modes")
    named = "Only fleet fedspine-80-modes, as asked: times compare on one fleet alone; left out: fedspine-80."
    assert f"1 of 4 runs: those on fleet fedspine-80-modes. {named}" in printed
    assert len(said) == 2
    assert all(named in text for text in said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "'nowhere' is not the folder of a sweep: it has no sweep.json; name the folder of a sweep"),
        (["timed", "lab"], "has no finished run on fleet 'lab': its fleets are fedspine-80, fedspine-80-modes"),
    ],
)
def test_a_wrong_folder_or_fleet_is_one_sentence(execute, sweeps, monkeypatch, arguments, said):
    monkeypatch.chdir(sweeps)
    with pytest.raises(SystemExit) as stop:
        execute("sweep.py", *arguments)
    assert said in str(stop.value.code)
    assert "\n" not in str(stop.value.code)


def test_first_look_at_a_wrong_folder_is_one_sentence(execute, tmp_path):
    with pytest.raises(SystemExit, match="no such run directory"):
        execute("first_look.py", tmp_path / "nowhere")


def test_a_figure_of_regret_keeps_the_ends_and_names_what_differs(execute, tmp_path, monkeypatch):
    """Fourteen configurations, the leveller and the oracle among the last."""
    settings = {**TREE, "fleet": {"clients": 6}}
    varied = [{"control.discount": 0.9 + place / 200} for place in range(9)]
    policies = [{"control.policy": name} for name in ("random", "uniform", "thompson", "balanced", "oracle")]
    sweep = {**settings, "method": "fedspine", "cases": [*varied, *policies], "seeds": "0"}
    fedsim.sweep(sweep, out=tmp_path / "many", workers=1, quiet=True)
    said = captions_of(monkeypatch)
    names, printed = execute("sweep.py", tmp_path / "many")
    table = pd.read_csv(tmp_path / "many" / "figures" / "cumulative_regret.csv")
    drawn = list(table["method"].unique())
    totals = {group.label: names["known"][run.path].total_s for group in names["firsts"] for run in group.runs.values()}
    assert len(totals) == 14
    assert len(drawn) == 12
    assert {min(totals, key=totals.get), max(totals, key=totals.get)} <= set(drawn)
    for policy in ("oracle", "uniform"):
        assert any(f"control.policy={policy}" in label for label in drawn)
    assert all("=" in label or label == "fedspine" for label in drawn)
    assert all(label in printed for label in totals), "the printed table holds all"
    caption = next(text for text in said if "oracle at each run" in text)
    assert "Shows 12 of 14 rows: the ones of least and most regret, oracle and uniform, and then those" in caption
    assert drawn == [label for label in names["comparison"].rows["method"] if label in drawn], "in the table's order"


def cells_of(source):
    """Kind and text of each cell of a script in percent format, by reading it line by line."""
    cells, own = [], None
    for line in source.splitlines():
        if line.startswith("# %%"):
            own = []
            cells.append(("markdown" if "[markdown]" in line else "code", own))
        elif own is not None:
            own.append(line)
    plain = []
    for kind, own in cells:
        lines = [line.removeprefix("#").removeprefix(" ") for line in own] if kind == "markdown" else own
        plain.append((kind, "\n".join(lines).strip("\n")))
    return plain


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_pair_is_in_step_and_holds_no_output(path):
    """`jupytext --update --to ipynb notebooks/*.py` brings the pairs into step."""
    pair = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))
    there = [(cell["cell_type"], "".join(cell["source"])) for cell in pair["cells"]]
    assert there == cells_of(path.read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in pair["cells"])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_notebooks_never_train(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not imported & {"run", "sweep", "Experiment"}
    assert not any(name == "torch" or name.startswith(("fedsim.learn", "fedsim.runner.run")) for name in modules)
    assert "fedsim" not in {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
