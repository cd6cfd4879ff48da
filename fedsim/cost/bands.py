"""Bands of a device as joint samples: sets of its numbers that all reproduce the data it was fitted to.

One ladder of depths at one batch cannot tell arithmetic from memory traffic or launches: any pair of bandwidth share
and launch cost within their bands fits it with an efficiency of its own. So each sample draws those two (and every
other number with a band) and then solves for the efficiency that its data asks for. Where no data binds a device, its
efficiency is drawn from its band like the rest.

Draws are log-uniform below and above the value, half of them each, so that the value is the median; stratified, seeded
by the device's name alone. Nothing of a run's seed is here: the band of an estimate is the same wherever it is asked.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedsim.contracts.common import FloatArray
from fedsim.cost.device import (
    DeviceProfile,
    PowerMode,
    Quantity,
    Rates,
    mode_fields,
    profile_fields,
    rates_from,
)
from fedsim.cost.measurements import Measurement, built_in_measurements, matching
from fedsim.cost.memory import (
    ACTIVATION_GROWTH,
    FITTED_MEMORY,
    FRAMEWORK_BYTES,
    TRAINED_STATE_BYTES,
    MemoryConstants,
    memory_parts,
)
from fedsim.cost.seconds import compute_time
from fedsim.cost.setting import Precision, kept_sums
from fedsim.cost.units import si_factor
from fedsim.cost.workload import StepWork, step_work
from fedsim.errors import ProfileError
from fedsim.structure import kept_counts

SAMPLES = 100
COVERED = 0.95
"""Share of the samples that a band holds: from the 2.5th to the 97.5th percentile."""
MODEL_SIGMA = 0.04
"""Standard deviation of the logarithm of what three terms leave out of a step of another kind than those fitted (ours,
from steps left out of the fits of ladders and hosts: 3 to 8%)."""
MODE = "mode."


@dataclass(frozen=True, eq=False)
class JointSamples:
    """Drawn devices: per number of the profile in SI units an array of shape (SAMPLES,); modes' as ``mode.NAME.field``.

    Attributes:
        misfit: root mean square of the relative residuals on the fitted rows, per sample; None where there are none.
    """

    profile: DeviceProfile
    numbers: dict[str, FloatArray]
    misfit: FloatArray | None

    def rates(self, mode_name: str | None, precision: Precision) -> Rates:
        """Rates of every sample in a mode, arrays of shape (SAMPLES,)."""
        return rates_from(self.mode_numbers(self.profile.mode(mode_name)), precision)

    def mode_numbers(self, mode: PowerMode) -> dict[str, FloatArray | float]:
        """The numbers of every sample in a mode, by field."""
        own: dict[str, FloatArray | float] = {field: self.numbers[field] for field in profile_fields()}
        return own | {field: self.numbers[f"{MODE}{mode.name}.{field}"] for field in mode_fields()}

    def drawn(self, draw: int) -> DeviceProfile:
        """One sample as a profile of its own; draws beyond the last begin again."""
        at = draw % SAMPLES

        def quantity(old: Quantity, name: str) -> Quantity:
            value = float(self.numbers[name][at]) / si_factor(old.unit)
            return replace(old, value=value, low=min(value, old.low), high=max(value, old.high))

        modes = {}
        for name, mode in self.profile.modes.items():
            numbers: dict[str, Any] = {
                field: quantity(getattr(mode, field), f"{MODE}{name}.{field}") for field in mode_fields()
            }
            modes[name] = replace(mode, **numbers)
        shared: dict[str, Any] = {field: quantity(getattr(self.profile, field), field) for field in profile_fields()}
        return replace(self.profile, modes=modes, **shared)


_REMEMBERED = 100
_KNOWN: dict[tuple[str, int], tuple[DeviceProfile, JointSamples]] = {}


def joint_samples(profile: DeviceProfile) -> JointSamples:
    """The samples of a profile; the same for equal profiles.

    Raises:
        ProfileError: `fitted_to` names no measurement, or one that no efficiency can explain.
    """
    key = (profile.name, id(profile))
    if key in _KNOWN and _KNOWN[key][0] is profile:
        return _KNOWN[key][1]
    numbers: dict[str, FloatArray] = {}
    for field in profile_fields():
        numbers[field] = _draws(profile.name, field, getattr(profile, field))
    for name, mode in profile.modes.items():
        for field in mode_fields():
            path = f"{MODE}{name}.{field}"
            numbers[path] = _draws(profile.name, path, getattr(mode, field))
    if profile.covariance is not None:
        numbers |= _correlated(profile)
    samples = JointSamples(profile, numbers, None)
    if profile.fitted_to:
        samples = _fitted(samples, fitted_rows(profile))
    if len(_KNOWN) > _REMEMBERED:
        _KNOWN.clear()
    _KNOWN[key] = profile, samples
    return samples


def _correlated(profile: DeviceProfile) -> dict[str, FloatArray]:
    """The three rates of a device that was itself measured, drawn with the covariance of their fit."""
    rng = np.random.default_rng(zlib.crc32(f"{profile.name}/covariance".encode()))
    steps = rng.multivariate_normal(np.zeros(3), np.array(profile.covariance), SAMPLES, method="eigh")
    factors = np.exp(steps - np.median(steps, axis=0))
    return {
        "efficiency_fp32": np.minimum(1.0, profile.efficiency_fp32.si * factors[:, 0]),
        "bandwidth_efficiency": np.minimum(1.0, profile.bandwidth_efficiency.si * factors[:, 1]),
        "launch_cost": profile.launch_cost.si / factors[:, 2],
    }


def fitted_rows(profile: DeviceProfile) -> list[Measurement]:
    """The step times that a profile's efficiency is fitted to. Raises ProfileError where there are none."""
    rows = [row for row in matching(built_in_measurements(), profile.fitted_to) if row.quantity == "step_time"]
    if not rows:
        raise ProfileError(
            f"profile {profile.name}: fitted_to names no step time that was measured ({', '.join(profile.fitted_to)})"
        )
    return rows


