"""Predicted beside measured: every row that the cost model can state, with its error, its band, and what follows.

A row is *fitted* where a profile's `fitted_to` or the memory constants name it, else *unseen*. Rates of products and
streams, and power, are what a profile holds by `rests_on`: they count as fitted too, as nothing is predicted from
anything else. Context rows are shown and not counted, for the reason in their conditions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.contracts.common import FloatArray
from fedsim.cost.bands import SAMPLES, band, joint_samples, memory_samples, row_work, step_seconds
from fedsim.cost.device import DeviceProfile, load_profile, profile_names, rates_of
from fedsim.cost.estimate import estimate_step
from fedsim.cost.measurements import Measurement, built_in_measurements, matching, read_measurements
from fedsim.cost.memory import FITTED_MEMORY, FRAMEWORK_BYTES, peak_memory_bytes
from fedsim.cost.seconds import compute_time
from fedsim.cost.setting import kept_sums
from fedsim.errors import DataError, unknown
from fedsim.structure import kept_counts

WORST = 5
_UNIT_SLIP = 2.5
"""Decades by which a log's median may be off before another unit is the likelier reason."""


@dataclass(frozen=True)
class Checked:
    """A row with what the model says of it, in SI units (or a ratio).

    Attributes:
        low, high: the band of the prediction over the device's joint samples.
        fitted: whether the model was fitted to this row.
    """

    row: Measurement
    predicted: float
    low: float
    high: float
    fitted: bool

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted / self.row.value - 1.0

    @property
    def covered(self) -> bool:
        """Whether the measured number lies within the band."""
        return self.low <= self.row.value <= self.high

    @property
    def half_width(self) -> float:
        """Half the band over the prediction."""
        return 0.5 * (self.high - self.low) / self.predicted

    @property
    def kind(self) -> str:
        """The quantity, or its ratio to another row's."""
        return f"{self.row.quantity} ratio" if self.row.relative_to else self.row.quantity

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        row = self.row
        return {
            "id": row.id,
            "device": row.device,
            "mode": row.mode,
            "what": row.label(),
            "quantity": self.kind,
            "measured": row.value,
            "predicted": self.predicted,
            "low": self.low,
            "high": self.high,
            "error": self.error,
            "covered": self.covered,
            "fitted": self.fitted,
            "counted": row.counted,
            "conditions": row.conditions,
            "source": row.source,
        }


@dataclass(frozen=True)
class Summary:
    """What the rows of one kind come to; correlations are None for fewer than three rows or a constant.

    Attributes:
        mape: mean absolute relative error; bias: mean relative error.
        coverage: share of rows within their bands; half_width: median half-width of the bands, over the prediction.
    """

    group: str
    rows: int
    mape: float
    bias: float
    worst: float
    spearman: float | None
    kendall: float | None
    coverage: float
    half_width: float

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Validation:
    """All rows, and summaries of those that count: by kind, split into fitted and unseen, and by device.

    Attributes:
        silent: built-in devices that no counted row describes.
    """

    checked: tuple[Checked, ...]
    summaries: tuple[Summary, ...]
    silent: tuple[str, ...]

    @property
    def worst(self) -> list[Checked]:
        """The counted rows furthest off, unseen ones only where there are any."""
        counted = [one for one in self.checked if one.row.counted]
        unseen = [one for one in counted if not one.fitted]
        return sorted(unseen or counted, key=lambda one: -abs(np.log(one.predicted / one.row.value)))[:WORST]

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "summaries": [one.as_dict() for one in self.summaries],
            "worst": [one.row.id for one in self.worst],
            "devices_without_measurements": list(self.silent),
            "rows": [one.as_dict() for one in self.checked],
        }


def validate(profile: Path | None = None, log: Path | None = None) -> Validation:
    """Check the cost model against measurements.

    Args:
        profile: a profile's file; its device's rows alone are checked, against it. None: the built-in profiles.
        log: somebody's own measurements; None: the built-in ones.
    Raises:
        DataError, ProfileError: a row that is no measurement or names an unknown device; a log in other units; no
            rows for the profile.
    """
    own = None if profile is None else load_profile(profile)
    name = own.name if own else None
    rows = built_in_measurements() if log is None else read_measurements(log, name, strict=False)
    if own is not None:
        rows = [row for row in rows if row.device == own.name]
        if not rows:
            raise DataError(
                f"no measurement describes the device '{own.name}' of {profile}; give some with --log FILE.csv"
            )
    result = check(rows, {} if own is None else {own.name: own})
    if log is not None:
        _refuse_other_units(log, result.checked)
    return result


def check(rows: Sequence[Measurement], profiles: Mapping[str, DeviceProfile]) -> Validation:
    """`validate` for rows at hand; `profiles` stand in for the built-in ones of their names."""
    known = dict(profiles)
    for row in rows:
        if row.device not in known:
            if row.device not in profile_names():
                raise DataError(f"{row.where}: {unknown('device', row.device, profile_names())}")
            known[row.device] = load_profile(row.device)
    by_id = {row.id: row for row in rows}
    fitted = _fitted_ids(rows, known)
    predictions = {row.id: _prediction(row, known[row.device]) for row in rows}
    checked = []
    for row in rows:
        value, samples = predictions[row.id]
        if row.relative_to is not None:
            if row.relative_to not in by_id:
                raise DataError(f"{row.where}: relative_to names '{row.relative_to}', which no row is")
            base, base_samples = predictions[row.relative_to]
            value, samples = value / base, samples / base_samples
        low, high = band(samples)
        checked.append(Checked(row, value, min(low, value), max(high, value), row.id in fitted))
    described = {one.row.device for one in checked if one.row.counted}
    silent = () if profiles else tuple(name for name in profile_names() if name not in described)
    return Validation(tuple(checked), tuple(_summaries(checked)), silent)


