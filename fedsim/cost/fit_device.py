"""A profile from measured steps: three effective coefficients by least squares, with covariance.

``T = F / a + B / b + launches * c`` is fitted to the logarithms of the measured times in the logarithms of a, b and c,
so that none can turn negative and all steps count alike, small ones and large ones. Start values pull weakly
(`_PULL`): they decide only what the steps themselves cannot tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.contracts.common import FloatArray
from fedsim.cost.bands import row_work
from fedsim.cost.device import Rates
from fedsim.cost.measurements import Measurement
from fedsim.errors import DataError

LEAST_STEPS = 4
_PULL = 0.02
"""Weight of the start values: an offset of a factor e counts as a residual of 2%."""
_HEADROOM = 0.8
"""What is taken of a peak that is not known: it is named so that the fitted rates are this share of it."""


@dataclass(frozen=True, eq=False)
class DeviceFit:
    """Effective coefficients of a device.

    Attributes:
        flops_per_s, memory_bytes_per_s, seconds_per_launch: the coefficients.
        covariance: of their logarithms, shape (3, 3).
        residual: (predicted - measured) / measured, per step; left_out: the same for each step from a fit without it.
    """

    flops_per_s: float
    memory_bytes_per_s: float
    seconds_per_launch: float
    covariance: FloatArray
    residual: FloatArray
    left_out: FloatArray

    def seconds(self, rows: Sequence[Measurement]) -> FloatArray:
        """Predicted seconds of measured steps."""
        return np.exp(_log_seconds(_columns(rows), np.log(self._coefficients())))

    def _coefficients(self) -> FloatArray:
        return np.array([self.flops_per_s, self.memory_bytes_per_s, 1.0 / self.seconds_per_launch])


def fit_device(rows: Sequence[Measurement], start: tuple[float, float, float] | None = None) -> DeviceFit:
    """Fit step times.

    Args:
        start: operations per second, bytes per second and seconds per launch to begin from; None: from the steps alone.
    Raises:
        DataError: too few step times, or steps that all ask alike.
    """
    steps = [row for row in rows if row.quantity == "step_time" and not row.relative_to and row.counted]
    if len(steps) < LEAST_STEPS:
        raise DataError(f"{len(steps)} step times were given; a fit of three coefficients needs {LEAST_STEPS} and more")
    columns, seconds = _columns(steps), np.array([row.value for row in steps])
    if np.linalg.matrix_rank(columns / seconds[:, None], tol=1e-3 * np.abs(columns / seconds[:, None]).max()) < 1:
        raise DataError("the steps ask nothing of the device")
    origin = _start(columns, seconds, start)
    logs, covariance = _solve(columns, seconds, origin)
    left_out = []
    for at in range(len(steps)):
        others = np.arange(len(steps)) != at
        without, _ = _solve(columns[others], seconds[others], origin)
        left_out.append(np.exp(_log_seconds(columns[at : at + 1], without))[0] / seconds[at] - 1.0)
    residual = np.exp(_log_seconds(columns, logs)) / seconds - 1.0
    a, b, c = np.exp(logs)
    return DeviceFit(float(a), float(b), float(1.0 / c), covariance, residual, np.array(left_out))


def _columns(rows: Sequence[Measurement]) -> FloatArray:
    """Operations, bytes and launches of each step, shape (steps, 3)."""
    works = [row_work(row) for row in rows]
    return np.array([[float(w.flops), float(w.memory_bytes), float(w.launches)] for w in works])


def _start(columns: FloatArray, seconds: FloatArray, given: tuple[float, float, float] | None) -> FloatArray:
    if given is not None:
        return np.log(np.array([given[0], given[1], 1.0 / given[2]]))
    # Each part a third of the steps' time, typically.
    return np.log(np.median(3.0 * columns / seconds[:, None], axis=0))


def _log_seconds(columns: FloatArray, logs: FloatArray) -> FloatArray:
    return np.log((columns * np.exp(-logs)).sum(axis=1))


def _solve(columns: FloatArray, seconds: FloatArray, origin: FloatArray) -> tuple[FloatArray, FloatArray]:
    from scipy.optimize import least_squares  # heavy, and only a fit needs it

    def residuals(logs: FloatArray) -> FloatArray:
        return np.concatenate([_log_seconds(columns, logs) - np.log(seconds), _PULL * (logs - origin)])

    solution = least_squares(residuals, origin)
    freedom = max(1, len(seconds) - 3)
    variance = float((solution.fun[: len(seconds)] ** 2).sum()) / freedom
    jacobian = solution.jac[: len(seconds)]
    # What the start values hold is known to a factor of three, no better.
    prior = np.eye(3) / np.log(3.0) ** 2
    covariance = np.linalg.inv(jacobian.T @ jacobian / max(variance, 1e-8) + prior)
    return np.asarray(solution.x), np.asarray(covariance)


def profile_content(
    name: str,
    description: str,
    fit: DeviceFit,
    *,
    source: str,
    memory_bytes: float,
    memory_source: str,
    cpu_ghz: float,
    steps: Sequence[Measurement],
) -> dict[str, Any]:
    """The content of a profile file. Raises nothing: `fedsim.cost.device.parse_profile` checks it."""
    spread = np.exp(2.0 * np.sqrt(np.diag(fit.covariance)))

    def fixed(value: float, unit: str, status: str, why: str, low: float = 0.0, high: float = 0.0) -> dict[str, Any]:
        numbers = {"low": float(low or value), "high": float(high or value)}
        return {"value": float(value), "unit": unit, "status": status, "source": why, **numbers}

    def share(at: int, why: str) -> dict[str, Any]:
        low, high = _HEADROOM / spread[at], min(1.0, _HEADROOM * spread[at])
        return fixed(_HEADROOM, "1", "measured", why, low, high)

    named = f"named so that the fitted rate is {_HEADROOM} of it: no data sheet was asked"
    cycles = fit.seconds_per_launch * cpu_ghz * 1e3
    return {
        "name": name,
        "description": description,
        "memory_capacity": fixed(memory_bytes / 2**30, "GiB", "measured", memory_source),
        "memory_reserve": fixed(max(0.1, 0.1 * memory_bytes / 2**30), "GiB", "assumed", "a tenth for the system"),
        "memory_bandwidth": fixed(fit.memory_bytes_per_s / _HEADROOM / 1e9, "GB/s", "derived", named),
        "reference_memory_clock": fixed(1000, "MHz", "assumed", "not asked: the bandwidth holds at any"),
        "cores_per_sm": fixed(1, "cores", "assumed", "not asked: the clock below stands for all cores"),
        "fp16_multiple": fixed(1, "1", "assumed", "fp16 was not measured"),
        "efficiency_fp32": share(0, source),
        "efficiency_fp16": share(0, "fp16 was not measured: taken as fp32"),
        "bandwidth_efficiency": share(1, source),
        "launch_cost": fixed(
            cycles * 1e3, "cycles", "measured", source, cycles * 1e3 / spread[2], cycles * 1e3 * spread[2]
        ),
        "idle_power": fixed(1, "W", "assumed", "power was not measured", 0.1, 1000),
        "radio_power": fixed(1, "W", "assumed", "power was not measured", 0.1, 10),
        "modes": {
            "measured": {
                "active_sms": fixed(1, "SM", "assumed", "the whole device"),
                "gpu_clock": fixed(fit.flops_per_s / _HEADROOM / 2 / 1e9, "GHz", "derived", named),
                "cpu_clock": fixed(cpu_ghz, "GHz", "measured", "the system's own report"),
                "memory_clock": fixed(1000, "MHz", "assumed", "as the reference"),
                "busy_power": fixed(10, "W", "assumed", "power was not measured", 1, 1000),
            }
        },
        "calibration": {
            "covariance_of_log_rates": [[float(value) for value in row] for row in fit.covariance],
            "leave_one_out_mape": float(np.abs(fit.left_out).mean()),
            "fit_mape": float(np.abs(fit.residual).mean()),
            "steps": [
                {"step": row.label(), "measured_s": row.value, "error": float(error), "left_out_error": float(out)}
                for row, error, out in zip(steps, fit.residual, fit.left_out, strict=True)
            ],
        },
    }


def fitted_rates(fit: DeviceFit) -> Rates:
    """The coefficients as rates, without power or memory."""
    nothing = 0.0
    return Rates(
        fit.flops_per_s, fit.memory_bytes_per_s, fit.seconds_per_launch, nothing, nothing, nothing, float("inf")
    )