def row_work(row: Measurement) -> StepWork:
    """Work of a measured step."""
    assert row.shape is not None
    assert row.setting is not None
    heads, channels = kept_counts(row.shape, row.prune_ratio)
    return step_work(
        row.shape, (heads / row.shape.head_groups)[None], (channels / row.shape.ffn)[None], row.rank, row.setting
    )


def solve_efficiency(profile: DeviceProfile, rows: list[Measurement], numbers_of: Any) -> tuple[FloatArray, FloatArray]:
    """Efficiency by least squares on relative residuals (linear in its inverse), and the misfit left.

    Args:
        numbers_of: a mode's numbers, by field, floats or arrays of one shape.
    Returns:
        Two arrays of that shape: the share of the peak, and the root mean square residual.
    """
    ideal, rest, measured = [], [], []
    for row in rows:
        assert row.setting is not None
        numbers = dict(numbers_of(profile.mode(row.mode)))
        field = f"efficiency_{row.setting.precision}"
        numbers[field] = np.ones_like(np.asarray(numbers[field]))
        time = compute_time(row_work(row), rates_from(numbers, row.setting.precision))
        ideal.append(np.asarray(time.compute_s))
        rest.append(np.asarray(time.memory_s + time.launch_s))
        measured.append(row.value)
    seconds = np.array(measured).reshape(-1, *(1,) * np.ndim(ideal[0] + rest[0]))
    x, y = np.stack(np.broadcast_arrays(*ideal)) / seconds, 1.0 - np.stack(np.broadcast_arrays(*rest)) / seconds
    inverse = (x * y).sum(axis=0) / (x * x).sum(axis=0)
    misfit = np.sqrt(((x * inverse - y) ** 2).mean(axis=0))
    return 1.0 / inverse, misfit


def _fitted(samples: JointSamples, rows: list[Measurement]) -> JointSamples:
    profile = samples.profile
    efficiency, misfit = solve_efficiency(profile, rows, samples.mode_numbers)
    if not (efficiency > 0).all():
        raise ProfileError(
            f"profile {profile.name}: memory traffic and launches alone take longer than the steps it is fitted to; "
            "its bandwidth_efficiency or launch_cost cannot be right"
        )
    # A fitted efficiency says where the data is; what repeats of it would scatter is drawn on top.
    own = profile.efficiency_fp32
    noise = samples.numbers["efficiency_fp32"] / own.si
    scatter = np.exp(np.log(noise) * _scatter(own, misfit))
    numbers = {**samples.numbers, "efficiency_fp32": np.minimum(1.0, efficiency * scatter)}
    return JointSamples(profile, numbers, misfit)


