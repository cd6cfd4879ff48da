"""From what flights did to the trace's records."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsim.contracts.common import FloatArray
from fedsim.fleet.fleet import Fleet
from fedsim.sim.trace import SERVER, Event, Trace
from fedsim.sim.trips import PHASES, Moves


def log_open(trace: Trace, now_s: float, merge_index: int, clients: int) -> None:
    """The server sent off so many clients."""
    trace.add_many(np.array([now_s]), merge_index, np.array([SERVER]), Event.ROUND_OPEN, np.array([float(clients)]))


def log_merge(trace: Trace, now_s: float, merge_index: int, merged: int) -> None:
    """The server merged so many updates."""
    trace.add_many(np.array([now_s]), merge_index, np.array([SERVER]), Event.ROUND_CLOSE, np.array([float(merged)]))


def log_modes(trace: Trace, fleet: Fleet, version: int, now_s: float) -> None:
    """Each client's power mode at the start, and again when a re-draw changes it."""
    if fleet.dynamics is not None and fleet.dynamics.mode_period_s is not None:
        fleet.opened(version, now_s)
    changed = fleet.mode_changes(version)
    modes = fleet.modes(version, changed).astype(np.float64)
    trace.add_many(np.full(len(changed), now_s), version, changed, Event.MODE, modes)


def log_mode_changes(trace: Trace, fleet: Fleet, merge_index: int, after_s: float, until_s: float) -> None:
    """Changes of power modes by the clock since the last merge."""
    times_s, clients, modes = fleet.mode_changes_between(after_s, until_s)
    trace.add_many(times_s, merge_index, clients, Event.MODE, modes.astype(np.float64))


def log_moves(trace: Trace, merge_index: int, now_s: float, moves: Moves) -> None:
    """What flights did since the last merge, a record per phase that began or ended."""
    trips, stamps, logged = moves.trips, moves.stamps, moves.phases_logged
    clients, work, done, fits = trips.flights.clients, trips.flights.work, stamps.phases_done, trips.fits_memory

    def add(event: Event, times_s: FloatArray, values: FloatArray, mask: NDArray[np.bool_]) -> None:
        everyone = bool(mask.all())
        rows = (times_s, clients, values) if everyone else (times_s[mask], clients[mask], values[mask])
        trace.add_many(rows[0], merge_index, rows[1], event, rows[2])

    downloaded = (done >= 1) & (logged < 1)
    add(Event.DOWNLOAD_START, stamps.download_start_s, work.download_bytes, logged < 0)
    add(Event.DOWNLOAD_END, stamps.download_end_s, work.download_bytes, downloaded)
    add(Event.OUT_OF_MEMORY, stamps.download_end_s, work.peak_memory_bytes, downloaded & ~fits)
    # Where the rate of computing changes, its seconds are known behind it only.
    computed_s = trips.compute_s if stamps.lost is None else stamps.compute_end_s - stamps.download_end_s
    add(Event.COMPUTE_END, stamps.compute_end_s, computed_s, (done >= 2) & (logged < 2))
    add(Event.UPLOAD_END, stamps.upload_end_s, work.upload_bytes, (done == PHASES) & (logged < PHASES))
    if stamps.lost is not None:
        add(Event.DROPPED, stamps.upload_end_s, done.astype(np.float64), stamps.lost)
    add(Event.LATE, np.full(len(trips), now_s), done.astype(np.float64), moves.late)
