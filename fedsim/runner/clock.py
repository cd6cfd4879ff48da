"""``fedsim.Clock``: the simulated fleet's clock for learners that are not this package's.

.. code-block:: python

    clock = fedsim.Clock("fedspine-80", clients=8)
    work = clock.count(step)              # a function that runs one training step of any torch module
    seconds = clock.step_time(work)       # of every client, without jitter; an array (8,)

A step may also be known by what it took on one device: ``clock.measured(0.7, "jetson-tx2")``. An example with a small
vision transformer is ``experiments/foreign_vit.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.cost.bands import SAMPLES, band, joint_samples
from fedsim.cost.device import (
    REFERENCE_FLOPS_PER_BYTE,
    REFERENCE_FLOPS_PER_LAUNCH,
    load_profile,
    rates_of,
)
from fedsim.cost.seconds import busy_energy_joules, compute_time
from fedsim.cost.setting import Precision
from fedsim.cost.workload import StepWork
from fedsim.errors import ConfigError
from fedsim.fleet.fleet import load_fleet
from fedsim.settings import FleetSettings


class Clock:
    """Seconds and joules of work on a simulated fleet.

    Args:
        fleet: name of a built-in fleet, or a fleet file.
        clients: how many; None: as the file says.
        precision: of the arithmetic.
        seed: of links and power modes.
    """

    def __init__(
        self, fleet: str = "fedspine-80", *, clients: int | None = None, precision: Precision = "fp32", seed: int = 0
    ) -> None:
        self._fleet = load_fleet(FleetSettings(name=fleet, clients=clients), precision, seed)
        self._precision: Precision = precision

    @property
    def clients(self) -> int:
        """How many clients."""
        return self._fleet.clients

    @property
    def devices(self) -> list[str]:
        """Each client's device."""
        return [str(name) for name in self._fleet.device_of]

    def count(self, step: Callable[[], Any], peak_memory_bytes: float = 0.0) -> StepWork:
        """Work of a torch step, by running it once: see `fedsim.learn.counted`."""
        from fedsim.learn.counted import counted_step  # heavy: loads torch

        return counted_step(step, peak_memory_bytes)

    def measured(self, seconds: float, device: str, mode: str | None = None) -> StepWork:
        """Work of a step that takes `seconds` on a device, in the mix of a LoRA step of roberta-base.

        Raises:
            ConfigError: seconds that are not positive and finite.
        """
        if not (np.isfinite(seconds) and seconds > 0):
            raise ConfigError(f"a measured step takes {seconds!r} s; it must be positive and finite")
        flops = 1e12
        moved, launches = flops / REFERENCE_FLOPS_PER_BYTE, flops / REFERENCE_FLOPS_PER_LAUNCH
        mix = StepWork(*(np.asarray(number) for number in (flops, moved, launches, 0.0)))
        scale = seconds / float(compute_time(mix, rates_of(load_profile(device), mode, self._precision)).total_s)
        return StepWork(*(np.asarray(number * scale) for number in (flops, moved, launches, 0.0)))

    def step_time(self, work: StepWork, clients: IntArray | None = None, version: int = 0) -> FloatArray:
        """Seconds of a step on each client's device in its power mode of that version, without jitter, shape (P,).

        A step that does not fit a device's memory takes NaN.
        """
        chosen = np.arange(self.clients) if clients is None else np.asarray(clients, dtype=np.int64)
        rates = self._fleet.rates_at(self._fleet.mode_rows(version, chosen))
        total_s = np.broadcast_to(compute_time(work, rates).total_s, chosen.shape)
        return np.where(work.peak_memory_bytes <= rates.usable_memory_bytes, total_s, np.nan)

    def step_energy(self, work: StepWork, clients: IntArray | None = None, version: int = 0) -> FloatArray:
        """Joules of a step on each client, shape (P,)."""
        chosen = np.arange(self.clients) if clients is None else np.asarray(clients, dtype=np.int64)
        rates = self._fleet.rates_at(self._fleet.mode_rows(version, chosen))
        return busy_energy_joules(self.step_time(work, chosen, version), rates)

    def transfer_time(self, bytes_: float, *, up: bool, clients: IntArray | None = None) -> FloatArray:
        """Seconds of a transfer on each client's link, without jitter, shape (P,)."""
        chosen = np.arange(self.clients) if clients is None else np.asarray(clients, dtype=np.int64)
        down_bits, up_bits = self._fleet.bandwidth(0, chosen)
        return self._fleet.latency(chosen) + 8.0 * bytes_ / (up_bits if up else down_bits)

    def band(self, work: StepWork, device: str, mode: str | None = None) -> tuple[float, float]:
        """The band of a step's seconds on a device, over its joint samples."""
        rates = joint_samples(load_profile(device)).rates(mode, self._precision)
        return band(np.broadcast_to(compute_time(work, rates).total_s, (SAMPLES,)))