def _fitted_ids(rows: Sequence[Measurement], profiles: Mapping[str, DeviceProfile]) -> set[str]:
    fitted = {row.id for row in matching(rows, FITTED_MEMORY)}
    for name, profile in profiles.items():
        own = [row for row in rows if row.device == name]
        fitted |= {row.id for row in matching(own, (*profile.fitted_to, *profile.rests_on))}
    return fitted


def _prediction(row: Measurement, profile: DeviceProfile) -> tuple[float, FloatArray]:
    """What the model says of a row, and of each joint sample."""
    if row.setting is not None and row.shape is not None and row.quantity in ("step_time", "peak_memory", "upload"):
        return _of_a_step(row, profile)
    samples = joint_samples(profile)
    rates, drawn = rates_of(profile, row.mode, row.precision), samples.rates(row.mode, row.precision)
    field = {
        "product_rate": "flops_per_s",
        "stream_rate": "memory_bytes_per_s",
        "busy_power": "busy_power_watts",
        "idle_power": "idle_power_watts",
    }[row.quantity]
    return float(getattr(rates, field)), np.broadcast_to(getattr(drawn, field), (SAMPLES,))


def _of_a_step(row: Measurement, profile: DeviceProfile) -> tuple[float, FloatArray]:
    assert row.setting is not None
    assert row.shape is not None
    if row.quantity == "step_time":
        work = row_work(row)
        total_s = float(compute_time(work, rates_of(profile, row.mode, row.precision)).total_s)
        return total_s, step_seconds(profile, work, row.mode, row.precision)
    numbers = estimate_step(profile, row.shape, row.setting, row.mode, row.rank, row.prune_ratio)
    if row.quantity == "upload":
        # Counted, but for names and formats around the numbers: a hundredth at most.
        value = float(numbers["upload_bytes"])
        return value, value * np.linspace(0.99, 1.01, SAMPLES)
    heads, channels = kept_counts(row.shape, row.prune_ratio)
    kept = kept_sums(row.shape, row.setting, (heads / row.shape.head_groups)[None], (channels / row.shape.ffn)[None])
    constants = memory_samples()
    drawn = peak_memory_bytes(row.shape, kept, row.rank, row.setting, constants)
    value = float(numbers["peak_memory_bytes"])
    if row.bare:
        value, drawn = value - FRAMEWORK_BYTES, drawn - constants.framework
    return value, drawn


def _summaries(checked: Sequence[Checked]) -> list[Summary]:
    counted = [one for one in checked if one.row.counted]
    summaries = []
    for kind in sorted({one.kind for one in counted}):
        for fitted in (True, False):
            group = [one for one in counted if one.kind == kind and one.fitted == fitted]
            if group:
                summaries.append(_summary(f"{kind}, {'fitted' if fitted else 'unseen'}", group))
    for device in sorted({one.row.device for one in counted}):
        steps = [one for one in counted if one.row.device == device and one.row.quantity == "step_time"]
        for fitted in (True, False):
            group = [one for one in steps if one.fitted == fitted]
            if group:
                summaries.append(_summary(f"{device}: step times, {'fitted' if fitted else 'unseen'}", group))
    unseen = [one for one in counted if not one.fitted and one.row.quantity == "step_time"]
    if unseen:
        summaries.append(_summary("all unseen step times and their ratios", unseen))
    return summaries


def _summary(group: str, rows: Sequence[Checked]) -> Summary:
    errors = np.array([one.error for one in rows])
    predicted, measured = np.array([one.predicted for one in rows]), np.array([one.row.value for one in rows])
    spearman = kendall = None
    if len(rows) > 2 and np.ptp(predicted) > 0 and np.ptp(measured) > 0:
        # Heavy, and only a table of three rows and more needs it.
        from scipy import stats

        spearman = float(stats.spearmanr(predicted, measured).statistic)
        kendall = float(stats.kendalltau(predicted, measured).statistic)
    return Summary(
        group=group,
        rows=len(rows),
        mape=float(np.abs(errors).mean()),
        bias=float(errors.mean()),
        worst=float(np.abs(errors).max()),
        spearman=spearman,
        kendall=kendall,
        coverage=float(np.mean([one.covered for one in rows])),
        half_width=float(np.median([one.half_width for one in rows])),
    )


def _refuse_other_units(log: Path, checked: Sequence[Checked]) -> None:
    """Refuse a log whose numbers are about a thousand times what is predicted, or a thousandth."""
    for quantity in sorted({one.row.quantity for one in checked}):
        rows = [one for one in checked if one.row.quantity == quantity and not one.row.relative_to]
        if not rows:
            continue
        off = float(np.median([np.log10(one.row.value / one.predicted) for one in rows]))
        if abs(off) > _UNIT_SLIP:
            more = "times" if off > 0 else "times less than"
            raise DataError(
                f"log '{log}': its {quantity} are {10 ** abs(off):.0f} {more} what is predicted in the unit it says; "
                "milliseconds for seconds (or such)? Write the unit of each row in the column 'unit'"
            )
