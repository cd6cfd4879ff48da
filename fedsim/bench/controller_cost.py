"""Sections ``control`` and ``memory``: what S-UCB and idle clients cost."""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable
from statistics import median

import numpy as np

from fedsim.bench.measure import Check, Findings, Row, Target
from fedsim.bench.options import Options
from fedsim.contracts.common import IntArray
from fedsim.contracts.control import Arms, Feedback, RoundContext, Work
from fedsim.control.sucb import SUcb
from fedsim.cost.shapes import load_shape
from fedsim.rng import Stream, uniforms
from fedsim.runner.build import build
from fedsim.runner.config import build_config
from fedsim.settings import ControlSettings
from fedsim.sim.server import simulate
from fedsim.structure import Structure

_RANKS = np.array([2, 4, 8, 16, 32])
_UNIT = "us per client and round"
_MOST_US = 5.0
_TIMING_BYTES, _STORE_BYTES = 2_048.0, 200_000.0
_SETTINGS = ControlSettings(policy="sucb")


def measure_control(options: Options, say: Callable[[str], None]) -> Findings:
    """Microseconds of S-UCB's select and update per client and round, once its leaves are grown."""
    clients, warm, timed = (500, 5, 3) if options.is_quick else (10_000, 40, 60 if options.is_full else 20)
    case = f"{clients} clients"
    say(f"control: S-UCB, {case}")
    checks = (_each_for_itself(case, min(clients, 300)),)
    policy = SUcb(_SETTINGS, clients=clients, ranks=_RANKS, seed=0)
    ids = np.arange(clients, dtype=np.int64)
    select_us, update_us = [], []
    for index in range(warm + timed):
        context = _context(index, ids)
        began_s = time.perf_counter()
        arms = policy.select(context)
        chosen_s = time.perf_counter()
        feedback = _feedback(index, ids, arms)
        told_s = time.perf_counter()
        policy.update(feedback)
        if index >= warm:
            select_us.append(1e6 * (chosen_s - began_s) / clients)
            update_us.append(1e6 * (time.perf_counter() - told_s) / clients)
    both = [one + other for one, other in zip(select_us, update_us, strict=True)]
    note = f"after {warm} rounds, {int(policy.state()['leaves'].max())} leaves at most"
    rows = tuple(
        _row(case, f"S-UCB {name}", times, note, judged=name == "select and update" and not options.is_quick)
        for name, times in (("select", select_us), ("update", update_us), ("select and update", both))
    )
    return Findings(rows, checks)


def measure_memory(options: Options, say: Callable[[str], None]) -> Findings:
    """Bytes that a client holds between rounds: of a timing-only run, and with structure and averages of training."""
    few, many = (1_000, 3_000) if options.is_quick else (10_000, 50_000)
    say("memory: timing only, and roberta-base's structures and averages")
    case = f"S-UCB, 100 a round, from {few} to {many} clients"
    held = (_held_bytes(many) - _held_bytes(few)) / (many - few)
    stored, name = _store_bytes(20 if options.is_quick else 200)
    limits = ((held, _TIMING_BYTES), (stored, _STORE_BYTES))
    targets = [None if options.is_quick else Target("value", at_most=limit) for _, limit in limits]
    return Findings(
        (
            Row("memory", case, "idle client, timing only", held, "bytes", held, held, 1, target=targets[0]),
            Row("memory", name, "client that took part", stored, "bytes", stored, stored, 1, target=targets[1]),
        )
    )


def _row(case: str, name: str, times: list[float], note: str, judged: bool) -> Row:
    target = Target("value", at_most=_MOST_US) if judged else None
    low, high = min(times), max(times)
    return Row("control", case, name, median(times), _UNIT, low, high, len(times), target=target, note=note)


def _context(index: int, ids: IntArray) -> RoundContext:
    low = np.zeros(ids.size)
    return RoundContext(index, ids, low, low, np.full(ids.size, 0.8), 0.4, 0.8, 0.8)


def _feedback(index: int, ids: IntArray, arms: Arms) -> Feedback:
    """Rewards that peak at an arm of each client's own, so that leaves are cut all over the square."""
    best = uniforms(1, Stream.POLICY, ids)
    reward = np.exp(-8.0 * (arms.ratio / 0.8 - best) ** 2)
    nothing = np.zeros(ids.size)
    work = Work(nothing, nothing, nothing, nothing, nothing, nothing)
    here = np.ones(ids.size, dtype=bool)
    return Feedback(index, ids, nothing, arms.ratio, arms.rank, work, 1.0 + best, here, reward)


def _each_for_itself(case: str, clients: int) -> Check:
    """With absolute arms (which no fleet mean shifts) a client's choices do not depend on who else is there."""
    settings = _SETTINGS.model_copy(update={"arms": "absolute"})
    ids = np.arange(clients, dtype=np.int64)
    last = ids[-clients // 3 :]
    differing = 0
    together, alone = (SUcb(settings, clients=clients, ranks=_RANKS, seed=0) for _ in range(2))
    for index in range(20):
        chosen = []
        for policy, some in ((together, ids), (alone, last)):
            arms = policy.select(_context(index, some))
            policy.update(_feedback(index, some, arms))
            chosen.append((arms.ratio[-last.size :], arms.rank[-last.size :]))
        differing += sum(int((one != other).sum()) for one, other in zip(*chosen, strict=True))
    return Check.of("control", case, "arms that depend on who else takes part", float(differing), 0.0)


def _held_bytes(clients: int) -> int:
    """What a run under S-UCB holds after some rounds, as Python and NumPy count it."""
    config = build_config(
        {
            "method": "fedspine",
            "fleet": {"clients": clients},
            "server": {"rounds": 12, "clients_per_round": 100},
            "train": {"engine": "none"},
            "cost": {"model": "roberta-base"},
        }
    )
    gc.collect()
    tracemalloc.start()
    try:
        experiment = build(config, lambda line: None)
        simulate(experiment.fleet, experiment.federation, config.server, config.seed, lambda *round_: None)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def _store_bytes(clients: int) -> tuple[float, str]:
    """Bytes a client in the learner's store, as Python and NumPy count it, and the case's name."""
    from fedsim.learn.store import ClientStore
    from fedsim.learn.train.importance import GroupScores  # torch

    shape = load_shape("roberta-base", 2)
    draw = np.random.default_rng(0)
    heads, channels = draw.random((shape.layers, shape.head_groups)), draw.random((shape.layers, shape.ffn))
    structure = Structure(heads > 0.5, channels > 0.5)
    gc.collect()
    tracemalloc.start()
    try:
        store = ClientStore(shape)
        for client in range(clients):
            store.put_structure(client, structure)
            store.put_scores(client, GroupScores(heads, channels))
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    kept = store.scores(clients - 1)
    wrong = 0.0 if kept is not None and store.structure(0).same_as(structure) else 1.0
    Check.of("memory", "store", "structures that came back changed", wrong, 0.0)
    return held / clients, f"roberta-base structure and averages, {clients} clients"
