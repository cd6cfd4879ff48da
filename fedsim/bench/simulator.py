"""Sections ``simulator`` and ``runs``: events per second of the clock, and whole runs that train nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedsim.bench.measure import BenchError, Check, Findings, Row, Skipped, Target, in_turn, rate_row
from fedsim.bench.options import Options
from fedsim.contracts.common import IntArray
from fedsim.contracts.control import Rewards, Work
from fedsim.contracts.flights import Arrivals, Flights, Learned
from fedsim.fleet.fleet import Fleet, load_fleet
from fedsim.runner.build import build
from fedsim.runner.config import build_config
from fedsim.runner.run import run
from fedsim.settings import Config, FleetSettings, ServerSettings
from fedsim.sim.bare import play_bare_timeouts
from fedsim.sim.server import simulate
from fedsim.sim.trips import PHASES

_METHODS = {"uniform": "fedspine_uniform", "S-UCB": "fedspine", "balanced": "fedspine_balanced"}
_RATES = {"uniform": 100_000.0, "S-UCB": 60_000.0, "balanced": 60_000.0}
"""Client-rounds per second at 10,000 clients, at least."""
_LARGE_CLIENTS, _LARGE_ROUNDS = 131_072, 10
_LARGE_LIMITS = (60.0, 2.0e9)
"""Seconds and bytes of a run of that size, at most."""


class _SamePlan:
    """Implements `fedsim.contracts.flights.Strategy`: the same work for everybody, nothing learned."""

    def dispatch(self, clients: IntArray, version: int, now_s: float) -> Flights:
        """Jobs of a second or so."""
        ones, whole = np.ones(len(clients)), np.zeros(len(clients), dtype=np.int64)
        work = Work(1e12 * ones, 1e9 * ones, 1e3 * ones, 1e9 * ones, 1e6 * ones, 1e6 * ones)
        return Flights(
            flight=whole + version,
            clients=clients,
            version=whole + version,
            dispatch_s=now_s * ones,
            ratio_before=0.0 * ones,
            ratio_asked=0.0 * ones,
            rank=whole + 8,
            steps=whole + 1,
            work=work,
            ticket=whole,
        )

    def merge(self, arrivals: Arrivals) -> Learned:
        """Nothing."""
        nothing, ratio = np.full(len(arrivals), np.nan), np.zeros(len(arrivals))
        rewards = Rewards.none(len(arrivals))
        return Learned(ratio, nothing, nothing, nothing, rewards, arrivals.outcome, None, None, None)


def measure_simulator(options: Options, say: Callable[[str], None]) -> Findings:
    """The two ways to play rounds against bare SimPy: a process per client that waits three times a round."""
    clients, rounds = (200, 3) if options.is_quick else (5_000, 5)
    say(f"simulator: {clients} clients, {rounds} rounds")
    fleet = load_fleet(FleetSettings(clients=clients), "fp32", seed=0)

    def play(player: str) -> str:
        return _trace_hash(fleet, ServerSettings(rounds=rounds), player)

    case = f"{clients} clients, {rounds} rounds"
    if play("arrays") != play("processes"):
        raise BenchError(f"bench simulator, {case}: arrays and client processes left different traces")
    events = clients * rounds * PHASES
    waited, end_s = play_bare_timeouts(clients, rounds)
    if waited != events or end_s != rounds * PHASES:
        raise BenchError(f"bench simulator, {case}: bare SimPy waited {waited} times until {end_s} s")
    checks = (Check.of("simulator", case, "traces that differ between arrays and client processes", 0.0, 0.0),)
    bare = "bare SimPy, three timeouts a client and round"
    contenders: dict[str, Callable[[], object]] = {
        bare: lambda: play_bare_timeouts(clients, rounds),
        "client processes, with trace and report": lambda: play("processes"),
        "arrays, with trace and report": lambda: play("arrays"),
    }
    seconds = in_turn(contenders, options.repeats(fewer=True))
    rows = tuple(
        rate_row(
            "simulator", case, who, events, "events/s", times, None if who == bare else (bare, seconds[bare]), None
        )
        for who, times in seconds.items()
    )
    return Findings(rows, checks)


def measure_runs(options: Options, say: Callable[[str], None]) -> Findings:
    """Whole runs of `fedsim run` with ``train.engine none``: set-up, policy, clock, records and checkpoints."""
    clients, rounds = (500, 5) if options.is_quick else (10_000, 20)
    case = f"{clients} clients, {rounds} rounds"
    small = 100
    checks = []
    with tempfile.TemporaryDirectory() as folder:

        def play(method: str, size: int) -> str:
            out = Path(folder) / f"{method}-{size}"
            result = run(_timing_only(method, size, rounds), out=out, force=True, quiet=True)
            return str(result.manifest["trace_hash"])

        traces = {}
        for policy, method in _METHODS.items():
            say(f"runs: {policy}, {case}")
            config = _timing_only(method, small, rounds)
            experiment = build(config, lambda line: None)
            slow = simulate(
                experiment.fleet,
                experiment.federation,
                config.server,
                config.seed,
                lambda *round_: None,
                player="processes",
            )
            differs = float(slow.trace_hash != play(method, small))
            name = f"traces that differ between the run and client processes ({small} clients, {policy})"
            checks.append(Check.of("runs", case, name, differs, 0.0))
            traces[method] = play(method, clients)

        def contender(method: str) -> Callable[[], None]:
            def again() -> None:
                if play(method, clients) != traces[method]:
                    raise BenchError(f"bench runs, {case}: {method} left another trace than before")

            return again

        seconds = in_turn({policy: contender(method) for policy, method in _METHODS.items()}, options.repeats(True))
    rows = [
        rate_row(
            "runs",
            case,
            policy,
            clients * rounds,
            "client-rounds/s",
            times,
            target=None if options.is_quick else Target("value", at_least=_RATES[policy]),
            note="client_rounds recorded, events not; set-up and reading back included",
        )
        for policy, times in seconds.items()
    ]
    findings = Findings(tuple(rows), tuple(checks))
    if options.is_full:
        say(f"runs: {_LARGE_CLIENTS} clients")
        return findings + _measure_large_run()
    large = f"{_LARGE_CLIENTS} clients, {_LARGE_ROUNDS} rounds"
    return findings + Findings(skipped=(Skipped("runs", large, "measured with --full"),))


def _measure_large_run() -> Findings:
    """A run in a process of its own, start-up included: its seconds, and the most memory that it held."""
    case = f"{_LARGE_CLIENTS} clients, {_LARGE_ROUNDS} rounds, a process of its own"
    findings = Findings()
    for policy, method in _METHODS.items():
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "config.json"  # JSON is YAML
            tree = _timing_only(method, _LARGE_CLIENTS, _LARGE_ROUNDS).model_dump(mode="json")
            config.write_text(json.dumps(tree), encoding="utf-8")
            command = [sys.executable, "-m", "fedsim.cli", "run", str(config), "--out", f"{folder}/run", "--quiet"]
            began_s = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            spent_s = time.perf_counter() - began_s
            process.returncode = os.waitstatus_to_exitcode(status)
        failed = Check.of("runs", case, f"exit code of {policy}", abs(process.returncode), 0.0)
        peak = 1024.0 * usage.ru_maxrss  # Linux counts kibibytes
        limits = dict(zip(("s", "bytes"), _LARGE_LIMITS, strict=True))
        rows = tuple(
            Row("runs", case, f"{policy}, {what}", value, unit, value, value, 1, target=_at_most(limits[unit]))
            for what, value, unit in (("whole time", spent_s, "s"), ("peak memory", peak, "bytes"))
        )
        findings += Findings(rows, (failed,))
    return findings


def _at_most(limit: float) -> Target:
    return Target("value", at_most=limit)


def _timing_only(method: str, clients: int, rounds: int) -> Config:
    return build_config(
        {
            "method": method,
            "records": {"events": False},
            "fleet": {"clients": clients},
            "server": {"rounds": rounds},
            "train": {"engine": "none"},
            "cost": {"model": "roberta-base", "batch_size": 8, "seq_len": 64},
        }
    )


def _trace_hash(fleet: Fleet, settings: ServerSettings, player: str) -> str:
    return simulate(fleet, _SamePlan(), settings, 0, lambda *merge: None, player=player).trace_hash
