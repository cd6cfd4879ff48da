"""The event loop of record: every flight plays its phases as SimPy events, and may meet others on the way.

A flight needs no generator: each phase is one SimPy timeout, and what follows it is a callback. Downloads and uploads
go through a `Transport`, which is given bytes and says when they have moved, so that clients can contend for a link;
computing takes the seconds of the flight's own device. The server is woken once at each moment at which it has to look
(`Player.advance`), behind everything else that happens at that very moment, so that ties do not depend on the order of
events. Flights that are given up leave their event in the queue; it finds them gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from heapq import heappush
from typing import Protocol

import numpy as np
import simpy
from numpy.typing import NDArray
from simpy.events import NORMAL, Event, Timeout

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.sim.mid_flight import pack_trips, unpack_trips
from fedsim.sim.trips import Landed, Moves, Stamps, Trips

DOWNLOADING, COMPUTING, UPLOADING, ARRIVED, STOPPED = range(5)
"""Where a flight is; the first four are its completed phases, too. `STOPPED`: the job did not fit in memory."""

_BEHIND_ALL = NORMAL + 1
"""Priority of the server's wake: after whatever else happens at that moment."""


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
        "due_s",
        "fits_memory",
        "gone",
        "logged",
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

    @property
    def phases_done(self) -> int:
        """Completed phases."""
        return 1 if self.phase == STOPPED else self.phase


Done = Callable[[Event], None]
"""Called with an event whose value is the trip."""


class Transport(Protocol):
    """Moves the bytes of flights, down and up."""

    def download(self, trip: Trip, done: Done) -> None:
        """Start a download now; `done` is called when the last byte has arrived."""

    def upload(self, trip: Trip, done: Done) -> None:
        """Start an upload now."""


class PrivateLinks:
    """Every client has its link to itself: a transfer takes as long as it does alone."""

    def __init__(self, clock: SimClock) -> None:
        self._clock = clock

    def download(self, trip: Trip, done: Done) -> None:
        """Start a download now."""
        event = Timeout(self._clock, trip.download_s, trip)
        event.callbacks.append(done)  # type: ignore[union-attr]
        trip.due_s = self._clock._now + trip.download_s

    def upload(self, trip: Trip, done: Done) -> None:
        """Start an upload now."""
        event = Timeout(self._clock, trip.upload_s, trip)
        event.callbacks.append(done)  # type: ignore[union-attr]
        trip.due_s = self._clock._now + trip.upload_s


