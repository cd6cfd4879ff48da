"""The regret figures: which files, the numbers beside them, and how runs are named."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import fedsim
from fedsim.errors import RunError
from fedsim.plots import write_regret_figures
from fedsim.study.regret import regret

TIMING = {
    "method": "fedspine",
    "records": {"events": False},
    "model": {"name": "roberta-base", "lora_rank": 8},
    "fleet": {"clients": 8},
    "server": {"rounds": 8, "clients_per_round": 6, "checkpoint_every": 8},
    "train": {"engine": "none", "max_length": 128},
    "prune": {"warmup_rounds": 2, "end_round": 6},
}
KINDS = {"png": b"\x89PNG", "pdf": b"%PDF", "csv": b"method,"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [
        fedsim.run(TIMING, out=folder / f"{policy}-{seed}", quiet=True, **{"control.policy": policy, "seed": seed})
        for policy in ("e_ucb", "uniform")
        for seed in (0, 1)
    ]


def test_files_and_the_numbers_beside_them(runs, tmp_path):
    written = write_regret_figures(runs, tmp_path)
    names = [f"{name}.{kind}" for name in ("cumulative_regret", "arms_over_time") for kind in KINDS]
    assert sorted(path.name for path in written) == sorted([*names, "regret_summary.csv"])
    for path in written:
        assert path.read_bytes().startswith(KINDS[path.suffix[1:]])
    lost = pd.read_csv(tmp_path / "cumulative_regret.csv")
    arms = pd.read_csv(tmp_path / "arms_over_time.csv")
    totals = pd.read_csv(tmp_path / "regret_summary.csv").set_index(["method", "seed"])
    assert list(dict.fromkeys(lost["method"])) == ["e_ucb", "uniform"]
    for run in runs:
        own, policy = regret(run), run.config["control"]["policy"]
        rows = lost[(lost["method"] == policy) & (lost["seed"] == run.seed)]
        np.testing.assert_allclose(rows["cumulative_regret_s"], own.rounds["cumulative_regret_s"])
        assert totals.loc[(policy, run.seed), "total_s"] == pytest.approx(own.total_s)
        assert totals.loc[(policy, run.seed), "cold_start_s"] == pytest.approx(own.cold_start_s)
        drawn = arms[(arms["method"] == policy) & (arms["seed"] == run.seed)]
        assert len(drawn) == (len(run.client_rounds) if run.seed == 0 else 0)
    drawn = arms[arms["method"] == "e_ucb"]
    np.testing.assert_array_equal(drawn["prune_ratio_target"], runs[0].client_rounds["prune_ratio_target"])


def test_equal_runs_give_equal_files(runs, tmp_path):
    first, again = (write_regret_figures(runs[:1], tmp_path / name) for name in ("one", "two"))
    for one, other in zip(first, again, strict=True):
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes(), one.name


def test_more_methods_than_a_row_and_runs_without_clients(runs, tmp_path):
    """Methods of several kinds are named by method; a run without client records is left out, or refused alone."""
    others = [
        fedsim.run(TIMING, out=tmp_path / name, quiet=True, method=name, **{"control.policy": "uniform"})
        for name in ("fedlora", "fedspine_uniform", "fedspine_balanced")
    ]
    bare = fedsim.run(TIMING, out=tmp_path / "bare", quiet=True, **{"records.client_rounds": False})
    write_regret_figures([*runs, *others, bare], tmp_path / "out")
    methods = set(pd.read_csv(tmp_path / "out" / "regret_summary.csv")["method"])
    assert len(methods) == 5
    assert {"fedlora", "fedspine_uniform"} <= methods
    with pytest.raises(RunError, match="no regret to draw"):
        write_regret_figures([bare], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_cold_start_ends_with_its_run_and_begins_after_its_own_warm_up(runs):
    """The rounds asked for are more than the run has; a line marks its own, of controllers that learn."""
    from fedsim.plots.controllers import draw_cumulative_regret
    from fedsim.study.belonging import group_runs

    known = {run.path: regret(run) for run in runs}
    groups = group_runs(runs)[0]
    seen = []

    def sink(figure, *_):
        axes = figure.axes[0]
        cold = [line for line in axes.get_lines() if line.get_label() == "cold start"]
        seen.append((axes.get_xlim(), axes.patches, [list(line.get_xdata()) for line in cold]))
        assert [text.get_text() for text in axes.get_legend().get_texts()][-1] == "cold start"

    draw_cumulative_regret(groups, known, "", None, sink)
    limits, bands, cold = seen[0]
    assert limits == (0.0, 7.0)
    assert len(bands) == 0
    assert cold == [[2, 3, 4, 5, 6, 7]], "of e_ucb; to uniform no device is new"


def test_without_a_controller_that_learns_no_cold_start_is_named(runs):
    from fedsim.plots.controllers import draw_cumulative_regret
    from fedsim.study.belonging import group_runs

    own = [run for run in runs if run.config["control"]["policy"] == "uniform"]
    said = []

    def sink(figure, *_):
        texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        said.append(" ".join([*texts, *(text.get_text() for text in figure.texts)]))

    for some in (own, runs):
        draw_cumulative_regret(group_runs(some)[0], {run.path: regret(run) for run in some}, "", None, sink)
    assert "cold start" not in said[0]
    assert "new to the controller" not in said[1]
    assert "cold start of controllers that learn, from the first round that may prune until" in " ".join(
        said[1].split()
    )


def test_the_policies_that_learn_nothing_are_policies():
    from fedsim.control.policies import POLICIES

    learn = {name for name in POLICIES.built_in if POLICIES[name].explores}
    assert learn == {"balanced", "d_ucb_grid", "e_ucb", "sucb", "thompson"}


def test_means_over_seeds_keep_the_parts(runs):
    from fedsim.plots.controllers import means, summary
    from fedsim.study.belonging import group_runs

    table = means(summary(group_runs(runs)[0], {run.path: regret(run) for run in runs}))
    assert table["runs"].tolist() == [2, 2]
    np.testing.assert_allclose(table["warmup_s"] + table["cold_start_s"] + table["settled_s"], table["total_s"])
    assert (table["warmup_rounds"] == 2).all()
