"""What changes in a fleet, against formulas: processor sharing, on and off, throttling, the longest of many."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from simpy.events import Event

from fedsim.fleet.dynamics import Sharing
from fedsim.fleet.heat import HeatTable
from fedsim.fleet.presence import OnOffRhythm, Presence
from fedsim.sim.flight_clock import DOWNLOADING, SimClock
from fedsim.sim.shared_links import SharedLinks


def test_a_shared_link_is_an_m_m_1_queue_with_processor_sharing():
    """Poisson arrivals, exponential needs, load 1/2: mean time in the system 1 / (mu - lambda) = 2, and a
    transfer's mean time is its need over 1 - load, whatever the need (Kleinrock 1967). The needs' sample mean is
    divided out."""
    count, load = 150_000, 0.5
    rng = np.random.default_rng(5)
    begins = np.cumsum(rng.exponential(1 / load, count))
    needs = rng.exponential(1.0, count)
    clock, ends = SimClock(), np.zeros(count)
    links = SharedLinks(clock, Sharing(np.zeros(count, dtype=np.int64), (False,), np.inf, np.inf), None)

    def done(event):
        ends[event._value.client] = clock.now

    def start(event):
        links.download(event._value, done)

    for client, (begin_s, need_s) in enumerate(zip(begins.tolist(), needs.tolist(), strict=True)):
        event = Event(clock)
        event._ok = True
        event._value = SimpleNamespace(
            client=client, phase=DOWNLOADING, latency_s=0.0, download_s=need_s, gone=False, due_s=0.0
        )
        event.callbacks.append(start)
        clock.schedule_at(event, begin_s)
    clock.run()
    took = ends - begins
    assert np.all(took >= needs - 1e-9)  # the clock shows 3e5 s at the end
    assert took.mean() / needs.mean() == pytest.approx(1 / (1 - load), rel=0.01)
    assert (took @ needs) / (needs @ needs) == pytest.approx(1 / (1 - load), rel=0.015)


def test_share_of_time_on_and_lengths_of_stretches():
    """On for mean_on / (mean_on + mean_off) of the time, at every moment; stretches have the mean that was asked."""
    clients = 20_000
    there = Presence(
        OnOffRhythm(np.full(clients, 30.0), np.full(clients, 10.0), 3), np.zeros(clients), np.full(clients, np.inf)
    )
    shares = [there.on(at_s).mean() for at_s in (0.0, 7.0, 100.0, 250.0, 500.0, 750.0)]
    assert np.mean(shares) == pytest.approx(0.75, rel=0.01)
    assert np.allclose(shares, 0.75, rtol=0.02)
    rest_s = there.off_s(np.flatnonzero(there.on(750.0)), 750.0) - 750.0
    assert rest_s.mean() == pytest.approx(30.0, rel=0.03)  # no memory; 15,000 draws


def test_coming_clients_change_nobodys_stretches():
    few, many = (
        Presence(OnOffRhythm(np.full(n, 30.0), np.full(n, 10.0), 3), np.zeros(n), np.full(n, np.inf)) for n in (5, 900)
    )
    for at_s in np.arange(0.0, 400.0, 13.0):
        assert np.array_equal(few.on(at_s), many.on(at_s)[:5])


def test_duty_cycle_of_a_throttled_device():
    """Work of 10 s again and again with rests of 4 s, cooling 1: each job finds 4 busy seconds gone, does 4 s at the
    full rate and 6 at half: 16 s. Its duty cycle is 16 / 20, its speed 10 / 20."""
    heat, busy_s, now_s, worked_s = HeatTable.of([(20.0, 0.5)], recover_s=20.0), 0.0, 0.0, 0.0
    for _ in range(2000):
        takes_s = heat.seconds(busy_s, 10.0)
        busy_s = heat.cooled(heat.heated(busy_s, takes_s), 4.0)
        now_s, worked_s = now_s + takes_s + 4.0, worked_s + takes_s
    assert worked_s / now_s == pytest.approx(0.8, rel=0.01)
    assert 2000 * 10.0 / now_s == pytest.approx(0.5, rel=0.01)


def test_expected_makespan_of_shared_downloads():
    """n transfers of exponential need that begin together on one link: all its airtime is used until the last ends, so
    the makespan is the sum of the needs, n / mu; with links to themselves it is H_n / mu."""
    rng, n, runs = np.random.default_rng(1), 8, 3000
    shared = np.zeros(runs)
    needs = rng.exponential(1.0, (runs, n))
    for run in range(runs):
        clock = SimClock()
        links = SharedLinks(clock, Sharing(np.zeros(n, dtype=np.int64), (False,), np.inf, np.inf), None)
        for client in range(n):
            trip = SimpleNamespace(
                client=client, phase=DOWNLOADING, latency_s=0.0, download_s=needs[run, client], gone=False, due_s=0.0
            )
            links.download(trip, lambda event: None)
        clock.run()
        shared[run] = clock.now
    assert np.allclose(shared, needs.sum(axis=1), rtol=1e-9)
    assert shared.mean() == pytest.approx(n, rel=0.015)  # 3000 runs: standard error 0.65 %
