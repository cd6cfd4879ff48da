"""`fedsim bench`: the command at its smallest size, its contract, and that it refuses to time what is wrong."""

from __future__ import annotations

import json
import math

import pytest

from fedsim.bench import engines as engines_module
from fedsim.bench.all_sections import bench
from fedsim.bench.engines import measure_engines
from fedsim.bench.measure import BenchError, Check, Row, Target, Turns, in_turn, rate_row, speedup
from fedsim.bench.options import SECTIONS, Options
from fedsim.bench.report_text import report_text
from fedsim.cli import main
from fedsim.errors import ConfigError
from fedsim.structure import ModelShape

ROW_KEYS = "section case name value unit low high repeats ratio cpu_ratio baseline target note".split()


@pytest.fixture(scope="module")
def quick():
    return bench(Options(size="quick"), say=lambda line: None)


def test_every_section_measures_something(quick):
    assert {row.section for row in quick.findings.rows} == set(SECTIONS)
    assert all(row.value > 0 and row.low <= row.value <= row.high for row in quick.findings.rows)
    assert {check.section for check in quick.findings.checks} == set(SECTIONS) - {"memory"}


def test_engines_are_checked_and_set_against_the_plain_loop(quick):
    rows = [row for row in quick.findings.rows if row.section == "engines"]
    cases = {row.case for row in rows}
    assert len(cases) == 2
    for case in cases:
        names = {row.name: row for row in rows if row.case == case}
        best = names["sliced"].baseline
        assert best.startswith("plain PEFT, AdamW")
        assert names[best].ratio is None
        assert names["sliced"].ratio > 0
        checked = [check for check in quick.findings.checks if check.case == case and check.section == "engines"]
        assert len(checked) >= 4
        assert all(0 <= check.figure <= check.limit for check in checked)


def test_the_table_names_host_ratios_and_what_was_not_measured(quick):
    text = report_text(quick)
    assert "cores" in text
    assert "torch 2." in text
    assert "x cpu)" in text
    assert "not measured" in text
    for section in SECTIONS:
        assert f"\n{section}: " in text


def test_json_has_the_documented_keys(quick):
    report = json.loads(json.dumps(quick.as_dict(), allow_nan=False))
    assert list(report) == ["schema", "host", "options", "rows", "checks", "skipped", "host_s"]
    assert all(list(row) == ROW_KEYS for row in report["rows"])
    assert {"processor", "cores", "versions", "git", "torch_threads"} <= set(report["host"])


def test_command_prints_json(capsys):
    assert main(["bench", "--quick", "--only", "control", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["options"]["sections"] == ["control"]
    assert "S-UCB" in printed.err  # progress stays out of the output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--only", "engine"], "--only: unknown section 'engine'; did you mean 'engines'?"),
        (["--threads", "0"], "--threads: value 0 is not allowed (at least 1)"),
    ],
)
def test_bad_options_are_one_sentence(words, sentence, capsys):
    assert main(["bench", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_missing_card_is_said():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a card here")
    with pytest.raises(ConfigError, match="--torch-device: value 'cuda' is not allowed here"):
        bench(Options(torch_device="cuda", size="quick"), say=lambda line: None)


@pytest.mark.parametrize("figure", [0.02, math.inf, math.nan])
def test_results_that_differ_are_never_timed(figure):
    with pytest.raises(BenchError, match="is (0.02|inf|nan) \\(allowed: at most 0.01\\)"):
        Check.of("engines", "case", "difference", figure, 0.01)


def test_a_wrong_engine_is_found(monkeypatch):
    """A learning rate of twice the reference's moves the factors by as much again."""
    from fedsim.learn.cohort.trainer import CohortTrainer

    real = CohortTrainer.train

    def wrong(self, jobs):
        from dataclasses import replace

        def faster(request):
            phases = tuple(replace(phase, rate=2 * phase.rate) for phase in request.program.phases)
            return replace(request, program=replace(request.program, phases=phases))

        return real(self, [replace(job, request=faster(job.request)) for job in jobs])

    monkeypatch.setattr(CohortTrainer, "train", wrong)
    with pytest.raises(BenchError, match="masked and reference"):
        measure_engines(Options(size="quick"), lambda line: None)


def test_cases_of_a_card_run_at_small_widths(monkeypatch, tmp_path):
    """On the processor, with toy widths in the shapes' place: model folders, bound, sample of a large cohort."""
    toys = {
        "minilm-l6": ModelShape("toy", "bert", 1, 16, 4, 4, 4, 12, 60, 40),
        "roberta-base": ModelShape("toy", "roberta", 1, 16, 4, 4, 4, 12, 60, 40),
    }
    monkeypatch.setattr(engines_module, "load_shape", lambda name, labels: toys[name])
    options = Options(size="quick")
    findings = [engines_module._measure(plan, options) for plan in engines_module._card_plans(options, tmp_path)]
    rows = [row for one in findings for row in one.rows]
    assert len(findings) == 5
    assert any(row.case == "roberta-base shape, 16 clients" and row.name == "sliced" for row in rows)
    assert any(row.name.startswith("share of the one-big-batch speed") for row in rows)
    assert not any(row.case.endswith("16 clients") and row.name in ("masked", "reference") for row in rows)


def test_turns_alternate_and_ratios_are_taken_within_a_turn():
    order = []
    turns = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert order == ["a", "b"] * 3
    assert len(turns["a"].wall_s) == len(turns["b"].cpu_s) == 3
    # A host that slows down by ten between turns leaves the ratio alone.
    slow = Turns((1.0, 10.0, 100.0), (1.0, 1.0, 1.0))
    fast = Turns((0.5, 5.0, 50.0), (0.25, 0.25, 0.25))
    row = rate_row("s", "c", "fast", 8, "things/s", fast, ("slow", slow))
    assert (row.ratio, row.cpu_ratio, row.value, row.low, row.high) == (2.0, 4.0, 1.6, 0.16, 16.0)
    assert speedup((1.0, 2.0), (3.0, 6.0)) == 3.0


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (Target("ratio", at_least=2.0), True),
        (Target("ratio", at_least=2.1), False),
        (Target("value", at_most=5.0), True),
        (Target("value", at_most=4.9), False),
    ],
)
def test_targets_are_judged_on_what_they_name(target, met):
    row = Row("s", "c", "n", 5.0, "us", 5.0, 5.0, 1, ratio=2.0, baseline="b", target=target)
    assert target.met_by(row) is met
    assert row.as_dict()["target"]["met"] is met
