"""Where a round's time went, from its timestamps."""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import FloatArray
from fedsim.contracts.flights import RoundReport


def client_seconds(report: RoundReport) -> dict[str, FloatArray]:
    """Seconds that each participant spent in each phase, shape (P,).

    Returns:
        ``wait_s`` (dispatch to the start of its download), ``download_s``, ``compute_s``, ``upload_s`` and ``idle_s``
        (from the end of its own work to the close of the round). They add up to the round's duration.
    """
    return {
        "wait_s": report.download_start_s - report.start_s,
        "download_s": report.download_end_s - report.download_start_s,
        "compute_s": report.compute_end_s - report.download_end_s,
        "upload_s": report.upload_end_s - report.compute_end_s,
        "idle_s": report.end_s - report.upload_end_s,
    }


def idle_fraction(report: RoundReport) -> float:
    """Sum of idle seconds over (participants times the round's duration), in [0, 1]."""
    total_s = len(report.clients) * (report.end_s - report.start_s)
    return float(np.sum(report.end_s - report.upload_end_s) / total_s) if total_s > 0 else 0.0
