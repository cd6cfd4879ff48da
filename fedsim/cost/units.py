"""Units of profile numbers: a unit belongs to one kind, and has one factor to SI. No stray 8 or 32 anywhere else."""

from __future__ import annotations

from typing import Literal

Status = Literal["spec", "measured", "derived", "extrapolated", "assumed"]

_UNITS: dict[str, tuple[str, float]] = {
    "Hz": ("frequency", 1.0),
    "MHz": ("frequency", 1e6),
    "GHz": ("frequency", 1e9),
    "B": ("memory", 1.0),
    "MB": ("memory", 1e6),
    "GB": ("memory", 1e9),
    "MiB": ("memory", 2.0**20),
    "GiB": ("memory", 2.0**30),
    "B/s": ("memory bandwidth", 1.0),
    "MB/s": ("memory bandwidth", 1e6),
    "GB/s": ("memory bandwidth", 1e9),
    "W": ("power", 1.0),
    "mW": ("power", 1e-3),
    "ms*GHz": ("cycles", 1e6),
    "us*GHz": ("cycles", 1e3),
    "cycles": ("cycles", 1.0),
    "SM": ("multiprocessors", 1.0),
    "cores": ("cores", 1.0),
    "1": ("ratio", 1.0),
}


def units_of(kind: str) -> tuple[str, ...]:
    """The units that a quantity of this kind may be written in."""
    return tuple(unit for unit, (its_kind, _) in _UNITS.items() if its_kind == kind)


def si_factor(unit: str) -> float:
    """Factor from `unit` to SI (Hz, B, B/s, W, cycles, or a pure number). Raises KeyError for an unknown unit."""
    return _UNITS[unit][1]
