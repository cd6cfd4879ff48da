"""Flights under way as named arrays, for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import numpy as np

from fedsim.contracts.control import Work
from fedsim.contracts.flights import Flights
from fedsim.sim.trips import Trips


def pack_trips(trips: Trips) -> dict[str, np.ndarray]:
    """Every column, by a name of its own, shape (F,)."""
    packed = {f"work.{one.name}": getattr(trips.flights.work, one.name) for one in fields(Work)}
    packed |= {f"flights.{one.name}": getattr(trips.flights, one.name) for one in fields(Flights) if one.name != "work"}
    packed |= {f"trips.{one.name}": getattr(trips, one.name) for one in fields(Trips) if one.name != "flights"}
    return {name: np.array(column) for name, column in packed.items()}


def unpack_trips(packed: Mapping[str, np.ndarray]) -> Trips:
    """What `pack_trips` was given."""

    def part(prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): value for name, value in packed.items() if name.startswith(prefix)}

    columns = part("trips.")
    columns["fits_memory"] = columns["fits_memory"].astype(bool)
    return Trips(Flights(**part("flights."), work=Work(**part("work."))), **columns)
