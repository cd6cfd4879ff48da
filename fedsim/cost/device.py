"""Device profiles: numbers with unit, status, source and band, and the rates that follow from them.

A profile is one YAML file. Shared quantities stand at its top, the power modes below; every number is a mapping
``{value, unit, status, source, low, high}`` (``low`` and ``high`` default to ``value``). Units are parsed to SI once,
here. Rates of a mode: operations = efficiency x SMs x cores x 2 x GPU clock (x the precision's multiple), bytes =
bandwidth x memory clock's share x efficiency, launches = launch cost / CPU clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from fedsim.contracts.common import FloatArray
from fedsim.cost.units import Status, si_factor, units_of
from fedsim.cost.workload import BYTES_PER_VALUE, Precision
from fedsim.errors import ProfileError, RunError, unknown
from fedsim.places import check_name, user_path
from fedsim.resources import resource_folder
from fedsim.yaml_text import YamlError, read_yaml, shown

FLOPS_PER_CORE_CYCLE = 2
"""One fused multiply-add per core and clock."""

# The mix by which the fastest mode is found: a LoRA step of roberta-base at 2048 tokens, rounded.
REFERENCE_FLOPS_PER_BYTE = 40.0
REFERENCE_FLOPS_PER_LAUNCH = 4e8


@dataclass(frozen=True)
class Quantity:
    """One number of a profile, in the file's unit.

    Attributes:
        value, low, high: the number and its band, > 0, ``low <= value <= high``.
        unit: as written in the file.
        status: ``spec``, ``measured``, ``derived``, ``extrapolated`` or ``assumed``.
        source: where the number is from, in words.
    """

    value: float
    unit: str
    status: Status
    source: str
    low: float
    high: float

    @property
    def si(self) -> float:
        """The value in SI units (Hz, bytes, bytes/s, W, s Hz, or a pure number)."""
        return self.value * si_factor(self.unit)

    @property
    def is_budget(self) -> bool:
        """Whether it is a power budget, an upper bound that nobody measured: its source begins by saying so."""
        return self.source.startswith(("power budget", "budget"))


@dataclass(frozen=True)
class PowerMode:
    """One power mode of a board: what it leaves switched on, and how fast it clocks."""

    name: str
    active_sms: Quantity
    gpu_clock: Quantity
    cpu_clock: Quantity
    memory_clock: Quantity
    busy_power: Quantity


@dataclass(frozen=True)
class DeviceProfile:
    """A device class.

    Attributes:
        name, description: as shown in tables; the description says what the class rests on.
        default_mode: the fastest mode (`fastest_mode`), unless the file names one.
        memory_capacity, memory_reserve: of the board, and what the system keeps of it.
        memory_bandwidth: at `reference_memory_clock`.
        cores_per_sm: fp32 cores of one streaming multiprocessor.
        fp16_multiple: peak of fp16 (with matrix units where the device has them) over peak of fp32.
        efficiency_fp32, efficiency_fp16: share of the peak that a step's operations reach, memory and launches apart.
        bandwidth_efficiency: share of the bandwidth that kernels reach.
        launch_cost: CPU time of one kernel launch times CPU clock.
        idle_power: drawn while not computing; radio_power: drawn above that while data flows.
        rests_on: rows of ``device_profiles/measurements`` that numbers of this profile rest on, by id (``*`` at the end
            stands for any).
        fitted_to: rows that `efficiency_fp32` is fitted to: its band is then what still reproduces them, whatever
            bandwidth share and launch cost (`fedsim.cost.bands`).
        covariance: of the logarithms of the three rates, where they were fitted to steps of the device itself.
    """

    name: str
    description: str
    default_mode: str
    memory_capacity: Quantity
    memory_reserve: Quantity
    memory_bandwidth: Quantity
    reference_memory_clock: Quantity
    cores_per_sm: Quantity
    fp16_multiple: Quantity
    efficiency_fp32: Quantity
    efficiency_fp16: Quantity
    bandwidth_efficiency: Quantity
    launch_cost: Quantity
    idle_power: Quantity
    radio_power: Quantity
    modes: Mapping[str, PowerMode]
    rests_on: tuple[str, ...] = ()
    fitted_to: tuple[str, ...] = ()
    covariance: tuple[tuple[float, ...], ...] | None = None

    def mode(self, name: str | None) -> PowerMode:
        """A power mode by name; None: the default. Raises ProfileError for an unknown one."""
        wanted = self.default_mode if name is None else name
        if wanted not in self.modes:
            raise ProfileError(unknown(f"power mode of {self.name}", wanted, self.modes))
        return self.modes[wanted]


@dataclass(frozen=True, eq=False)
class Rates:
    """What a device in a mode delivers; floats, or arrays of one common shape, one entry per client. All > 0."""

    flops_per_s: float | FloatArray
    memory_bytes_per_s: float | FloatArray
    seconds_per_launch: float | FloatArray
    busy_power_watts: float | FloatArray
    idle_power_watts: float | FloatArray
    radio_power_watts: float | FloatArray
    usable_memory_bytes: float | FloatArray


_MODE_KINDS = {
    "active_sms": "multiprocessors",
    "gpu_clock": "frequency",
    "cpu_clock": "frequency",
    "memory_clock": "frequency",
    "busy_power": "power",
}
_PROFILE_KINDS = {
    "memory_capacity": "memory",
    "memory_reserve": "memory",
    "memory_bandwidth": "memory bandwidth",
    "reference_memory_clock": "frequency",
    "cores_per_sm": "cores",
    "fp16_multiple": "ratio",
    "efficiency_fp32": "ratio",
    "efficiency_fp16": "ratio",
    "bandwidth_efficiency": "ratio",
    "launch_cost": "cycles",
    "idle_power": "power",
    "radio_power": "power",
}
_ROW_FIELDS = ("rests_on", "fitted_to")
_LEAST, _MOST = 1e-15, 1e18
"""Bounds of a number in its unit: nothing real is beyond them, and times made of such numbers stay finite."""
_SHARES = ("efficiency_fp32", "efficiency_fp16", "bandwidth_efficiency")


def profile_names() -> tuple[str, ...]:
    """Names of the profiles that travel with the package, sorted."""
    return tuple(sorted(path.stem for path in resource_folder("device_profiles").glob("*.yaml")))


def load_profile(name_or_path: str | Path) -> DeviceProfile:
    """Read a profile by name (`profile_names`) or from a YAML file.

    Raises:
        ProfileError: no such profile, or a number that is missing, not positive, out of its band or in a wrong unit.
    """
    path = user_path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        if str(name_or_path) not in profile_names():
            raise ProfileError(unknown("device", str(name_or_path), profile_names()) + ", or the path of a .yaml file")
        path = resource_folder("device_profiles") / f"{name_or_path}.yaml"
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ProfileError(f"profile file {path} does not exist") from error
    except (OSError, UnicodeDecodeError, YamlError) as error:
        raise ProfileError(f"profile file {path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ProfileError(f"profile file {path} must hold a mapping, not {type(content).__name__}")
    try:
        return parse_profile(content, path.stem)
    except ProfileError as error:
        # A copied profile often keeps its first name: say which file.
        raise ProfileError(f"{path}: {error}") from error


def parse_profile(content: Mapping[str, Any], fallback_name: str) -> DeviceProfile:
    """Check the content of a profile file. Raises ProfileError naming profile, field and what is needed."""
    name = str(content.get("name", fallback_name))
    try:
        check_name("device", name)
    except RunError as error:
        raise ProfileError(str(error)) from None
    known = {"name", "description", "default_mode", "modes", "calibration", *_ROW_FIELDS, *_PROFILE_KINDS}
    _refuse_unknown(name, "", content, known)
    shared = {field: _quantity(name, field, content.get(field), kind) for field, kind in _PROFILE_KINDS.items()}
    modes = content.get("modes")
    if not isinstance(modes, dict) or not modes:
        raise ProfileError(f"profile {name}: modes must be a mapping with at least one power mode")
    parsed = {}
    for key, numbers in modes.items():
        where = f"modes.{key}"
        if not isinstance(numbers, dict):
            raise ProfileError(f"profile {name}: {where} must be a mapping of {', '.join(_MODE_KINDS)}")
        _refuse_unknown(name, f"{where}.", numbers, set(_MODE_KINDS))
        mode = {
            field: _quantity(name, f"{where}.{field}", numbers.get(field), kind) for field, kind in _MODE_KINDS.items()
        }
        parsed[str(key)] = PowerMode(name=str(key), **mode)
    profile = DeviceProfile(
        name=name,
        description=str(content.get("description", "")),
        default_mode=str(content.get("default_mode", next(iter(parsed)))),
        modes=parsed,
        rests_on=_row_names(name, "rests_on", content),
        fitted_to=_row_names(name, "fitted_to", content),
        covariance=_covariance(name, content.get("calibration")),
        **shared,
    )
    profile.mode(None)
    if "default_mode" not in content:
        profile = replace(profile, default_mode=fastest_mode(profile))
    if profile.memory_reserve.si >= profile.memory_capacity.si:
        raise ProfileError(f"profile {name}: memory_reserve must be below memory_capacity")
    return profile


def _covariance(profile: str, calibration: object) -> tuple[tuple[float, ...], ...] | None:
    if calibration is None:
        return None
    found = calibration.get("covariance_of_log_rates") if isinstance(calibration, Mapping) else None
    try:
        matrix = np.array(found, dtype=np.float64)
    except (TypeError, ValueError):
        matrix = np.zeros(0)
    good = matrix.shape == (3, 3) and np.isfinite(matrix).all() and np.allclose(matrix, matrix.T)
    if not good or np.linalg.eigvalsh(matrix).min() < -1e-12:
        raise ProfileError(
            f"profile {profile}: calibration.covariance_of_log_rates is {found!r}; it must be a covariance of the "
            "logarithms of 3 rates"
        )
    return tuple(tuple(float(value) for value in row) for row in matrix)


def _row_names(profile: str, field: str, content: Mapping[str, Any]) -> tuple[str, ...]:
    names = content.get(field, [])
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise ProfileError(f"profile {profile}: {field} is {names!r}; it must be a list of ids of measurements")
    return tuple(names)


def _refuse_unknown(profile: str, prefix: str, content: Mapping[str, Any], allowed: set[str]) -> None:
    for key in content:
        if str(key) not in allowed:
            raise ProfileError(
                f"profile {profile}: {unknown('field', f'{prefix}{key}', {prefix + a for a in allowed})}"
            )


def _quantity(profile: str, field: str, content: object, kind: str) -> Quantity:
    here, units = f"profile {profile}: {field}", units_of(kind)
    need = f"a {kind} in {' or '.join(units)}, written {{value, unit, status, source, low, high}}"
    if content is None:
        raise ProfileError(f"{here} is missing; needed is {need}")
    if not isinstance(content, Mapping):
        raise ProfileError(f"{here} is {shown(repr(content))}; needed is {need}")
    _refuse_unknown(profile, f"{field}.", content, {"value", "unit", "status", "source", "low", "high"})
    unit = str(content.get("unit"))
    if unit not in units:
        raise ProfileError(f"{here} has unit '{unit}'; needed is {need}")
    status: Any = content.get("status")
    if status not in get_args(Status):
        raise ProfileError(f"{here} has status '{status}'; allowed are {', '.join(get_args(Status))}")
    source = content.get("source")
    if not isinstance(source, str) or not source.strip():
        raise ProfileError(f"{here} has no source; every number must say where it is from")
    numbers: dict[str, float] = {}
    for key in ("value", "low", "high"):
        number = content.get(key, content.get("value"))
        if not isinstance(number, int | float) or isinstance(number, bool) or not _LEAST <= number <= _MOST:
            raise ProfileError(f"{here} has {key} {shown(repr(number))}; it must be a positive number")
        numbers[key] = float(number)
    if not numbers["low"] <= numbers["value"] <= numbers["high"]:
        raise ProfileError(
            f"{here} has value {numbers['value']:g} outside its band {numbers['low']:g}..{numbers['high']:g}"
        )
    if field in _SHARES and numbers["high"] > 1:
        raise ProfileError(f"{here} has high {numbers['high']:g}; a share of a peak is at most 1")
    return Quantity(unit=unit, status=status, source=source, **numbers)


def peak_flops_per_s(profile: DeviceProfile, mode: PowerMode, precision: Precision) -> float:
    """Peak of a mode, before any efficiency."""
    return float(_peak(si_numbers(profile, mode), precision))


def profile_fields() -> tuple[str, ...]:
    """Names of the numbers that all modes of a profile share."""
    return tuple(_PROFILE_KINDS)


def mode_fields() -> tuple[str, ...]:
    """Names of the numbers of a power mode."""
    return tuple(_MODE_KINDS)


def si_numbers(profile: DeviceProfile, mode: PowerMode) -> dict[str, float | FloatArray]:
    """Every number of a profile in a mode, in SI units, by field name."""
    numbers: dict[str, float | FloatArray] = {field: getattr(profile, field).si for field in _PROFILE_KINDS}
    return numbers | {field: getattr(mode, field).si for field in _MODE_KINDS}


def _peak(numbers: Mapping[str, float | FloatArray], precision: Precision) -> float | FloatArray:
    peak = numbers["active_sms"] * numbers["cores_per_sm"] * FLOPS_PER_CORE_CYCLE * numbers["gpu_clock"]
    return peak * (numbers["fp16_multiple"] if precision == "fp16" else 1.0)


def rates_of(profile: DeviceProfile, mode_name: str | None, precision: Precision) -> Rates:
    """Rates of a device in a power mode (None: the default). Raises ProfileError for an unknown mode or precision."""
    return rates_from(si_numbers(profile, profile.mode(mode_name)), precision)


def rates_from(numbers: Mapping[str, float | FloatArray], precision: Precision) -> Rates:
    """Rates from numbers in SI units (`si_numbers`): floats, or arrays of one shape for as many drawn devices."""
    if precision not in BYTES_PER_VALUE:
        raise ProfileError(unknown("precision", precision, BYTES_PER_VALUE))
    bandwidth = numbers["memory_bandwidth"] * numbers["memory_clock"] / numbers["reference_memory_clock"]
    return Rates(
        flops_per_s=numbers[f"efficiency_{precision}"] * _peak(numbers, precision),
        memory_bytes_per_s=bandwidth * numbers["bandwidth_efficiency"],
        seconds_per_launch=numbers["launch_cost"] / numbers["cpu_clock"],
        busy_power_watts=numbers["busy_power"],
        idle_power_watts=numbers["idle_power"],
        radio_power_watts=numbers["radio_power"],
        usable_memory_bytes=numbers["memory_capacity"] - numbers["memory_reserve"],
    )


def fastest_mode(profile: DeviceProfile) -> str:
    """The mode that takes the least time for the reference mix; the first of equals."""

    def seconds_per_flop(name: str) -> float:
        rates = rates_of(profile, name, "fp32")
        bytes_s = 1.0 / (REFERENCE_FLOPS_PER_BYTE * rates.memory_bytes_per_s)
        return float(1.0 / rates.flops_per_s + bytes_s + rates.seconds_per_launch / REFERENCE_FLOPS_PER_LAUNCH)

    return min(profile.modes, key=seconds_per_flop)


def stack_rates(rates: Sequence[Rates]) -> Rates:
    """Rates of many clients as arrays of shape ``(len(rates),)``."""
    columns = {f.name: np.array([getattr(r, f.name) for r in rates], dtype=np.float64) for f in fields(Rates)}
    return Rates(**columns)
