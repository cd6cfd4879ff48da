"""What a sweep says while it runs."""

from __future__ import annotations

import pytest

from fedsim.sweeps import news
from fedsim.sweeps.cell_jobs import Done
from fedsim.sweeps.cells import plan_sweep
from fedsim.sweeps.news import SILENCE_S, SweepNews, duration_text


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""

    class Clock:
        now_s = 1000.0

    monkeypatch.setattr(news.time, "monotonic", lambda: Clock.now_s)
    return Clock


@pytest.fixture
def told(clock, tmp_path):
    """News of a sweep of four cells."""
    plan = plan_sweep({"server": {"rounds": 12}}, grid={"method": ["fedlora", "fedspine"]}, seeds="0-1")
    return SweepNews(plan, tmp_path, due=4, quiet=False), plan


def test_the_time_left_follows_the_pace_so_far(told, clock, capsys):
    heard, _ = told
    for index in range(4):
        heard.began(index)
        clock.now_s += 100.0
        heard.ended(Done(index, summary="done", host_s=100.0))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("; ")[-1] for line in lines[:3]] == [
        "about 5 min to go",
        "about 4 min to go",
        "about 100 s to go",
    ]
    assert lines[3] == "[4/4] cell 3 (method=fedspine, seed=1), 100.0 host s: done"


def test_long_cells_are_named_with_the_rounds_that_are_saved(told, clock, tmp_path, capsys):
    heard, plan = told
    heard.began(0)
    heard.began(1)
    (tmp_path / plan.cells[1].directory / "checkpoint" / "round-000007").mkdir(parents=True)
    clock.now_s += SILENCE_S - 1
    heard.still_running()
    assert capsys.readouterr().err == ""
    assert heard.patience_s == pytest.approx(1.0)
    clock.now_s += 1
    heard.still_running()
    heard.still_running()
    assert capsys.readouterr().err.splitlines() == [
        "cell 0 (method=fedlora, seed=0) runs for 60 s",
        "cell 1 (method=fedlora, seed=1) runs for 60 s, 7 of 12 rounds saved",
    ]
    assert heard.patience_s == SILENCE_S


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (9000, "2.5 h")]
)
def test_durations_are_in_the_unit_that_suits_them(seconds, text):
    assert duration_text(seconds) == text
