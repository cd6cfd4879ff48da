"""A page of more rows than a figure has room for, and of rows that lost all their updates."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "experiment"))
from made_up import rewrite, write_run

import fedsim
from fedsim.plots.choice import bare_text, first_rule, left_out_text, shown_by_regret, shown_first
from fedsim.records.reader import find_runs, load
from fedsim.report import sections
from fedsim.report.losses import lost_box
from fedsim.report.material import gather
from fedsim.report.page import report_html, write_report
from fedsim.report.page_tables import _decimals, summary_table
from fedsim.study.belonging import Group
from fedsim.study.compare import compare
from fedsim.study.structures import kept_structures

LOST = {
    "fleet": {"clients": 6},
    "server": {"rounds": 3, "deadline_s": 1.0},
    "prune": {"warmup_rounds": 1, "end_round": 3},
}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Fourteen methods of equal numbers but for their names: the summary keeps the order of the folders."""
    top = tmp_path_factory.mktemp("many")
    first = write_run(top / "00", "fedspine", 0, rounds=6, clients=8)
    manifest = json.loads((first / "manifest.json").read_text())
    for index in range(14):
        folder = top / f"{index:02d}"
        if index:
            shutil.copytree(first, folder, ignore=shutil.ignore_patterns("checkpoint"))
        (folder / "manifest.json").write_text(json.dumps({**manifest, "method": f"method_{index:02d}"}))
    return find_runs([top])


@pytest.fixture(scope="module")
def page(many):
    return report_html(many, "t", baseline="method_13")


@pytest.fixture(scope="module")
def all_late(tmp_path_factory):
    """FedLoRA and FedSpine with a deadline that no client meets."""
    top = tmp_path_factory.mktemp("late")
    return [
        fedsim.run("quickstart", out=top / name, quiet=True, method=name, **LOST) for name in ("fedlora", "fedspine")
    ]


def tables_of(page):
    links = re.findall(r'download="([^"]*).csv" href="([^"]*)"', page)
    return {name: list(csv.DictReader(io.StringIO(unquote(href.split(",", 1)[1])))) for name, href in links}


def test_the_baseline_is_drawn_in_every_figure(page):
    drawn = tables_of(page)
    cut = ("accuracy_over_time", "idle_by_class", "typical_round", "slowest_round", "choices_by_class", "resources")
    for name in cut:
        rows = list(dict.fromkeys(row["method"] for row in drawn[name]))
        assert rows == [*(f"method_{index:02d}" for index in range(11)), "method_13"], name
    for name in ("speedup", "critical_path"):
        assert len({row["method"] for row in drawn[name]}) == 14, name


def test_each_figure_says_itself_what_it_leaves_out(page):
    captions = dict(re.findall(r"<h3>([^<]*)</h3>.*?<figcaption>(.*?)</figcaption>", page, re.DOTALL))
    said = (
        "Shows 12 of 14 rows: figures here draw the first 11 of the summary and the baseline, since more than 12 "
        "cannot be told apart. Left out here: method_11; method_12."
    )
    whole = {"Speedup by method", "Critical path"}
    assert whole < set(captions)
    assert len(captions) == 8
    for title, caption in captions.items():
        assert (said in caption) == (title not in whole), title
    assert "Figures show the first" not in page


def test_those_drawn_differ_in_colour_and_the_others_have_looks_too(many):
    material = gather(many, compare(many, baseline="method_13"))
    assert len({material.looks[group.label].colour for group in material.drawn}) == 12
    assert set(material.looks) == {group.label for group in material.groups}
    some = [group for group in material.groups if group.label in ("method_11", "method_12")]
    assert material.drawn_of(some) == some, "a figure of rows that none else shows is not empty"


def test_the_figures_of_a_page_share_their_looks(many, monkeypatch):
    material = gather(many[:3], compare(many[:3]))
    used = []
    for name in ("draw_accuracy", "draw_idle"):
        draw = getattr(sections.figures, name)
        monkeypatch.setattr(sections.figures, name, lambda *given, draw=draw: (used.append(given[-1]), draw(*given)))
    sections.summary(material)
    sections.idle(material)
    assert used == [material.looks] * 2
    assert used[0] is used[1]


def groups_of(policies):
    class Made:
        def __init__(self, policy, place):
            self.config, self.path = {"control": {"policy": policy}}, place

    return [Group(f"row {place}", "m", {(0, -1): Made(policy, place)}) for place, policy in enumerate(policies)]


