"""Toys for the simulation's tests: a fleet whose durations are given, and a strategy that plans nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from fedsim.contracts.common import Labels
from fedsim.contracts.control import Rewards, Work
from fedsim.contracts.flights import Flights, Learned
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
    dynamics: Any = None
    mode_clock: Any = None

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

    def mode_rows(self, version, clients):
        return np.zeros(len(clients), dtype=np.int64)

    def modes_at(self, rows):
        return Labels(rows, np.array(["only"]))

    def devices(self, clients):
        return Labels(np.zeros(len(clients), dtype=np.int64), np.array(["toy"]))

    def rates_at(self, rows):
        ones = np.ones(len(rows))
        return SimpleNamespace(
            busy_power_watts=10.0 * ones,
            idle_power_watts=2.0 * ones,
            radio_power_watts=3.0 * ones,
            usable_memory_bytes=self.usable_bytes * ones,
        )

    def download_seconds(self, flight, clients, bytes_):
        return np.asarray(self.download_s, float)[clients]

    def compute_seconds(self, flight, clients, work, rates):
        factor = 1.0 if self.wobble is None else self.wobble(flight, clients)
        return np.asarray(self.compute_s, float)[clients] * factor

    def upload_seconds(self, flight, clients, bytes_):
        return np.asarray(self.upload_s, float)[clients]

    def latency(self, clients):
        return np.full(len(clients), self.latency_s)


def work(clients, memory=10.0, down=1000.0, up=500.0, flops=1e12):
    ones = np.ones(len(clients))
    return Work(flops * ones, 1e9 * ones, 1e3 * ones, np.broadcast_to(memory, ones.shape), down * ones, up * ones)


@dataclass
class ToyStrategy:
    """Same work for all; accuracy by merge from a list; remembers the calls, and how often each client was sent off."""

    memory: Any = 10.0
    accuracy: Any = None
    work_of: Any = None
    calls: list = field(default_factory=list)
    sent: dict = field(default_factory=dict)

    def dispatch(self, clients, version, now_s):
        self.calls.append(("dispatch", version, clients.tolist()))
        zeros, whole = np.zeros(len(clients)), np.zeros(len(clients), dtype=np.int64)
        memory = self.memory if np.isscalar(self.memory) else np.asarray(self.memory)[clients]
        job = work(clients, memory) if self.work_of is None else self.work_of(clients)
        flight = np.array([self.sent.get(client, 0) for client in clients.tolist()], dtype=np.int64)
        self.sent.update(zip(clients.tolist(), (flight + 1).tolist(), strict=True))
        return Flights(flight, clients, whole + version, zeros + now_s, zeros, zeros, whole + 8, whole + 1, job, whole)

    def merge(self, arrivals):
        self.calls.append(("merge", arrivals.merge_index))
        nan = np.full(len(arrivals), np.nan)
        accuracy = None if self.accuracy is None else self.accuracy[arrivals.merge_index]
        rewards = Rewards.none(len(arrivals))
        return Learned(np.zeros(len(arrivals)), nan, nan, nan, rewards, arrivals.outcome, accuracy, None, None)


def play(fleet, settings, strategy=None, seed=0, start=None, **options):
    """Run, and return (last state, arrivals of each merge, trace blocks)."""
    reports, blocks = [], []

    def on_merge(arrivals, learned, block, under_way):
        reports.append(arrivals)
        blocks.append(block)

    end = simulate(fleet, strategy or ToyStrategy(), settings, seed, on_merge, start, **options)
    assert isinstance(end, SimState)
    return end, reports, blocks


def log(block):
    """A block as rows (time, client, event, value)."""
    return list(
        zip(block.time_s.tolist(), block.client.tolist(), block.event.texts.tolist(), block.value.tolist(), strict=True)
    )
