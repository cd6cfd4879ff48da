"""Computing at a rate that changes: devices that throttle, and power modes that change while a job runs."""

from __future__ import annotations

import numpy as np

from fedsim.contracts.control import Work
from fedsim.fleet.fleet import Fleet
from fedsim.sim.flight_clock import COMPUTING, Trip


class Computing:
    """How long jobs take from now on, and how busy each device has been."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, self._heat, self._modes = fleet, fleet.dynamics.heat, fleet.mode_clock
        clients = fleet.clients if self._heat is not None else 0
        self._busy_s, self._since_s = [0.0] * clients, [0.0] * clients

    def seconds(self, trip: Trip, now_s: float) -> float:
        """Seconds of the trip's job, which starts now, or of the share of it after which the flight is lost."""
        share = trip.drop_share if trip.drop_phase == COMPUTING else 1.0
        heat, client = self._heat, trip.client
        busy_s = heat.cooled(self._busy_s[client], now_s - self._since_s[client]) if heat is not None else 0.0
        if self._modes is None:
            assert heat is not None
            return heat.seconds(busy_s, share * trip.compute_s)
        who = np.array([client])
        epoch = self._modes.epoch(who, np.array([now_s]))
        at_s, left = now_s, share
        while True:
            whole_s = self._whole_s(trip, at_s)
            until_s = float(self._modes.change_s(who, epoch + 1)[0])
            takes_s = left * whole_s if heat is None else heat.seconds(busy_s, left * whole_s)
            if at_s + takes_s <= until_s:
                return at_s + takes_s - now_s
            spent_s = until_s - at_s
            left -= (spent_s if heat is None else heat.work(busy_s, spent_s)) / whole_s
            if heat is not None:
                busy_s = heat.heated(busy_s, spent_s)
            at_s, epoch = until_s, epoch + 1

    def ended(self, trip: Trip, start_s: float, now_s: float) -> None:
        """A job that began at `start_s` has ended now, at its end or before."""
        heat, client = self._heat, trip.client
        if heat is not None:
            busy_s = heat.cooled(self._busy_s[client], start_s - self._since_s[client])
            self._busy_s[client], self._since_s[client] = heat.heated(busy_s, now_s - start_s), now_s

    def _whole_s(self, trip: Trip, at_s: float) -> float:
        """The whole job in the power mode of that moment."""
        fleet, place = self._fleet, trip.place
        who = np.array([trip.client])
        row = fleet.mode_rows_at(np.array([at_s]), who)
        if row[0] == trip.batch.mode_row[place]:
            return float(trip.batch.compute_s[place])
        work = trip.batch.flights.work
        one = Work(**{name: getattr(work, name)[place : place + 1] for name in work.__dataclass_fields__})
        flight = trip.batch.flights.flight[place : place + 1]
        return float(fleet.compute_seconds(flight, who, one, fleet.rates_at(row))[0])

    def state(self) -> dict[str, np.ndarray]:
        """Busy seconds of every device, and as of when; empty where none throttles."""
        if self._heat is None:
            return {}
        return {"heat.busy_s": np.array(self._busy_s), "heat.since_s": np.array(self._since_s)}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take what `state` gave."""
        if self._heat is not None:
            self._busy_s, self._since_s = state["heat.busy_s"].tolist(), state["heat.since_s"].tolist()
