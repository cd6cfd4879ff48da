"""Clock, controllers and timing-only runs, as pytest-benchmark cases; see `test_bench_engines` for the command."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.bench.controller_cost import _context, _feedback, measure_memory
from fedsim.bench.options import Options
from fedsim.bench.simulator import _METHODS, _RATES, _timing_only, _trace_hash
from fedsim.control.sucb import SUcb
from fedsim.fleet.fleet import load_fleet
from fedsim.runner.run import run
from fedsim.settings import ControlSettings, FleetSettings, ServerSettings
from fedsim.sim.bare import play_bare_timeouts

CLIENTS, ROUNDS = 2_000, 5


@pytest.fixture(scope="module")
def fleet():
    return load_fleet(FleetSettings(clients=CLIENTS), "fp32", seed=0)


def test_bare_timeouts(benchmark):
    waited, _ = benchmark(play_bare_timeouts, CLIENTS, ROUNDS)
    assert waited == 3 * CLIENTS * ROUNDS


@pytest.mark.parametrize("player", ["arrays", "processes"])
def test_rounds(benchmark, fleet, player):
    settings = ServerSettings(rounds=ROUNDS)
    digest = benchmark(_trace_hash, fleet, settings, player)
    assert digest == _trace_hash(fleet, settings, "arrays")


@pytest.mark.parametrize("policy", sorted(_METHODS))
def test_whole_run(benchmark, tmp_path, policy):
    config = _timing_only(_METHODS[policy], 10_000, 20)
    result = benchmark.pedantic(
        lambda: run(config, out=tmp_path / "run", force=True, quiet=True), rounds=3, warmup_rounds=1
    )
    assert len(result.client_rounds) == 200_000
    assert 200_000 / benchmark.stats.stats.min >= _RATES[policy]


def test_sucb_select_and_update(benchmark):
    ids = np.arange(10_000)
    policy = SUcb(ControlSettings(policy="sucb"), clients=ids.size, ranks=np.array([2, 4, 8, 16, 32]), seed=0)
    index = 0

    def play():
        nonlocal index
        arms = policy.select(_context(index, ids))
        policy.update(_feedback(index, ids, arms))
        index += 1
        return arms

    arms = benchmark.pedantic(play, rounds=20, warmup_rounds=40)
    assert ((arms.ratio >= 0) & (arms.ratio <= 0.8)).all()
    assert 1e6 * benchmark.stats.stats.median / ids.size <= 5.0


def test_memory_of_a_client():
    rows = measure_memory(Options(), lambda line: None).rows
    assert all(row.target.met_by(row) for row in rows), [(row.name, row.value) for row in rows]