def _scatter(own: Quantity, misfit: FloatArray) -> float:
    """How much of the drawn band a fitted efficiency keeps: as much as the fit's own misfit."""
    half = 0.5 * (np.log(own.high) - np.log(own.low))
    return float(min(1.0, 2.0 * misfit.mean() / half)) if half > 0 else 0.0


def _draws(device: str, field: str, quantity: Quantity) -> FloatArray:
    """Stratified draws of one number: its value in the middle, log-uniform to either end of its band."""
    value, low, high = (
        np.log(number * si_factor(quantity.unit)) for number in (quantity.value, quantity.low, quantity.high)
    )
    if low == high:
        return np.full(SAMPLES, quantity.si)
    rng = np.random.default_rng(zlib.crc32(f"{device}/{field}".encode()))
    share = (rng.permutation(SAMPLES) + rng.uniform(size=SAMPLES)) / SAMPLES
    below, above = np.minimum(2.0 * share, 1.0), np.maximum(2.0 * share - 1.0, 0.0)
    return np.asarray(np.exp(low + (value - low) * below + (high - value) * above))


def band(values: FloatArray) -> tuple[float, float]:
    """The band that holds `COVERED` of the samples."""
    tail = 0.5 * (1.0 - COVERED)
    low, high = np.quantile(np.asarray(values, dtype=np.float64), [tail, 1.0 - tail])
    return float(low), float(high)


def step_seconds(profile: DeviceProfile, work: StepWork, mode: str | None, precision: Precision) -> FloatArray:
    """Seconds of a step on every joint sample, shape (SAMPLES,), with what the model itself leaves out (`MODEL_SIGMA`).

    Steps that ask alike err alike; others do so on their own.
    """
    total_s = compute_time(work, joint_samples(profile).rates(mode, precision)).total_s
    key = f"{profile.name}/{float(work.flops):.4g}/{float(work.memory_bytes):.4g}/{float(work.launches):.4g}"
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    return np.asarray(total_s * np.exp(MODEL_SIGMA * rng.standard_normal(SAMPLES)))


_MEMORY: list[MemoryConstants] = []


def memory_samples() -> MemoryConstants:
    """The memory constants on every joint sample: fits to resampled rows of `FITTED_MEMORY`, which scatter as they do.

    A fit's own misfit is drawn on top of its framework term, the same for all peaks of a sample.
    """
    if not _MEMORY:
        rows = [row for row in matching(built_in_measurements(), FITTED_MEMORY) if row.quantity == "peak_memory"]
        rng = np.random.default_rng(zlib.crc32(b"memory"))
        fits = [fit_memory([rows[at] for at in rng.integers(0, len(rows), len(rows))]) for _ in range(SAMPLES)]
        centre = fit_memory(rows)
        constants = np.array([[fit[name] for name in ("framework", "growth", "state_bytes")] for fit in fits]).T
        published = (FRAMEWORK_BYTES, ACTIVATION_GROWTH, TRAINED_STATE_BYTES)
        constants = constants * (np.array(published) / np.median(constants, axis=1))[:, None]
        typical = np.median([row.value for row in rows])
        constants[0] += centre["misfit"] * typical * rng.standard_normal(SAMPLES)
        _MEMORY.append(MemoryConstants(*np.maximum(constants, 0.0)))
    return _MEMORY[0]


def fit_memory(rows: list[Measurement]) -> dict[str, float]:
    """Framework, activation growth, bytes a trained weight by least squares on relative residuals; and the misfit."""
    columns, settled, peaks = [], [], []
    for row in rows:
        assert row.shape is not None
        assert row.setting is not None
        kept = kept_sums(row.shape, row.setting, [1.0], [1.0])
        parts = memory_parts(row.shape, kept, row.rank, row.setting)
        columns.append([1.0, float(parts.activations), float(parts.trained)])
        settled.append(float(parts.settled))
        peaks.append(row.value)
    measured = np.array(peaks)
    table, rest = np.array(columns) / measured[:, None], 1.0 - np.array(settled) / measured
    solution, *_ = np.linalg.lstsq(table, rest, rcond=None)
    misfit = float(np.sqrt(((table @ solution - rest) ** 2).mean()))
    return dict(zip(("framework", "growth", "state_bytes"), map(float, solution), strict=True)) | {"misfit": misfit}
