"""From what a job asks and what a device delivers to seconds and joules.

``T = F / (eta P) + B / (beta BW) + launches * a / f_cpu``, additive: on the published steps that fitted better than
the larger of the three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedsim.contracts.common import FloatArray
from fedsim.cost.device import Rates
from fedsim.errors import ProfileError


class ComputeWork(Protocol):
    """What `compute_time` reads: of `fedsim.contracts.control.Work` and of `fedsim.cost.workload.StepWork`."""

    @property
    def flops(self) -> FloatArray: ...

    @property
    def memory_bytes(self) -> FloatArray: ...

    @property
    def launches(self) -> FloatArray: ...


@dataclass(frozen=True, eq=False)
class ComputeTime:
    """Seconds of arithmetic, of memory traffic and of launching kernels; they add up."""

    compute_s: FloatArray
    memory_s: FloatArray
    launch_s: FloatArray

    @property
    def total_s(self) -> FloatArray:
        """Their sum."""
        return self.compute_s + self.memory_s + self.launch_s


def compute_time(work: ComputeWork, rates: Rates) -> ComputeTime:
    """Seconds that `work` takes at `rates`; shapes broadcast.

    Raises:
        ProfileError: a rate that is not positive and finite.
        ValueError: a time that is not positive and finite (work without operations, bytes or launches).
    """
    for field in ("flops_per_s", "memory_bytes_per_s", "seconds_per_launch"):
        rate = np.asarray(getattr(rates, field))
        if not (np.isfinite(rate).all() and (rate > 0).all()):
            raise ProfileError(f"{field} is {rate}; it must be positive and finite")
    time = ComputeTime(
        np.asarray(work.flops / rates.flops_per_s),
        np.asarray(work.memory_bytes / rates.memory_bytes_per_s),
        np.asarray(work.launches * rates.seconds_per_launch),
    )
    total = time.total_s
    if not (np.isfinite(total).all() and (total > 0).all()):
        raise ValueError(f"compute time must be positive and finite, not {total}")
    return time


def busy_energy_joules(time_s: FloatArray, rates: Rates) -> FloatArray:
    """Energy of a busy board: the mode's power times busy time."""
    return np.asarray(time_s * rates.busy_power_watts)


def fits_memory(peak_memory_bytes: FloatArray, rates: Rates) -> FloatArray:
    """Whether a peak fits the board's memory less its reserve (boolean array)."""
    return np.asarray(peak_memory_bytes <= rates.usable_memory_bytes)
