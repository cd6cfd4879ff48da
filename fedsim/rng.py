"""Random streams keyed by stable integers.

One root seed; every draw belongs to a named `Stream` and to integer keys (client, round, ...). A draw depends on
nothing else, so adding a client, or handling events in another order, leaves every other draw as it was.

Two generators, for two needs:

* `generator` gives a NumPy generator for one key, for long sequences (batch order, initialisation).
* `uniforms` and `normals` give one number for each of many clients at once, by hashing the key (a counter-based
  generator with the SplitMix64 finaliser), so that a fleet's jitter costs one vectorised call.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri


class Stream(IntEnum):
    """What a random draw is for. The numbers are part of the results: never renumber, only add."""

    CLIENT_SAMPLING = 1
    BATCH_ORDER = 2
    COMPUTE_JITTER = 3
    DOWNLOAD_JITTER = 4
    UPLOAD_JITTER = 5
    POWER_MODE = 6
    LINK_MEAN = 7
    LORA_INIT = 8
    HEAD_INIT = 9
    POLICY = 10
    POLICY_TIES = 11
    PARTITION = 12
    PANEL = 13
    RANDOM_IMPORTANCE = 14
    CORPUS = 15
    PROFILE_ERROR = 16
    PROBE_BATCH = 17
    TEST_SPLIT = 18
    POLICY_RANK = 19
    TEST_SAMPLE = 20
    SURROGATE_CLIENT = 21
    SURROGATE_NOISE = 22
    IDLE_CHOICE = 23
    SELECTION = 24
    AVAILABILITY = 30
    DROPOUT = 31
    MEMBERSHIP = 32
    MODE_CLOCK = 33
    LINK_TRACE = 34
    ROAMING = 35


def generator(seed: int, stream: Stream, *keys: int) -> np.random.Generator:
    """A NumPy generator for one stream and key.

    Args:
        seed: the run's root seed, >= 0.
        stream: what the draws are for.
        keys: stable integers, such as client and round, each >= 0.
    """
    return np.random.default_rng(np.random.SeedSequence(entropy=seed, spawn_key=(int(stream), *map(int, keys))))


def integer_seed(seed: int, stream: Stream, *keys: int) -> int:
    """A 63-bit seed for a library that wants an integer (torch), for one stream and key."""
    return int(generator(seed, stream, *keys).integers(0, 2**63 - 1))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The SplitMix64 finaliser (Steele, Lea and Flood, OOPSLA 2014): a bijection that spreads every bit."""
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


def uniforms(seed: int, stream: Stream, clients: ArrayLike, *keys: ArrayLike) -> NDArray[np.float64]:
    """One number in the open interval (0, 1) per client, shape of `clients`: a function of (seed, stream, keys, client)
    and of nothing else.

    Args:
        keys: integers >= 0, or arrays of them, one per client.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.array([seed], dtype=np.uint64) + _GOLDEN)
        for key in (int(stream), *keys):
            state = _mix((state ^ np.asarray(key).astype(np.uint64)) + _GOLDEN)
        ids = np.asarray(clients).astype(np.uint64)
        bits = _mix((_mix(ids + _GOLDEN) ^ state) + _GOLDEN)
    bits = bits.reshape(ids.shape)
    # 53 random bits centred in their cell: never 0, never 1.
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def normals(seed: int, stream: Stream, clients: ArrayLike, *keys: ArrayLike) -> NDArray[np.float64]:
    """One standard normal number per client, shape of `clients`, by inversion of `uniforms`."""
    return ndtri(uniforms(seed, stream, clients, *keys))


def mean_one_jitter(
    seed: int, stream: Stream, clients: ArrayLike, flight: ArrayLike, sigma: float | NDArray[np.float64]
) -> NDArray[np.float64]:
    """Log-normal factors of mean exactly one, one per client, for one flight of
    each.

    Args:
        sigma: standard deviation of the logarithm, >= 0 (close to the coefficient of variation when small).
    """
    sigma = np.asarray(sigma, dtype=np.float64)
    return np.exp(sigma * normals(seed, stream, clients, flight) - 0.5 * sigma**2)
