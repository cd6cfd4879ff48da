"""Toys for the simulation's tests: a fleet whose durations are given, and a strategy that plans nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from fedsim.contracts.common import Labels
from fedsim.contracts.control import Rewards, Work
from fedsim.contracts.flights import RoundLearning, RoundPlan
from fedsim.sim.server import SimState, simulate


@dataclass
class ToyFleet:
    """Durations by client, the same in every round, but for an optional factor of (round, client) on computing."""

    download_s: Any
    compute_s: Any
    upload_s: Any
    usable_bytes: float = 100.0
    latency_s: float = 0.0
    wobble: Any = None

    @property
    def clients(self):
        return len(self.download_s)

    @property
    def device_of(self):
        return np.array(["toy"] * self.clients)

    def modes(self, round_index, clients):
        return np.zeros(len(clients), dtype=np.int64)

    def mode_changes(self, round_index):
        return np.arange(0 if round_index else self.clients)

    def mode_labels(self, round_index, clients):
        return Labels(np.zeros(len(clients), dtype=np.int64), np.array(["only"]))

    def devices(self, clients):
        return Labels(np.zeros(len(clients), dtype=np.int64), np.array(["toy"]))

    def rates(self, round_index, clients):
        ones = np.ones(len(clients))
        return SimpleNamespace(
            busy_power_watts=10.0 * ones,
            idle_power_watts=2.0 * ones,
            radio_power_watts=3.0 * ones,
            usable_memory_bytes=self.usable_bytes * ones,
        )

    def download_seconds(self, round_index, clients, bytes_):
        return np.asarray(self.download_s, float)[clients]

    def compute_seconds(self, round_index, clients, work):
        factor = 1.0 if self.wobble is None else self.wobble(round_index, clients)
        return np.asarray(self.compute_s, float)[clients] * factor

    def upload_seconds(self, round_index, clients, bytes_):
        return np.asarray(self.upload_s, float)[clients]

    def latency(self, clients):
        return np.full(len(clients), self.latency_s)


def work(clients, memory=10.0, down=1000.0, up=500.0, flops=1e12):
    ones = np.ones(len(clients))
    return Work(flops * ones, 1e9 * ones, 1e3 * ones, np.broadcast_to(memory, ones.shape), down * ones, up * ones)


@dataclass
class ToyStrategy:
    """Same work for all; accuracy by round from a list; remembers the calls."""

    memory: Any = 10.0
    accuracy: Any = None
    work_of: Any = None
    calls: list = field(default_factory=list)

    def open_round(self, round_index, clients):
        self.calls.append(("open", round_index, clients.tolist()))
        zeros = np.zeros(len(clients))
        memory = self.memory if np.isscalar(self.memory) else np.asarray(self.memory)[clients]
        job = work(clients, memory) if self.work_of is None else self.work_of(clients)
        return RoundPlan(round_index, clients, zeros, zeros, np.full(len(clients), 8), job, 0 * clients, 0 * clients)

    def close_round(self, report):
        self.calls.append(("close", report.round_index))
        nan = np.full(len(report.clients), np.nan)
        accuracy = None if self.accuracy is None else self.accuracy[report.round_index]
        rewards = Rewards.none(len(report.clients))
        return RoundLearning(np.zeros(len(nan)), nan, nan, nan, rewards, report.outcome, accuracy, None, None)


def play(fleet, settings, strategy=None, seed=0, start=None, **options):
    """Run, and return (last state, reports, trace blocks)."""
    reports, blocks = [], []

    def on_round(plan, report, learning, block):
        reports.append(report)
        blocks.append(block)

    end = simulate(fleet, strategy or ToyStrategy(), settings, seed, on_round, start, **options)
    assert isinstance(end, SimState)
    return end, reports, blocks


def log(block):
    """A block as rows (time, client, event, value)."""
    return list(
        zip(block.time_s.tolist(), block.client.tolist(), block.event.texts.tolist(), block.value.tolist(), strict=True)
    )
