"""Nothing that a surrogate run puts out may pass for a measurement: manifest, summary, tables, figures."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from made_up import write_run

from fedsim.errors import RunError
from fedsim.plots import style, write_figures
from fedsim.records.reader import find_runs, load
from fedsim.study.compare import compare

LABEL = "surrogate: losses and accuracies come from a model fitted to run abcdef012345, not from training"
FITTED = {"engine": "surrogate", "labels": ["reconstruction", LABEL]}
NAMES = {"accuracy_over_time", "idle_by_class", "choices_by_class", "timeline"}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    base = tmp_path_factory.mktemp("fitted")
    for method in ("fedlora", "fedspine"):
        write_run(base / method, method, rounds=6, clients=8, manifest=FITTED)
    return find_runs([base])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return load(write_run(tmp_path_factory.mktemp("measured") / "run", rounds=6, clients=8))


def test_the_summary_names_the_accuracy_a_surrogates(fitted, measured):
    assert all(", surrogate accuracy 0." in run.summary() for run in fitted)
    assert "surrogate" not in measured.summary()


def test_the_table_says_it_first_in_its_header_and_below(fitted, measured):
    text = compare(fitted).as_text()
    assert text.splitlines()[0] == "SURROGATE: accuracies are a fitted model's, none was measured"
    assert "final, SURROGATE" in text.splitlines()[3]
    assert LABEL in text
    plain = compare([measured]).as_text()
    assert "surrogate" not in plain.lower()


def test_json_carries_label_and_flag(fitted, measured):
    tree = json.loads(json.dumps(compare(fitted).as_dict()))
    assert tree["surrogate"] is True
    assert LABEL in tree["labels"]
    assert compare([measured]).as_dict()["surrogate"] is False


def test_fitted_and_measured_runs_share_no_table_and_no_figure(fitted, measured, tmp_path):
    for runs in ([*fitted, measured], [measured, *fitted]):
        with pytest.raises(
            RunError, match="is a surrogate run and '.*' is not: fitted accuracies do not belong in one"
        ):
            compare(runs)
        with pytest.raises(RunError, match="is a surrogate run"):
            write_figures(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_figure_has_the_watermark_and_every_csv_the_engine(fitted, measured, tmp_path, monkeypatch):
    words, drawn = [], {}
    real = style.watermark

    def note(figure, word):
        before = len(figure.texts)
        real(figure, word)
        words.extend(text.get_text() for text in figure.texts[before:])

    monkeypatch.setattr(style, "watermark", note)
    drawn = write_figures(fitted, tmp_path / "fitted")
    assert {path.stem for path in drawn} == NAMES
    assert words == ["SURROGATE"] * 2 * len(NAMES)  # across each figure, and in its corner
    for path in drawn:
        if path.suffix == ".csv":
            assert set(pd.read_csv(path)["engine"]) == {"surrogate"}
    words.clear()
    plain = write_figures([measured], tmp_path / "measured")
    assert words == []
    assert not any("engine" in pd.read_csv(path) for path in plain if path.suffix == ".csv")


def test_the_watermark_can_be_seen(fitted, tmp_path, monkeypatch):
    """A good share of the pixels differs from the same figure without it."""
    from matplotlib.image import imread

    with_mark = write_figures(fitted, tmp_path / "with")
    monkeypatch.setattr(style, "watermark", lambda figure, word: None)
    without = write_figures(fitted, tmp_path / "without")
    for one, other in zip(sorted(with_mark), sorted(without), strict=True):
        if one.suffix == ".png":
            share = (imread(one) != imread(other)).any(axis=-1).mean()
            assert 0.03 < share < 0.5, one.name