class ProcessPlayer:
    """Implements `fedsim.sim.trips.Player` on SimPy's event queue.

    Args:
        clients: of the fleet.
        now_s: the simulated clock at the start.
        held: whether a client stays with the server until its update is merged.
    """

    def __init__(self, clients: int, now_s: float, *, held: bool) -> None:
        self.flying = self.waiting = 0
        self.timer_over = False
        self.idle: NDArray[np.bool_] = np.ones(clients, dtype=bool)
        self._clock = SimClock(initial_time=now_s)
        self._transport: Transport = PrivateLinks(self._clock)
        self._held = held
        self._at_work: dict[int, Trip] = {}
        self._arrived: list[Trip] = []
        self._stopped: list[Trip] = []
        self._touched: list[Trip] = []  # of which something happened since the last merge
        self._block = 0
        self._left = 0  # arrivals until the server looks
        self._awake = False
        self._wake_due = False
        self._timer_s = math.nan

    @property
    def stopped(self) -> int:
        """Flights that ended without an update since the last merge."""
        return len(self._stopped)

    @property
    def now_s(self) -> float:
        """The simulated clock."""
        return float(self._clock.now)

    # -- what the server asks -----------------------------------------------------------------------------------------

    def launch(self, trips: Trips) -> None:
        """Send flights off now."""
        now_s, block, download, done = self._clock.now, self._block, self._transport.download, self._downloaded
        for place, (client, download_s, compute_s, upload_s, fits) in enumerate(_rows(trips)):
            trip = Trip(trips, place, client, download_s, compute_s, upload_s, fits, now_s, block)
            self._at_work[client] = trip
            self._touched.append(trip)
            download(trip, done)
        self.flying += len(trips)
        self.idle[trips.flights.clients] = False

    def advance(self, patience: int, timer_s: float | None) -> bool:
        """Play on to the next moment at which the server looks."""
        if timer_s is not None:
            if timer_s != self._timer_s:
                self._timer_s = timer_s
                timer = Event(self._clock)
                timer._ok, timer._value = True, timer_s
                timer.callbacks.append(self._timer)  # type: ignore[union-attr]
                self._clock.schedule_at(timer, max(timer_s, self._clock.now), _BEHIND_ALL)
        elif not self.flying:
            return False
        self._left, self._awake, self.timer_over, step = patience, False, False, self._clock.step
        while not self._awake:
            step()
        return True

    def land(self, merged: int, given_up: IntArray | None) -> Landed:
        """End flights; what is given up is cut now."""
        self._arrived.sort(key=_by_arrival)
        landed, self._arrived = self._arrived[:merged], self._arrived[merged:]
        landed += self._stopped
        late = list(self._at_work) if given_up is None else given_up.tolist()
        for client in late:
            trip = self._at_work.pop(client)
            trip.gone = True
            self._touch(trip)
            landed.append(trip)
        self._stopped, self.flying, self.waiting = [], len(self._at_work), len(self._arrived)
        landed.sort(key=_by_client)
        touched, self._touched = self._touched, []
        self._block += 1
        self._timer_s, self.timer_over = math.nan, False
        trips, stamps = _columns(landed), self._stamps(landed)
        if self._held or late:
            self.idle[trips.flights.clients] = True
        if len(touched) == len(landed) and all(trip.gone or trip.phase >= ARRIVED for trip in touched):
            moves_of, moving, moved = landed, trips, stamps
        else:
            # None where all that lands now moved before the last merge: updates that arrived at one moment.
            moving = _columns(touched) if touched else trips.take(np.empty(0, dtype=np.int64))
            moves_of, moved = touched, self._stamps(touched)
        moves = Moves(
            moving,
            moved,
            phases_logged=np.array([trip.logged for trip in moves_of], dtype=np.int64),
            late=np.array([trip.gone for trip in moves_of], dtype=bool),
        )
        for trip in touched:
            trip.logged = trip.phases_done
        return Landed(trips, stamps, moves)

    # -- callbacks ----------------------------------------------------------------------------------------------------

    def _downloaded(self, event: Event) -> None:
        trip: Trip = event._value
        if trip.gone:
            return
        trip.download_end_s = now_s = self._clock._now
        if trip.block != self._block:
            self._touch(trip)
        if trip.fits_memory:
            trip.phase = COMPUTING
            computing = Timeout(self._clock, trip.compute_s, trip)
            computing.callbacks.append(self._computed)  # type: ignore[union-attr]
            trip.due_s = now_s + trip.compute_s
            return
        trip.phase = STOPPED
        trip.compute_end_s = trip.upload_end_s = now_s
        self._stopped.append(trip)
        self._ended(trip)

    def _computed(self, event: Event) -> None:
        trip: Trip = event._value
        if trip.gone:
            return
        trip.compute_end_s = self._clock._now
        trip.phase = UPLOADING
        if trip.block != self._block:
            self._touch(trip)
        self._transport.upload(trip, self._uploaded)

    def _uploaded(self, event: Event) -> None:
        trip: Trip = event._value
        if trip.gone:
            return
        trip.upload_end_s = self._clock._now
        trip.phase = ARRIVED
        if trip.block != self._block:
            self._touch(trip)
        self._arrived.append(trip)
        self.waiting += 1
        self._left -= 1
        self._ended(trip)

    def _ended(self, trip: Trip) -> None:
        """A client's own work is over: wake the server if it waited for that."""
        del self._at_work[trip.client]
        self.flying -= 1
        if not self._held:
            self.idle[trip.client] = True
        if (self._left <= 0 or not self.flying) and not self._wake_due:
            self._wake_due = True
            wake = Event(self._clock)
            wake._ok, wake._value = True, None
            wake.callbacks.append(self._wake)  # type: ignore[union-attr]
            self._clock.schedule_at(wake, self._clock.now, _BEHIND_ALL)

    def _wake(self, event: Event) -> None:
        self._wake_due, self._awake = False, True

    def _timer(self, event: Event) -> None:
        if event._value == self._timer_s:  # not one that a merge has made void
            self._timer_s, self._awake, self.timer_over = math.nan, True, True

    def _touch(self, trip: Trip) -> None:
        if trip.block != self._block:
            trip.block = self._block
            self._touched.append(trip)

    def _stamps(self, trips: list[Trip]) -> Stamps:
        now_s = self._clock.now
        ends = (
            [trip.download_end_s for trip in trips],
            [trip.compute_end_s for trip in trips],
            [trip.upload_end_s for trip in trips],
        )
        download_end_s, compute_end_s, upload_end_s = (np.array(column, dtype=np.float64) for column in ends)
        for column in (download_end_s, compute_end_s, upload_end_s):
            column[np.isnan(column)] = now_s
        return Stamps(
            download_start_s=np.array([trip.start_s for trip in trips], dtype=np.float64),
            download_end_s=download_end_s,
            compute_end_s=compute_end_s,
            upload_end_s=upload_end_s,
            phases_done=np.array([trip.phases_done for trip in trips], dtype=np.int64),
        )

    # -- checkpoint ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, np.ndarray]:
        """Flights at work and updates that wait, as arrays; empty where there are none."""
        trips = sorted([*self._at_work.values(), *self._arrived], key=_by_client)
        if not trips:
            return {}
        stamps = ("start_s", "download_end_s", "compute_end_s", "upload_end_s", "due_s")
        columns: dict[str, FloatArray] = {
            name: np.array([getattr(trip, name) for trip in trips], dtype=np.float64) for name in stamps
        }
        counts = {
            name: np.array([getattr(trip, name) for trip in trips], dtype=np.int64) for name in ("phase", "logged")
        }
        return {**pack_trips(_columns(trips)), **columns, **counts}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Rebuild the event queue from what `state` gave."""
        if not state:
            return
        batch = unpack_trips(state)
        next_step = {DOWNLOADING: self._downloaded, COMPUTING: self._computed, UPLOADING: self._uploaded}
        for place, (client, download_s, compute_s, upload_s, fits) in enumerate(_rows(batch)):
            start_s = float(state["start_s"][place])
            trip = Trip(batch, place, client, download_s, compute_s, upload_s, fits, start_s, -1)
            for name in ("download_end_s", "compute_end_s", "upload_end_s", "due_s"):
                setattr(trip, name, float(state[name][place]))
            trip.phase, trip.logged = int(state["phase"][place]), int(state["logged"][place])
            if trip.phase == ARRIVED:
                self._arrived.append(trip)
                self.waiting += 1
                if self._held:
                    self.idle[trip.client] = False
                continue
            self._at_work[trip.client] = trip
            self.flying += 1
            self.idle[trip.client] = False
            event = Event(self._clock)
            event._ok, event._value = True, trip
            event.callbacks.append(next_step[trip.phase])  # type: ignore[union-attr]
            self._clock.schedule_at(event, trip.due_s)


def _rows(trips: Trips) -> Iterator[tuple[int, float, float, float, bool]]:
    """Client, seconds down, computing and up, and whether the job fits, of each."""
    return zip(
        trips.flights.clients.tolist(),
        trips.download_s.tolist(),
        trips.compute_s.tolist(),
        trips.upload_s.tolist(),
        trips.fits_memory.tolist(),
        strict=True,
    )


def _by_arrival(trip: Trip) -> tuple[float, int, int]:
    return trip.upload_end_s, trip.client, trip.place


def _by_client(trip: Trip) -> tuple[int, float]:
    return trip.client, trip.start_s


def _columns(trips: list[Trip]) -> Trips:
    """The columns of some flights, in their order."""
    batches = {id(trip.batch): trip.batch for trip in trips}
    if not batches:
        raise RuntimeError("a merge without a flight")
    places = np.array([trip.place for trip in trips], dtype=np.int64)
    if len(batches) == 1:
        (batch,) = batches.values()
        whole = len(places) == len(batch) and bool((places == np.arange(len(batch))).all())
        return batch if whole else batch.take(places)
    offsets, offset = {}, 0
    for key, batch in batches.items():
        offsets[key] = offset
        offset += len(batch)
    starts = np.array([offsets[id(trip.batch)] for trip in trips], dtype=np.int64)
    return Trips.joined(list(batches.values())).take(starts + places)
