"""Flights on the clock, in columns: what each is about to do, when it did it, and the report of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedsim.contracts.common import FloatArray, IntArray, Outcome
from fedsim.contracts.flights import Arrivals, Flights, Places
from fedsim.errors import ProfileError
from fedsim.fleet.dynamics import NO_DROP
from fedsim.fleet.fleet import Fleet
from fedsim.fleet.link import bytes_moved

PHASES = 3
"""Download, compute, upload."""


@dataclass(frozen=True, eq=False)
class Trips:
    """What flights are about to do, shape (F,).

    Attributes:
        mode_row: which device in which power mode (`Fleet.mode_rows`).
        download_s, upload_s: how long each transfer takes with the link to itself.
        compute_s: how long the job takes.
        fits_memory: False: the client downloads, finds that the job does not fit, and stops.
        latency_s: of each transfer, before its first byte; part of its seconds.
        off_s: when the client will be gone, whatever it does then; infinite where it stays.
        drop_phase, drop_share: in which phase the flight is lost (`NO_DROP`: in none), after which share of it.
    """

    flights: Flights
    mode_row: IntArray
    download_s: FloatArray
    compute_s: FloatArray
    upload_s: FloatArray
    fits_memory: NDArray[np.bool_]
    latency_s: FloatArray
    off_s: FloatArray
    drop_phase: IntArray
    drop_share: FloatArray

    def __len__(self) -> int:
        return len(self.flights)

    def take(self, places: Places) -> Trips:
        """Some of them, in the order of `places`."""
        columns = {one.name: getattr(self, one.name)[places] for one in fields(self) if one.name != "flights"}
        return Trips(self.flights.take(places), **columns)

    @staticmethod
    def joined(parts: Sequence[Trips]) -> Trips:
        """Several, one behind the other; at least one."""
        if len(parts) == 1:
            return parts[0]
        names = [one.name for one in fields(Trips) if one.name != "flights"]
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return Trips(Flights.joined([part.flights for part in parts]), **columns)


@dataclass(frozen=True, eq=False)
class Stamps:
    """When flights did what, shape (F,); what has not happened is stamped with the present.

    Attributes:
        phases_done: completed phases out of `PHASES`.
        lost: whose client dropped out; None: nobody's.
        moved: share of a transfer that was cut, NaN or None: pro rata of its planned time.
    """

    download_start_s: FloatArray
    download_end_s: FloatArray
    compute_end_s: FloatArray
    upload_end_s: FloatArray
    phases_done: IntArray
    lost: NDArray[np.bool_] | None = None
    moved: FloatArray | None = None


@dataclass(frozen=True, eq=False)
class Moves:
    """Flights of which something happened since the last merge: what their trace is written from.

    Attributes:
        phases_logged: completed phases whose records the trace holds already, shape (F,); -1: nothing yet.
        late: those that were given up now.
    """

    trips: Trips
    stamps: Stamps
    phases_logged: IntArray
    late: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Landed:
    """Flights that a merge ends, by client, then flight; and the moves since the last merge, theirs included."""

    trips: Trips
    stamps: Stamps
    moves: Moves


class Player(Protocol):
    """Plays flights on the simulated clock; it knows nothing of rounds.

    Attributes:
        flying: flights at work.
        waiting: updates that have arrived and wait to be merged.
        timer_over: whether the last `advance` came to the time that it was given.
        idle: mask (clients,) of those that may be sent off: neither at work, nor is a flight of theirs to be merged.
    """

    flying: int
    waiting: int
    timer_over: bool
    idle: NDArray[np.bool_]

    @property
    def stopped(self) -> int:
        """Flights that ended without an update since the last `land`."""

    @property
    def now_s(self) -> float:
        """The simulated clock."""

    def launch(self, trips: Trips) -> None:
        """Send flights off now."""

    def advance(self, patience: int, timer_s: float | None) -> bool:
        """Play on until `patience` more updates have arrived, nobody is at work, or the clock shows `timer_s`.

        Everything that happens at that very moment has then happened.

        Returns:
            False where nothing can happen any more.
        """

    @property
    def first_left_s(self) -> float | None:
        """When the flight at work left that left first; None where nobody is at work."""

    def at_work_for(self, seconds: float) -> IntArray:
        """Clients whose flights have been at work for so long, ascending."""

    def set_aside(self, version: int) -> None:
        """Updates that wait and started from a version before `version` will end with the next merge, unmerged."""

    def land(self, merged: int, given_up: IntArray | None) -> Landed:
        """End flights: the `merged` updates that arrived first, what did not fit, and what is given up.

        Args:
            given_up: clients whose flights at work end now; None: all of them.
        """

    def state(self) -> dict[str, np.ndarray]:
        """Flights under way as arrays; empty where there are none."""

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on from what `state` gave."""


__all__ = ["NO_DROP", "PHASES", "Landed", "Moves", "Player", "Stamps", "Trips", "arrivals_of", "trips_of"]


