"""What the page says of controllers: what taught the bandit, and regret whose parts add up over all seeds."""

from __future__ import annotations

import csv
import io
import re
from urllib.parse import unquote

import pytest

import fedsim
from fedsim.report import sections
from fedsim.report.material import gather
from fedsim.report.page import report_html
from fedsim.study.compare import compare
from fedsim.study.regret import regret

TIMING = {
    "method": "fedspine",
    "records": {"events": False},
    "model": {"name": "roberta-base", "lora_rank": 8},
    "fleet": {"clients": 8},
    "server": {"rounds": 18, "clients_per_round": 6, "checkpoint_every": 18},
    "train": {"engine": "none", "max_length": 128},
    "prune": {"warmup_rounds": 2, "end_round": 6},
}
NO_LOSSES = "held no losses"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        policy: [
            fedsim.run(TIMING, out=folder / f"{policy}-{seed}", quiet=True, **{"control.policy": policy, "seed": seed})
            for seed in (0, 1)
        ]
        for policy in ("sucb", "balanced")
    }


def row_of(page: str, label: str) -> list[float]:
    """The numbers of a method's row in the table of regret."""
    table = next(one for one in re.findall(r"<table.*?</table>", page, re.DOTALL) if "warm-up, s" in one)
    row = next(one for one in re.findall(r"<tr>.*?</tr>", table, re.DOTALL) if label in one.replace("<wbr>", ""))
    return [float(value) for value in re.findall(r'data-value="([^"]*)"', row)]


def test_the_parts_of_regret_add_up_over_all_seeds(runs):
    page = report_html([*runs["sucb"], *runs["balanced"]], "t")
    for policy in runs:
        judged, warmup_s, cold_s, settled_s, total_s, *_ = row_of(page, f"policy={policy}")
        known = [regret(run) for run in runs[policy]]
        assert judged == 2
        assert total_s == pytest.approx(sum(own.total_s for own in known) / 2, rel=1e-6)
        assert warmup_s + cold_s + settled_s == pytest.approx(total_s, rel=1e-6)
        assert settled_s == pytest.approx(sum(own.settled_s_per_round * 2 for own in known) / 2, rel=1e-6, abs=1e-6)
    links = re.findall(r'download="regret.csv" href="([^"]*)"', page)
    rows = list(csv.DictReader(io.StringIO(unquote(links[0].split(",", 1)[1]))))
    assert [row["seed"] for row in rows] == ["0", "1", "0", "1"]


def test_seeds_that_were_not_judged_are_counted(runs, monkeypatch):
    """All methods have the same seeds judged, or the first few methods one seed each."""
    every = [*runs["sucb"], *runs["balanced"]]
    rows = len(every[0].client_rounds)
    monkeypatch.setattr(sections, "JUDGED_ROWS", 3 * rows)
    page = report_html(every, "t")
    assert page.count(">1 of 2</td>") == 2
    assert "One seed: 0." in page
    monkeypatch.setattr(sections, "JUDGED_ROWS", rows)
    page = report_html(every, "t")
    assert page.count(">1 of 2</td>") == 1
    assert "Left out, as all would take long here" in page


def test_a_bandit_that_saw_no_losses_says_so(runs):
    """In the labels on top and beside its arms; policies that read no rewards have nothing to say."""
    page = report_html(runs["sucb"], "t")
    assert f"timing only: the bandits&#x27; rewards {NO_LOSSES}" in page[: page.index("<nav")]
    section = page[page.index('id="policy"') :]
    assert NO_LOSSES in section
    assert "fedspine: no learning term (loss reduction, pruning progress, LoRA importance) was in use" in section
    assert NO_LOSSES not in report_html(runs["balanced"], "t")


def test_the_material_holds_every_finished_run(runs):
    material = gather(runs["sucb"], compare(runs["sucb"]))
    assert material.runs == runs["sucb"]
    assert material.classes
