"""Jitter and round lengths against closed forms, and the idle share that the built-in fleet gives."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, stats

sys.path.insert(0, str(Path(__file__).parents[1] / "sim"))
from sim_toys import ToyFleet, play

from fedsim.contracts.control import Work
from fedsim.fleet.fleet import load_fleet
from fedsim.fleet.link import Links, bytes_moved, download_seconds, transfer_seconds, upload_seconds
from fedsim.rng import Stream, mean_one_jitter
from fedsim.settings import FleetSettings, ServerSettings
from fedsim.sim.accounting import idle_fraction

CLIENTS = np.arange(20_000)


def links(sigma):
    ones = np.ones(len(CLIENTS))
    return Links(8e6 * ones, 4e6 * ones, 0.25 * ones, sigma * ones)


def test_transfer_is_latency_plus_bits_over_bandwidth():
    assert transfer_seconds(5.3e6, 20e6, 0.005, 1.0) == pytest.approx(0.005 + 5.3e6 * 8 / 20e6)
    assert download_seconds(links(0.0), 0, 0, CLIENTS[:1], 3e6).tolist() == [3.25]
    assert upload_seconds(links(0.0), 0, 0, CLIENTS[:1], 3e6).tolist() == [6.25]


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5])
def test_transfer_jitter_has_mean_one_and_leaves_the_latency_alone(sigma):
    payload = download_seconds(links(sigma), 3, 1, CLIENTS, 1e6) - 0.25
    assert payload.min() > 0
    # A log-normal of mean one has variance exp(sigma^2) - 1.
    error = np.sqrt(np.expm1(sigma**2) / len(CLIENTS))
    assert payload.mean() == pytest.approx(1.0, abs=4 * error)
    assert np.log(payload).std() == pytest.approx(sigma, rel=0.03)


def test_directions_rounds_and_seeds_have_draws_of_their_own():
    down = download_seconds(links(0.1), 0, 0, CLIENTS, 1e6) - 0.25
    others = [
        upload_seconds(links(0.1), 0, 0, CLIENTS, 0.5e6) - 0.25,
        download_seconds(links(0.1), 0, 1, CLIENTS, 1e6) - 0.25,
        download_seconds(links(0.1), 1, 0, CLIENTS, 1e6) - 0.25,
        mean_one_jitter(0, Stream.COMPUTE_JITTER, CLIENTS, 0, 0.1),
    ]
    for other in others:
        # The correlation of independent draws has a standard error of 1/sqrt(n).
        assert abs(np.corrcoef(down, other)[0, 1]) < 4 / np.sqrt(len(CLIENTS))


def test_bytes_of_a_cut_transfer_are_pro_rata():
    moved = bytes_moved(100.0, [0.0, 0.5, 1.0, 2.0, 3.0], 3.0, 1.0)
    assert moved.tolist() == [0, 0, 0, 50, 100]
    assert bytes_moved(100.0, 1.0, 1.0, 1.0) == 0.0


def expected_maximum(n, sigma):
    """E max of n log-normals of mean one = integral of 1 - F(x)^n."""
    law = stats.lognorm(s=sigma, scale=np.exp(-(sigma**2) / 2))
    return (
        integrate.quad(lambda x: 1 - law.cdf(x) ** n, 0, 1)[0]
        + integrate.quad(lambda x: 1 - law.cdf(x) ** n, 1, np.inf)[0]
    )


@pytest.mark.parametrize(("n", "sigma"), [(5, 0.1), (80, 0.02), (80, 0.1)])
def test_a_round_of_equal_clients_lasts_as_long_as_the_expected_maximum(n, sigma):
    rounds, compute_s = 400, 10.0

    def wobble(round_index, clients):
        return mean_one_jitter(11, Stream.COMPUTE_JITTER, clients, round_index, sigma)

    fleet = ToyFleet(np.ones(n), np.full(n, compute_s), np.ones(n), wobble=wobble)
    _, reports, _ = play(fleet, ServerSettings(rounds=rounds))
    lengths = np.array([report.end_s - report.start_s for report in reports])
    expected = 2.0 + compute_s * expected_maximum(n, sigma)
    assert lengths.mean() == pytest.approx(expected, abs=4 * lengths.std() / np.sqrt(rounds))
    # And the idle share follows: one minus mean busy time over the round.
    idle = np.mean([idle_fraction(report) for report in reports])
    assert idle == pytest.approx(1 - 12.0 / expected, abs=0.01)


def test_waiting_for_the_first_k_gives_the_kth_order_statistic():
    """k-th smallest of n exponentials: sum of 1/(n - i) for i < k."""
    n, k, rounds = 12, 9, 1500
    draws = -np.log(np.random.default_rng(5).uniform(size=(rounds, n)))
    fleet = ToyFleet(np.full(n, 1e-9), np.ones(n), np.full(n, 1e-9), wobble=lambda r, c: draws[r, c])
    settings = ServerSettings(rounds=rounds, clients_per_round=k, over_selection=n / k - 1)
    _, reports, _ = play(fleet, settings)
    lengths = np.array([report.end_s - report.start_s for report in reports])
    expected = sum(1 / (n - i) for i in range(k))
    assert lengths.mean() == pytest.approx(expected, abs=4 * lengths.std() / np.sqrt(rounds))


def test_long_run_round_time_of_the_built_in_fleet_is_near_the_slowest_device():
    fleet = load_fleet(FleetSettings(), "fp32", seed=0)
    everyone = np.arange(80)
    ones = np.ones(80)
    job = Work(2e13 * ones, 1e10 * ones, 1e4 * ones, 1e9 * ones, 5e6 * ones, 5e6 * ones)
    expected = fleet.expected_seconds(0, everyone, job)
    seconds = [
        fleet.download_seconds(r, everyone, job.download_bytes)
        + fleet.compute_seconds(r, everyone, job, fleet.rates_at(fleet.mode_rows(0, everyone)))
        + fleet.upload_seconds(r, everyone, job.upload_bytes)
        for r in range(400)
    ]
    # Mean-one jitter: each client's mean time is its expected time (about 3% noise a round, 400 rounds).
    assert np.mean(seconds, axis=0) == pytest.approx(expected, rel=0.01)
    fastest = expected[fleet.device_of == "jetson-agx-xavier"].mean()
    assert fastest < expected[fleet.device_of == "jetson-xavier-nx"].mean() < expected.max()
