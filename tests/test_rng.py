"""Keyed random streams: stable, independent of company, and of the right distribution."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedsim.rng import Stream, generator, integer_seed, mean_one_jitter, normals, uniforms

GOLDEN_UNIFORMS = [0.587435891176316, 0.40340603620877674]
GOLDEN_INTEGER = 413238548
GOLDEN_SEED = 4610618129972316463
KEYS = st.integers(min_value=0, max_value=2**40)


@given(seed=KEYS, client=st.integers(0, 10**6), round_index=st.integers(0, 10**4), more=st.integers(1, 50))
def test_a_draw_does_not_depend_on_company_or_order(seed, client, round_index, more):
    alone = uniforms(seed, Stream.COMPUTE_JITTER, client, round_index)
    crowd = np.arange(client, client + more)[::-1]
    assert uniforms(seed, Stream.COMPUTE_JITTER, crowd, round_index)[-1] == alone
    assert 0.0 < alone < 1.0


def test_streams_seeds_and_keys_give_other_numbers():
    clients = np.arange(2000)
    base = uniforms(0, Stream.COMPUTE_JITTER, clients, 3)
    others = [
        uniforms(1, Stream.COMPUTE_JITTER, clients, 3),
        uniforms(0, Stream.POWER_MODE, clients, 3),
        uniforms(0, Stream.COMPUTE_JITTER, clients, 4),
        uniforms(0, Stream.COMPUTE_JITTER, clients, 3, 0),
        uniforms(0, Stream.COMPUTE_JITTER, clients + 1, 3),
    ]
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.08
        assert not (base == other).any()


@pytest.mark.parametrize("axis", ["clients", "rounds", "seeds"])
def test_uniform_along_every_key(axis):
    """Kolmogorov-Smirnov against the uniform distribution, and no correlation between neighbours."""
    if axis == "clients":
        draws = uniforms(7, Stream.LINK_MEAN, np.arange(20000))
    elif axis == "rounds":
        draws = np.array([uniforms(7, Stream.LINK_MEAN, 5, index).item() for index in range(4000)])
    else:
        draws = np.array([uniforms(seed, Stream.LINK_MEAN, 5).item() for seed in range(4000)])
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.06


def test_normals_are_standard_normal():
    assert stats.kstest(normals(3, Stream.UPLOAD_JITTER, np.arange(20000), 1), "norm").pvalue > 1e-3


@pytest.mark.parametrize("sigma", [0.0, 0.02, 0.3])
def test_jitter_has_mean_one_and_the_asked_spread(sigma):
    factors = mean_one_jitter(0, Stream.COMPUTE_JITTER, np.arange(200_000), 0, sigma)
    assert factors.mean() == pytest.approx(1.0, abs=5 * sigma / np.sqrt(200_000) + 1e-12)
    assert np.log(factors).std() == pytest.approx(sigma, rel=0.02)


def test_golden_values():
    """Made by ``uniforms(0, Stream.COMPUTE_JITTER, [0, 1], 0)`` and its likes below: the streams are
    part of every result, so a change of these numbers is a change of all results.
    """
    np.testing.assert_allclose(uniforms(0, Stream.COMPUTE_JITTER, [0, 1], 0), GOLDEN_UNIFORMS, rtol=0, atol=1e-15)
    assert generator(0, Stream.PARTITION, 2).integers(0, 10**9) == GOLDEN_INTEGER
    assert integer_seed(0, Stream.HEAD_INIT) == GOLDEN_SEED


def test_stream_numbers_are_unique():
    assert len({int(stream) for stream in Stream}) == len(list(Stream.__members__))