def test_the_choice_by_regret_keeps_both_ends_and_the_references():
    groups = groups_of(["sucb"] * 10 + ["uniform", "oracle", "balanced", "sucb", "sucb"])
    known = {place: type("R", (), {"total_s": float(total)}) for place, total in enumerate(range(100, 85, -1))}
    known[3].total_s, known[11].total_s, known[12].total_s, known[10].total_s = 500.0, 0.0, 1.0, 99.5
    kept = [int(group.label.split()[1]) for group in shown_by_regret(groups, known, most=6)]
    assert kept == [3, 10, 11, 12, 13, 14]
    assert shown_by_regret(groups[:6], known, most=6) == groups[:6]


def test_few_rows_are_all_drawn_and_nothing_is_said():
    groups = groups_of(["sucb"] * 3)
    assert shown_first(groups, "row 2") == groups
    assert left_out_text(groups, groups, first_rule(groups, "row 2")) == ""


def test_a_name_without_settings_is_explained_where_others_have_them():
    one, other = groups_of(["sucb", "oracle"])
    assert bare_text([one, other]) == ""
    bare = Group("m", "m", one.runs)
    assert bare_text([bare]) == ""
    assert bare_text([bare, other]) == "m alone: with the settings that most of its rows share (control.policy=sucb)."


def test_runs_that_lost_every_update_make_a_page_that_says_so(all_late):
    page = report_html(all_late, "t")
    assert 'id="structure"' in page
    part = page[page.index('id="diagnosis"') : page.index('id="idle"')]
    for name in ("fedlora", "fedspine"):
        assert f"{name}: 18 of 18 updates (100.0%; late 18). Nothing was learned: not one update arrived." in part
    kept = kept_structures(all_late[0], _state(all_late[0]))
    assert (kept["heads_kept"] == kept["heads"]).all()
    assert kept["client"].nunique() == 6


def _state(run):
    from fedsim.study.structures import final_state

    state = final_state(run)
    assert len(state["learner.structure_clients"]) == 0, "the case that this test is about"
    return state


def lossy(path, outcomes, seed=0, **records):
    write_run(path, "fedspine", seed, rounds=4, clients=8, **records)
    for name, column in (("client_rounds", "outcome"), ("rounds", "dropped")):
        if (path / f"{name}.parquet").is_file():
            values = outcomes if name == "client_rounds" else [outcomes.count("late") * 2]
            rewrite(path, name, lambda table, to=column, of=values: table.assign(**{to: np.resize(of, len(table))}))
    return load(path)


def test_lost_updates_are_counted_over_the_runs_of_a_row(tmp_path):
    two = lossy(tmp_path / "two", ["ok", "late", "ok", "dropped"])
    none = lossy(tmp_path / "none", ["ok"], seed=1)
    box = lost_box([Group("fedspine", "fedspine", {(0, -1): two, (1, -1): none})])
    assert "fedspine: 16 of 64 updates (25.0%; dropped 8, late 8), in 1 of 2 runs." in box
    assert "Nothing was learned" not in box
    assert lost_box([Group("fedspine", "fedspine", {(1, -1): none})]) == ""


def test_lost_updates_of_runs_without_client_records_are_counted_by_round(tmp_path):
    run = lossy(tmp_path / "bare", ["late"], client_rounds=False)
    box = lost_box([Group("fedspine", "fedspine", {(0, -1): run})])
    assert "fedspine: 8 of 32 updates (25.0%; not recorded how 8)." in box


def test_the_title_of_many_folders_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for top in ("one", "two"):
        for seed in (0, 1):
            write_run(tmp_path / top / f"cell-{seed}", {"one": "fedlora", "two": "fedspine"}[top], seed, 3, 8)
    cells = sorted(tmp_path.glob("*/cell-*"))
    text = write_report(cells).read_text(encoding="utf-8")
    assert "<h1>fedsim: 4 runs in 2 folders</h1>" in text
    assert f"Folders: {tmp_path / 'one'}, {tmp_path / 'two'}</p>" in text
    assert f"<h1>fedsim: 2 runs in {tmp_path / 'one'}</h1>" in write_report(cells[:2]).read_text(encoding="utf-8")
    one = write_report(tmp_path / "one").read_text(encoding="utf-8")
    assert f"<h1>fedsim: {tmp_path / 'one'}</h1>" in one
    assert "Folders:" not in one


@pytest.mark.parametrize(
    ("values", "decimals"),
    [
        ([15.0, 19.5], 1),
        ([8.31, 15.0], 2),
        ([115.0, 1163.2], 0),
        ([0.5, 1163.0], 1),
        ([0.0881, 0.168], 4),
        ([0.0, None, float("nan")], 0),
    ],
)
def test_a_column_of_seconds_has_one_number_of_decimals(values, decimals):
    assert _decimals(values) == decimals


def test_seconds_in_a_column_have_equal_digits(many):
    comparison = compare(many[:2], baseline="method_00")
    comparison.rows["simulated_s"] = [15.0, 19.5]
    html = summary_table(comparison)
    assert ">15.0</td>" in html
    assert ">19.5</td>" in html
