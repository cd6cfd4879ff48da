"""SimPy's event queue with events at an absolute time, and one flight on its way through it."""

from __future__ import annotations

import math
from heapq import heappush

import simpy
from simpy.events import NORMAL, Event

from fedsim.sim.trips import NO_DROP, Trips

DOWNLOADING, COMPUTING, UPLOADING, ARRIVED, STOPPED = range(5)
"""Where a flight is; the first four are its completed phases, too. `STOPPED`: the job did not fit in memory."""

BEHIND_WORK, BEHIND_ALL = NORMAL + 1, NORMAL + 2
"""Priorities: what ends work (a client goes off) comes after all work that ends at that very moment, the server's wake
after everything."""


class SimClock(simpy.Environment):
    """SimPy's environment, with events at an absolute time: a resumed phase must end at the very same number."""

    def schedule_at(self, event: Event, time_s: float, priority: int = NORMAL) -> None:
        """Put `event` into the queue at `time_s`, not before the present."""
        heappush(self._queue, (time_s, priority, next(self._eid), event))  # type: ignore[misc]


class Trip:
    """One flight on its way. See `Trips` and `Stamps` for the columns."""

    __slots__ = (
        "batch",
        "block",
        "client",
        "compute_end_s",
        "compute_s",
        "download_end_s",
        "download_s",
        "drop_phase",
        "drop_share",
        "due_s",
        "fits_memory",
        "gone",
        "latency_s",
        "logged",
        "lost",
        "moved",
        "phase",
        "place",
        "start_s",
        "upload_end_s",
        "upload_s",
    )

    def __init__(
        self,
        batch: Trips,
        place: int,
        client: int,
        download_s: float,
        compute_s: float,
        upload_s: float,
        fits_memory: bool,
        start_s: float,
        block: int,
    ) -> None:
        self.batch, self.place, self.client = batch, place, client
        self.download_s, self.compute_s, self.upload_s = download_s, compute_s, upload_s
        self.fits_memory, self.start_s, self.block = fits_memory, start_s, block
        self.download_end_s = self.compute_end_s = self.upload_end_s = math.nan
        self.phase, self.logged = DOWNLOADING, -1
        self.gone = False
        self.due_s = math.nan  # when the present phase ends, where that is known
        self.latency_s, self.drop_phase, self.drop_share = 0.0, NO_DROP, 1.0
        self.lost = False  # the client dropped out; it is gone, too
        self.moved = math.nan  # share of a transfer that was cut, where it is not pro rata of its planned time

    @property
    def phases_done(self) -> int:
        """Completed phases."""
        return 1 if self.phase == STOPPED else self.phase
