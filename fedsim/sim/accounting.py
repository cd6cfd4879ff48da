"""Where the time of flights went, from their timestamps."""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import FloatArray
from fedsim.contracts.flights import Arrivals


def client_seconds(arrivals: Arrivals) -> dict[str, FloatArray]:
    """Seconds that each flight spent in each phase, shape (F,).

    Returns:
        ``wait_s`` (dispatch to the start of its download), ``download_s``, ``compute_s``, ``upload_s`` and ``idle_s``
        (from the end of its own work until its client is released). They add up to the time from dispatch to release.
    """
    return {
        "wait_s": arrivals.download_start_s - arrivals.flights.dispatch_s,
        "download_s": arrivals.download_end_s - arrivals.download_start_s,
        "compute_s": arrivals.compute_end_s - arrivals.download_end_s,
        "upload_s": arrivals.upload_end_s - arrivals.compute_end_s,
        "idle_s": arrivals.released_s - arrivals.upload_end_s,
    }


def idle_fraction(arrivals: Arrivals) -> float:
    """Sum of idle seconds over the sum of the flights' times from dispatch to release, in [0, 1].

    Of a synchronous round that is participants times its duration.
    """
    flights = arrivals.flights
    start_s, one_start = flights.dispatch_s, len(flights) > 0 and (flights.dispatch_s == flights.dispatch_s[0]).all()
    one_end = one_start and (arrivals.released_s == arrivals.released_s[0]).all()
    # One product where all are alike: no rounding of a sum over thousands of equal numbers.
    if one_end:
        total_s = len(flights) * (float(arrivals.released_s[0]) - float(start_s[0]))
    else:
        total_s = float(np.sum(arrivals.released_s - start_s))
    return float(np.sum(arrivals.released_s - arrivals.upload_end_s) / total_s) if total_s > 0 else 0.0
