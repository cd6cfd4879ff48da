"""Device profiles and estimates as text, and as what JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from fedsim.cost.device import DeviceProfile, PowerMode, Quantity, load_profile, profile_names, rates_of

if TYPE_CHECKING:
    from fedsim.cost.validate import Checked, Summary, Validation

_ESTIMATE_ROWS = (
    ("step_time_s", "time of a step", 1.0, "s"),
    ("step_time_low_s", "  band, low", 1.0, "s"),
    ("step_time_high_s", "  band, high", 1.0, "s"),
    ("compute_s", "  arithmetic", 1.0, "s"),
    ("memory_s", "  memory traffic", 1.0, "s"),
    ("launch_s", "  kernel launches", 1.0, "s"),
    ("samples_per_s", "samples per second", 1.0, "1/s"),
    ("energy_j", "energy of a step", 1.0, "J"),
    ("peak_memory_bytes", "peak memory", 1e-9, "GB"),
    ("flops", "operations", 1e-9, "GFLOP"),
    ("memory_bytes", "memory traffic", 1e-9, "GB"),
    ("upload_bytes", "upload of an update", 1e-6, "MB"),
)


def _quantities(record: DeviceProfile | PowerMode) -> list[tuple[str, Quantity]]:
    pairs = ((field.name, getattr(record, field.name)) for field in fields(record))
    return [(name, value) for name, value in pairs if isinstance(value, Quantity)]


def profile_as_dict(profile: DeviceProfile) -> dict[str, Any]:
    """Every number of a profile with unit, status, source, low and high; for JSON."""
    shared = {name: asdict(quantity) for name, quantity in _quantities(profile)}
    modes = {
        name: {field: asdict(quantity) for field, quantity in _quantities(mode)} for name, mode in profile.modes.items()
    }
    return {
        "name": profile.name,
        "description": profile.description,
        "default_mode": profile.default_mode,
        "rests_on": list(profile.rests_on),
        "fitted_to": list(profile.fitted_to),
        **shared,
        "modes": modes,
    }


def profile_text(profile: DeviceProfile) -> str:
    """A table of every number of a profile, modes below."""
    rows = [_quantity_row(name, quantity) for name, quantity in _quantities(profile)]
    for name, mode in profile.modes.items():
        mark = " (default: the fastest)" if name == profile.default_mode else ""
        rows.append([f"mode {name}{mark}"])
        rows += [_quantity_row(f"  {field}", quantity) for field, quantity in _quantities(mode)]
    header = ["number", "value", "unit", "status", "low", "high", "source"]
    lines = [f"{profile.name}: {profile.description}"]
    for title, names in (("rests on", profile.rests_on), ("fitted to", profile.fitted_to)):
        if names:
            lines.append(f"{title}: {', '.join(names)} (device_profiles/measurements)")
    return "\n".join([*lines, "", table(header, rows)])


def _quantity_row(name: str, quantity: Quantity) -> list[str]:
    numbers = [f"{number:.6g}" for number in (quantity.value, quantity.low, quantity.high)]
    status = f"{quantity.status}, budget" if quantity.is_budget else quantity.status
    return [name, numbers[0], quantity.unit, status, numbers[1], numbers[2], quantity.source]


def devices_json(name: str | None = None) -> dict[str, Any] | list[dict[str, Any]]:
    """One profile (a name or a YAML path), or all built-in ones; for JSON."""
    if name is not None:
        return profile_as_dict(load_profile(name))
    return [profile_as_dict(load_profile(each)) for each in profile_names()]


def devices_text(name: str | None = None) -> str:
    """Every number of one profile; or, without a name, one line per built-in device with its default mode's rates."""
    return profile_text(load_profile(name)) if name is not None else _overview()


def _overview() -> str:
    rows = []
    for name in profile_names():
        profile = load_profile(name)
        rates = rates_of(profile, None, "fp32")
        rows.append(
            [
                name,
                profile.default_mode,
                str(len(profile.modes)),
                f"{float(rates.flops_per_s) / 1e12:.3f}",
                f"{float(rates.memory_bytes_per_s) / 1e9:.1f}",
                f"{float(rates.usable_memory_bytes) / 1e9:.1f}",
                f"{profile.efficiency_fp32.value:.3f} ({profile.efficiency_fp32.status})",
            ]
        )
    header = ["device", "default mode", "modes", "TFLOP/s", "GB/s", "usable GB", "fp32 efficiency"]
    return table(header, rows)


def estimate_text(numbers: Mapping[str, float | bool]) -> str:
    """The result of `fedsim.cost.estimate.estimate` as a table with units."""
    rows = [[label, f"{float(numbers[key]) * scale:.4g}", unit] for key, label, scale, unit in _ESTIMATE_ROWS]
    rows.append(["fits in memory", "yes" if numbers["fits_memory"] else "no", ""])
    return table(["quantity", "value", "unit"], rows)


_WHERE_IN_UNITS = {"step_time": (1.0, "s"), "peak_memory": (1e-9, "GB"), "upload": (1e-6, "MB")}
_RATES = {"product_rate": (1e-9, "GFLOP/s"), "stream_rate": (1e-9, "GB/s")}


def validation_text(validation: Validation) -> str:
    """Summaries, the worst rows, and what no row says anything of."""
    header = ["rows", "n", "MAPE", "bias", "worst", "Spearman", "Kendall", "in band", "half-width"]
    lines = [table(header, [summary_cells(one) for one in validation.summaries]), ""]
    lines.append("Furthest off:" if validation.worst else "No row counts.")
    lines.append(table(CHECKED_HEADER, [checked_cells(one) for one in validation.worst]))
    shown = sum(not one.row.counted for one in validation.checked)
    if shown:
        lines += ["", f"{shown} rows are shown by --json and --page and not counted, each for the reason it gives."]
    if validation.silent:
        lines += ["", f"No measurement describes: {', '.join(validation.silent)}."]
    return "\n".join(lines)


def summary_cells(one: Summary) -> list[str]:
    """A summary as cells of the table of `validation_text`."""
    ranks = ["-" if value is None else f"{value:.3f}" for value in (one.spearman, one.kendall)]
    shares = [f"{100 * value:.1f}%" for value in (one.mape, one.bias, one.worst)]
    return [one.group, str(one.rows), *shares, *ranks, f"{100 * one.coverage:.0f}%", f"{100 * one.half_width:.0f}%"]


CHECKED_HEADER = ["row", "device", "what", "measured", "predicted", "band", "error", "in band"]


def checked_cells(one: Checked) -> list[str]:
    """A checked row as cells under `CHECKED_HEADER`."""
    scale, unit = (_WHERE_IN_UNITS | _RATES).get(one.row.quantity, (1.0, "W"))
    if one.row.relative_to:
        scale, unit = 1.0, "x"
    numbers = [f"{scale * value:.4g}" for value in (one.row.value, one.predicted, one.low, one.high)]
    return [
        one.row.id,
        one.row.device + (f" {one.row.mode}" if one.row.mode else ""),
        one.row.label(),
        f"{numbers[0]} {unit}",
        f"{numbers[1]} {unit}",
        f"{numbers[2]} to {numbers[3]}",
        f"{100 * one.error:+.1f}%",
        "yes" if one.covered else "no",
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; a row of one cell spans the table and widens nothing."""
    full = [row for row in (header, *rows) if len(row) == len(header)]
    widths = [max(len(row[column]) for row in full) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()

    rule = "  ".join("-" * min(width, 60) for width in widths)
    return "\n".join([line(header), rule, *(line(row) for row in rows)])
