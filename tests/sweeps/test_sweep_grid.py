"""From a grid to cells: order, types, names, and what is refused before anything runs."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.errors import ConfigError
from fedsim.methods.catalogue import METHODS
from fedsim.runner.config import build_config, config_hash
from fedsim.sweeps.cells import parse_grid, parse_seeds, plan_sweep
from fedsim.sweeps.checks import check_cells

BASE = {
    "model": {"lora_rank": 4, "lora_rank_max": 8},
    "fleet": {"clients": 6},
    "server": {"rounds": 6},
    "train": {"engine": "none", "local_steps": 4},
    "prune": {"max_step": 0.5},
}


def labels(plan):
    return [cell.label for cell in plan.cells]


def test_values_of_the_command_line_have_the_types_of_yaml():
    grid = parse_grid(
        [
            "train.learning_rate=1e-3,5e-4",
            "method=fedspine,fedlora",
            "reward.weights=[1,0,0],[1,1,1]",
            "data.pair=null,2",
        ]
    )
    assert grid == {
        "train.learning_rate": [1e-3, 5e-4],
        "method": ["fedspine", "fedlora"],
        "reward.weights": [[1, 0, 0], [1, 1, 1]],
        "data.pair": [None, 2],
    }


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (["method"], "not of the form key=v1,v2"),
        (["=3"], "not of the form"),
        (["method="], "method: no value"),
        (["method=a", "method=b"], "'method' is given twice"),
        (["method=[a"], "not readable YAML"),
        (["method=fedspine,,fedlora"], "--grid method: a value of 'fedspine,,fedlora' is empty"),
        (["method=, fedlora"], "--grid method: a value of ', fedlora' is empty"),
    ],
)
def test_malformed_grids_are_refused(items, words):
    with pytest.raises(ConfigError, match=words):
        parse_grid(items)


@given(st.lists(st.integers(0, 2**63), min_size=1, max_size=8, unique=True))
def test_seeds_in_any_form_are_the_same(seeds):
    assert parse_seeds(seeds) == parse_seeds(",".join(map(str, seeds))) == tuple(seeds)


@given(st.integers(0, 50), st.integers(0, 30))
def test_ranges_include_their_ends(low, more):
    assert parse_seeds(f"{low}-{low + more}") == tuple(range(low, low + more + 1))
    assert parse_seeds([f"{low}-{low + more}"]) == parse_seeds(f" {low} - {low + more} ")


def test_ranges_and_single_seeds_mix():
    assert parse_seeds("0-2,7,9-10") == (0, 1, 2, 7, 9, 10)
    assert parse_seeds(4) == (4,)


@pytest.mark.parametrize(
    "seeds", ["", "4-0", "a", "-1", "1.5", "0-", [], "0,,1", "1,1", "0-3,2", [True], 2**64, "0-10000000"]
)
def test_bad_seeds_are_refused(seeds):
    with pytest.raises(ConfigError, match="^seeds: "):
        parse_seeds(seeds)


def test_cells_are_the_product_with_seeds_fastest_and_are_named_by_their_configuration():
    grid = {"method": ["fedspine", "fedlora"], "train.local_steps": [4, 8]}
    plan = plan_sweep(BASE, grid=grid, seeds="3-4", overrides={"server.rounds": 8})
    expected = list(itertools.product(grid["method"], grid["train.local_steps"], (3, 4)))
    assert [(c.config.method, c.config.train.local_steps, c.config.seed) for c in plan.cells] == expected
    assert [cell.index for cell in plan.cells] == list(range(8))
    for cell, (method, steps, seed) in zip(plan.cells, expected, strict=True):
        alone = build_config(BASE, {"server.rounds": 8, "method": method, "train.local_steps": steps, "seed": seed})
        assert cell.config == alone  # the method's defaults included
        assert cell.config_hash == config_hash(alone)
        assert cell.directory == f"{method}-seed{seed}-{config_hash(alone)[:12]}"
        assert cell.label == f"method={method}, train.local_steps={steps}, seed={seed}"
    assert len({cell.directory for cell in plan.cells}) == 8


def test_without_seeds_the_configuration_s_own_is_taken():
    plan = plan_sweep({**BASE, "seed": 5}, grid={"method": ["fedlora", "fedspine"]})
    assert [cell.config.seed for cell in plan.cells] == [5, 5]
    assert [c.config.seed for c in plan_sweep(BASE, grid={"seed": [2, 9]}).cells] == [2, 9]
    assert labels(plan_sweep(BASE, seeds=[1])) == ["seed=1"]


def test_cases_are_settings_that_belong_together():
    cases = [{"method": "fedlora"}, {"method": "fedspine", "control": {"smooth": False, "arms": "absolute"}}]
    plan = plan_sweep({**BASE, "cases": cases}, grid={"train.local_steps": [4, 8]}, seeds=[0])
    assert labels(plan) == [
        "method=fedlora, train.local_steps=4, seed=0",
        "method=fedlora, train.local_steps=8, seed=0",
        "method=fedspine, control.smooth=false, control.arms=absolute, train.local_steps=4, seed=0",
        "method=fedspine, control.smooth=false, control.arms=absolute, train.local_steps=8, seed=0",
    ]
    assert plan.keys == ("method", "train.local_steps", "control.smooth", "control.arms")


def test_the_same_run_asked_for_twice_stands_once():
    cases = [{"method": "fedlora"}, {"method": "fedlora", "control": {"discount": 0.98}}]  # its default
    plan = plan_sweep({**BASE, "cases": cases}, seeds="0-1")
    assert labels(plan) == ["method=fedlora, seed=0", "method=fedlora, seed=1"]
    assert len(plan.notes) == 2
    assert "is the same run as cell 0" in plan.notes[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "grid is empty"),
        ({"grid": {}}, "grid is empty"),
        ({"grid": {"method": []}}, "grid method: the list is empty"),
        ({"grid": {"train.local_step": [1]}}, "grid: unknown key 'train.local_step'; did you mean 'train.local_steps'"),
        ({"grid": {"local_steps": [1]}}, "did you mean 'train.local_steps'"),
        ({"grid": {"train": [1]}}, "'train' is a section, not a key"),
        ({"grid": {"train.local_steps": [4, 4]}}, "value 4 is given twice"),
        ({"seeds": "4-2"}, "seeds: value '4-2' is not allowed"),
        ({"grid": {"seed": [1, 2]}, "seeds": "0-1"}, "varied by the grid and by seeds"),
        ({"grid": {"seed": range(400)}, "overrides": {"serber.rounds": 3}}, "did you mean 'server.rounds'"),
        ({"grid": {"server.rounds": [6]}, "overrides": {"server.rounds": 3}}, "given for every cell and varied"),
        ({"grid": {"method": ["fedlora"]}, "tiny": True}, "has no tiny.yaml"),
        ({"grid": {"seed": range(1000), "train.local_steps": range(1, 1000)}}, "999,000 cells"),
    ],
)
def test_what_cannot_be_a_sweep_is_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        plan_sweep(BASE, **arguments)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"grid": [1]}, "lists of values by key"),
        ({"cases": {"method": "fedlora"}}, "a list of settings"),
        ({"cases": []}, "cases: the list is empty"),
        ({"cases": [{"metod": "fedlora"}]}, "cases: unknown key 'metod'; did you mean 'method'"),
        ({"cases": [{"method": "fedlora"}], "grid": {"method": ["fedspine"]}}, "varied by both grid and cases"),
    ],
)
def test_malformed_sweep_files_are_refused(keys, words):
    with pytest.raises(ConfigError, match=words):
        plan_sweep({**BASE, **keys}, seeds=[0])


def test_combinations_that_are_not_allowed_are_listed_once_for_all_seeds():
    grid = {"aggregate.rule": ["lowrank", "average_factors"], "method": ["fedlora", "fedspine", "fedspine_balanced"]}
    with pytest.raises(ConfigError) as caught:
        plan_sweep(BASE, grid=grid, seeds="0-4")
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 of 6 combinations of the sweep are not allowed; nothing was run"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "aggregate.rule=average_factors, method=fedspine",
        "aggregate.rule=average_factors, method=fedspine_balanced",
    ]
    assert "it needs equal ranks" in lines[1]


def test_what_only_the_parts_can_refuse_is_refused_before_anything_runs():
    plan = plan_sweep(
        BASE, grid={"control.policy": ["sucb", "ucb"], "fleet.name": ["fedspine-80", "fedspine-81"]}, seeds="0-9"
    )
    with pytest.raises(ConfigError) as caught:
        check_cells(plan, here=True)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("3 of 4 combinations")
    assert "fedspine-81" in lines[1]
    assert "'ucb'" in lines[2]


def test_the_check_lets_every_method_pass_whatever_trains_it():
    """It builds timing-only twins of cells that train: no method may be refused for that."""
    tree = {**BASE, "train": {"local_steps": 8}, "cost": {"model": "roberta-base"}}
    check_cells(plan_sweep(tree, grid={"method": sorted(METHODS)}, seeds=[0]), here=True)


@pytest.fixture
def study(tmp_path):
    folder = tmp_path / "pace"
    folder.mkdir()
    (folder / "base.yaml").write_text(
        "seed: 3\nmethod: fedlora\nfleet: {clients: 6}\nserver: {rounds: 50}\ntrain: {engine: none, local_steps: 20}\n"
    )
    (folder / "sweep.yaml").write_text(
        "config: base.yaml\nserver: {rounds: 40}\ngrid:\n  method: [fedlora, fedspine]\n"
        "  train: {local_steps: [10, 20, 40]}\nseeds: 0-4\n"
    )
    (folder / "tiny.yaml").write_text(
        "server: {rounds: 8}\nfleet: {clients: 4}\ngrid: {train.local_steps: [4, 8]}\nseeds: [0]\n"
    )
    return folder


def test_a_study_is_a_folder_of_differences(study):
    plan = plan_sweep(study / "sweep.yaml")
    assert plan.name == "pace"
    assert len(plan.cells) == 2 * 3 * 5
    assert {cell.config.server.rounds for cell in plan.cells} == {40}  # the sweep's own, over the base's
    assert {cell.config.fleet.clients for cell in plan.cells} == {6}
    assert plan.cells[-1].label == "method=fedspine, train.local_steps=40, seed=4"


def test_tiny_is_laid_over_the_study_and_the_command_line_over_both(study):
    plan = plan_sweep(study / "sweep.yaml", tiny=True)
    assert plan.name == "pace-tiny"
    assert [(c.config.train.local_steps, c.config.seed) for c in plan.cells] == [(4, 0), (8, 0)] * 2
    assert {(c.config.server.rounds, c.config.fleet.clients) for c in plan.cells} == {(8, 4)}
    more = plan_sweep(
        study / "sweep.yaml", tiny=True, grid={"train.local_steps": [6]}, seeds="1-2", overrides={"server.rounds": 9}
    )
    assert [(c.config.train.local_steps, c.config.seed, c.config.server.rounds) for c in more.cells] == [
        (6, 1, 9),
        (6, 2, 9),
    ] * 2
    assert len(plan_sweep(study / "base.yaml", tiny=True, grid={"method": ["fedspine"]}).cells) == 2


def test_tiny_takes_a_key_out_of_the_grid(study):
    (study / "tiny.yaml").write_text("grid: {train.local_steps: null}\ntrain: {local_steps: 4}\nseeds: 0\n")
    assert labels(plan_sweep(study / "sweep.yaml", tiny=True)) == ["method=fedlora, seed=0", "method=fedspine, seed=0"]


def test_sweep_files_that_do_not_fit_are_refused(study, tmp_path):
    (study / "tiny.yaml").unlink()
    with pytest.raises(ConfigError, match=r"there is no tiny\.yaml beside"):
        plan_sweep(study / "sweep.yaml", tiny=True)
    (study / "tiny.yaml").write_text("config: base.yaml\n")
    with pytest.raises(ConfigError, match="'config' is not allowed here"):
        plan_sweep(study / "sweep.yaml", tiny=True)
    (study / "other.yaml").write_text("config: sweep.yaml\nseeds: 0\n")
    with pytest.raises(ConfigError, match="itself a sweep file"):
        plan_sweep(study / "other.yaml")
    (study / "lost.yaml").write_text("config: nowhere.yaml\nseeds: 0\n")
    with pytest.raises(ConfigError, match="no configuration file 'nowhere.yaml'"):
        plan_sweep(study / "lost.yaml")
