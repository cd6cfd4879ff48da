"""Transfer times. A link has a mean bandwidth each way, a latency, and a jitter of mean one per flight and direction.

Seconds of one transfer = latency + jitter * 8 * bytes / (bits per second). The jitter multiplies the time, not the
bandwidth, so that its mean leaves the mean time as it is. Each client has its link for itself; links that share an
access point take the place of the timeouts (`fedsim.sim.shared_links`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.rng import Stream, mean_one_jitter

BITS_PER_BYTE = 8.0


@dataclass(frozen=True, eq=False)
class Links:
    """The links of all clients, shape (clients,).

    Attributes:
        down_bits_per_s, up_bits_per_s: mean bandwidth from and to the server.
        latency_s: one way, paid once per transfer.
        jitter_sigma: standard deviation of the logarithm of the jitter.
    """

    down_bits_per_s: FloatArray
    up_bits_per_s: FloatArray
    latency_s: FloatArray
    jitter_sigma: FloatArray


def transfer_seconds(bytes_: ArrayLike, bits_per_s: ArrayLike, latency_s: ArrayLike, jitter: ArrayLike) -> FloatArray:
    """Seconds of one transfer; arguments broadcast."""
    payload_s = BITS_PER_BYTE * np.asarray(bytes_, dtype=np.float64) / np.asarray(bits_per_s, dtype=np.float64)
    return np.asarray(latency_s, dtype=np.float64) + np.asarray(jitter, dtype=np.float64) * payload_s


def download_seconds(links: Links, seed: int, flight: IntArray, clients: IntArray, bytes_: ArrayLike) -> FloatArray:
    """Seconds of each client's download, with the jitter of that flight, shape (P,)."""
    jitter = mean_one_jitter(seed, Stream.DOWNLOAD_JITTER, clients, flight, links.jitter_sigma[clients])
    return transfer_seconds(bytes_, links.down_bits_per_s[clients], links.latency_s[clients], jitter)


def upload_seconds(links: Links, seed: int, flight: IntArray, clients: IntArray, bytes_: ArrayLike) -> FloatArray:
    """Seconds of each client's upload, with the jitter of that flight, shape (P,)."""
    jitter = mean_one_jitter(seed, Stream.UPLOAD_JITTER, clients, flight, links.jitter_sigma[clients])
    return transfer_seconds(bytes_, links.up_bits_per_s[clients], links.latency_s[clients], jitter)


def bytes_moved(bytes_: ArrayLike, elapsed_s: ArrayLike, planned_s: ArrayLike, latency_s: ArrayLike) -> FloatArray:
    """Bytes that a transfer cut after `elapsed_s` of its `planned_s` has moved: pro rata, once the latency is over."""
    latency_s = np.asarray(latency_s, dtype=np.float64)
    payload_s = np.asarray(planned_s, dtype=np.float64) - latency_s
    gone_s = np.asarray(elapsed_s, dtype=np.float64) - latency_s
    share = np.where(payload_s > 0, gone_s / np.where(payload_s > 0, payload_s, 1.0), 0.0)
    return np.asarray(bytes_, dtype=np.float64) * np.clip(share, 0.0, 1.0)