def trips_of(fleet: Fleet, flights: Flights, version: int) -> Trips:
    """All durations of a dispatch at once.

    Raises:
        ProfileError: a compute time that is not positive and finite, or a transfer time that is negative or not finite.
    """
    clients, flight, work = flights.clients, flights.flight, flights.work
    mode_row = fleet.mode_rows(version, clients)
    dynamics = fleet.dynamics
    if dynamics is not None and dynamics.mode_period_s is not None:
        mode_row = fleet.mode_rows_at(flights.dispatch_s, clients)
    off_s = np.full(len(clients), np.inf)
    if dynamics is not None and dynamics.presence is not None and len(clients):
        off_s = dynamics.presence.off_s(clients, float(flights.dispatch_s[0]))
    if dynamics is not None and dynamics.drop_chance.any():
        drop_phase, drop_share = dynamics.drops(fleet.seed, clients, flight)
    else:
        drop_phase, drop_share = np.full(len(clients), NO_DROP), np.ones(len(clients))
    rates = fleet.rates_at(mode_row)
    down_s = fleet.download_seconds(flight, clients, work.download_bytes)
    up_s = fleet.upload_seconds(flight, clients, work.upload_bytes)
    return Trips(
        flights=flights,
        mode_row=mode_row,
        download_s=_checked("download", down_s, fleet, flights),
        compute_s=_checked("compute", fleet.compute_seconds(flight, clients, work, rates), fleet, flights),
        upload_s=_checked("upload", up_s, fleet, flights),
        fits_memory=work.peak_memory_bytes <= rates.usable_memory_bytes,
        latency_s=fleet.latency(clients),
        off_s=off_s,
        drop_phase=drop_phase,
        drop_share=drop_share,
    )


def arrivals_of(
    fleet: Fleet,
    landed: Landed,
    merge_index: int,
    start_s: float,
    end_s: float,
    *,
    held: bool,
    max_staleness: int | None = None,
) -> Arrivals:
    """What the strategy and the records are told of a merge.

    Energy of a flight = busy power * compute seconds + (idle + radio power) * transfer seconds + idle power * the rest
    of the time until its client is released [ours]. Energy and bytes of work that was cut short are counted up to the
    cut.

    Args:
        held: whether clients are released at the merge only.
        max_staleness: updates that are older are not merged.
    """
    trips, stamps = landed.trips, landed.stamps
    flights, fits, done = trips.flights, trips.fits_memory, stamps.phases_done
    clients, work = flights.clients, flights.work
    late = (done < PHASES) & (fits | (done == 0))
    outcome = np.where(late, Outcome.LATE, np.where(fits, Outcome.OK, Outcome.OUT_OF_MEMORY)).astype(np.int64)
    if stamps.lost is not None:
        outcome[stamps.lost] = Outcome.DROPPED
    if max_staleness is not None:
        outcome[(outcome == Outcome.OK) & (merge_index - flights.version > max_staleness)] = Outcome.STALE
    download_s = stamps.download_end_s - stamps.download_start_s
    compute_s = stamps.compute_end_s - stamps.download_end_s
    upload_s = stamps.upload_end_s - stamps.compute_end_s
    latency_s = fleet.latency(clients)
    cut_down = bytes_moved(work.download_bytes, download_s, trips.download_s, latency_s)
    cut_up = bytes_moved(work.upload_bytes, upload_s, trips.upload_s, latency_s)
    if stamps.moved is not None:
        measured = ~np.isnan(stamps.moved)
        cut_down = np.where(measured, work.download_bytes * stamps.moved, cut_down)
        cut_up = np.where(measured, work.upload_bytes * stamps.moved, cut_up)
    released_s = np.full(len(trips), end_s) if held else stamps.upload_end_s
    if stamps.lost is not None:  # who is gone is not held
        released_s = np.where(stamps.lost, stamps.upload_end_s, released_s)
    rates = fleet.rates_at(trips.mode_row)
    idle_joules = rates.idle_power_watts * ((released_s - flights.dispatch_s) - compute_s)
    if fleet.dynamics is not None and fleet.dynamics.mode_period_s is not None:
        busy_joules = fleet.busy_joules(clients, stamps.download_end_s, stamps.compute_end_s)
    else:
        busy_joules = rates.busy_power_watts * compute_s
    joules = busy_joules + rates.radio_power_watts * (download_s + upload_s) + idle_joules
    return Arrivals(
        merge_index=merge_index,
        start_s=start_s,
        end_s=end_s,
        flights=flights,
        device=fleet.devices(clients),
        mode=fleet.modes_at(trips.mode_row),
        download_start_s=stamps.download_start_s,
        download_end_s=stamps.download_end_s,
        compute_end_s=stamps.compute_end_s,
        upload_end_s=stamps.upload_end_s,
        released_s=released_s,
        bytes_down=np.where(done >= 1, work.download_bytes, cut_down),
        bytes_up=np.where(done == PHASES, work.upload_bytes, np.where(done == 2, cut_up, 0.0)),
        energy_joules=joules,
        outcome=outcome,
    )


def _checked(phase: str, seconds: FloatArray, fleet: Fleet, flights: Flights) -> FloatArray:
    """Refuse a time that would let a run go on with a wrong clock: a job must take time, a transfer may take none."""
    bad = ~np.isfinite(seconds) | (seconds < 0) | ((phase == "compute") & (seconds == 0))
    if bad.any():
        place = int(np.argmax(bad))
        client = int(flights.clients[place])
        allowed = "above 0" if phase == "compute" else "at least 0"
        raise ProfileError(
            f"the {phase} time of client {client} ({fleet.device_of[client]}) in flight {flights.flight[place]} is "
            f"{seconds[place]} s (allowed: finite and {allowed})"
        )
    return seconds
