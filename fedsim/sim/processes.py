"""The event loop of record: every flight plays its phases as SimPy events, and may meet others on the way.

A flight needs no generator: each phase is one SimPy timeout, and what follows it is a callback. Downloads and uploads
go through a `Transport`, which is given bytes and says when they have moved, so that clients can contend for a link;
computing takes the seconds of the flight's own device. The server is woken once at each moment at which it has to look
(`Player.advance`), behind everything else that happens at that very moment, so that ties do not depend on the order of
events. Flights that are given up leave their event in the queue; it finds them gone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from simpy.events import Event, Timeout

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.fleet.dynamics import Dynamics
from fedsim.fleet.fleet import Fleet
from fedsim.sim.computing import Computing
from fedsim.sim.flight_clock import (
    ARRIVED,
    BEHIND_ALL,
    BEHIND_WORK,
    COMPUTING,
    DOWNLOADING,
    STOPPED,
    UPLOADING,
    SimClock,
    Trip,
)
from fedsim.sim.mid_flight import pack_trips, unpack_trips
from fedsim.sim.shared_links import SharedLinks
from fedsim.sim.transport import PrivateLinks, Transport, VaryingLinks
from fedsim.sim.trips import Landed, Moves, Stamps, Trips


class ProcessPlayer:
    """Implements `fedsim.sim.trips.Player` on SimPy's event queue.

    Args:
        clients: of the fleet.
        now_s: the simulated clock at the start.
        held: whether a client stays with the server until its update is merged.
        fleet: whose clients may meet, drop or change; None: they do not.
    """

    def __init__(self, clients: int, now_s: float, *, held: bool, fleet: Fleet | None = None) -> None:
        self.flying = self.waiting = 0
        self.timer_over = False
        self.idle: NDArray[np.bool_] = np.ones(clients, dtype=bool)
        self._clock = SimClock(initial_time=now_s)
        dynamics = None if fleet is None or fleet.dynamics is None or not fleet.dynamics.said else fleet.dynamics
        self._moving = dynamics is not None
        self._transport: Transport = PrivateLinks(self._clock)
        self._computing: Computing | None = None
        if fleet is not None and dynamics is not None:
            self._transport = transport_of(self._clock, dynamics)
            if dynamics.heat is not None or dynamics.mode_period_s is not None:
                self._computing = Computing(fleet)
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
        moving = self._moving
        for place, (client, download_s, compute_s, upload_s, fits) in enumerate(_rows(trips)):
            trip = Trip(trips, place, client, download_s, compute_s, upload_s, fits, now_s, block)
            if moving:
                self._prepare(trip)
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
                self._clock.schedule_at(timer, max(timer_s, self._clock.now), BEHIND_ALL)
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
            self._halt(trip)
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
            late=np.array([trip.gone and not trip.lost for trip in moves_of], dtype=bool),
        )
        for trip in touched:
            trip.logged = trip.phases_done
        return Landed(trips, stamps, moves)

    # -- callbacks ----------------------------------------------------------------------------------------------------

    def _downloaded(self, event: Event) -> None:
        trip: Trip = event._value
        if trip.gone:
            return
        if trip.drop_phase == DOWNLOADING:
            self._lose(trip, trip.drop_share)
            return
        trip.download_end_s = now_s = self._clock._now
        if trip.block != self._block:
            self._touch(trip)
        if trip.fits_memory:
            trip.phase = COMPUTING
            seconds = trip.compute_s if self._computing is None else self._computing.seconds(trip, now_s)
            computing = Timeout(self._clock, seconds, trip)
            computing.callbacks.append(self._computed)  # type: ignore[union-attr]
            trip.due_s = now_s + seconds
            return
        trip.phase = STOPPED
        trip.compute_end_s = trip.upload_end_s = now_s
        self._stopped.append(trip)
        self._ended(trip)

    def _computed(self, event: Event) -> None:
        trip: Trip = event._value
        if trip.gone:
            return
        if trip.drop_phase == COMPUTING:
            self._lose(trip, math.nan)
            return
        trip.compute_end_s = self._clock._now
        if self._computing is not None:
            self._computing.ended(trip, trip.download_end_s, trip.compute_end_s)
        trip.phase = UPLOADING
        if trip.block != self._block:
            self._touch(trip)
        self._transport.upload(trip, self._uploaded)

    def _uploaded(self, event: Event) -> None:
        trip: Trip = event._value
        if trip.gone:
            return
        if trip.drop_phase == UPLOADING:
            self._lose(trip, trip.drop_share)
            return
        trip.upload_end_s = self._clock._now
        trip.phase = ARRIVED
        if trip.block != self._block:
            self._touch(trip)
        self._arrived.append(trip)
        self.waiting += 1
        self._left -= 1
        self._ended(trip)

    def _prepare(self, trip: Trip) -> None:
        """What will end the flight before its time, and how late."""
        batch, place = trip.batch, trip.place
        trip.latency_s = float(batch.latency_s[place])
        trip.drop_phase, trip.drop_share = int(batch.drop_phase[place]), float(batch.drop_share[place])
        if trip.drop_phase == DOWNLOADING:
            trip.download_s = trip.latency_s + trip.drop_share * (trip.download_s - trip.latency_s)
        elif trip.drop_phase == UPLOADING:
            trip.upload_s = trip.latency_s + trip.drop_share * (trip.upload_s - trip.latency_s)
        elif trip.drop_phase == COMPUTING and self._computing is None:
            trip.compute_s *= trip.drop_share
        off_s = float(batch.off_s[place])
        if off_s < math.inf:
            event = Event(self._clock)
            event._ok, event._value = True, trip
            event.callbacks.append(self._left_off)  # type: ignore[union-attr]
            self._clock.schedule_at(event, off_s, BEHIND_WORK)

    def _left_off(self, event: Event) -> None:
        """A client goes off: what it was doing is lost."""
        trip: Trip = event._value
        if not trip.gone and trip.phase < ARRIVED:
            self._halt(trip)
            self._lose(trip, trip.moved)

    def _lose(self, trip: Trip, moved: float) -> None:
        """The client drops out now."""
        now_s = self._clock._now
        if trip.phase == COMPUTING and not trip.gone and self._computing is not None:
            self._computing.ended(trip, trip.download_end_s, now_s)
        trip.gone = trip.lost = True
        trip.moved = moved
        self._touch(trip)
        if trip.phase == DOWNLOADING:
            trip.download_end_s = now_s
        if trip.phase <= COMPUTING:
            trip.compute_end_s = now_s
        trip.upload_end_s = now_s
        self._stopped.append(trip)
        self._ended(trip)

    def _halt(self, trip: Trip) -> None:
        """Cut what a flight is doing."""
        if trip.phase == COMPUTING:
            if self._computing is not None:
                self._computing.ended(trip, trip.download_end_s, self._clock._now)
        elif self._moving:
            trip.moved = self._transport.stop(trip)
            if trip.phase == trip.drop_phase:
                trip.moved *= trip.drop_share
        trip.gone = True

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
            self._clock.schedule_at(wake, self._clock.now, BEHIND_ALL)

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
            lost=np.array([trip.lost for trip in trips], dtype=bool) if self._moving else None,
            moved=np.array([trip.moved for trip in trips], dtype=np.float64) if self._moving else None,
        )

    # -- checkpoint ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, np.ndarray]:
        """Flights at work and updates that wait, as arrays; empty where there are none."""
        trips = sorted([*self._at_work.values(), *self._arrived], key=_by_client)
        lasting = self._computing.state() if self._computing is not None else {}
        if not trips:
            return lasting
        stamps = ("start_s", "download_end_s", "compute_end_s", "upload_end_s", "due_s")
        columns: dict[str, FloatArray] = {
            name: np.array([getattr(trip, name) for trip in trips], dtype=np.float64) for name in stamps
        }
        counts = {
            name: np.array([getattr(trip, name) for trip in trips], dtype=np.int64) for name in ("phase", "logged")
        }
        return {**pack_trips(_columns(trips)), **columns, **counts, **self._transport.state(trips), **lasting}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Rebuild the event queue from what `state` gave."""
        if not state:
            return
        if self._computing is not None:
            self._computing.restore(state)
        if "phase" not in state:
            return
        batch = unpack_trips(state)
        done = {DOWNLOADING: self._downloaded, UPLOADING: self._uploaded}
        moving: list[Trip] = []
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
            if self._moving:
                self._prepare(trip)
            if trip.phase != COMPUTING:
                moving.append(trip)
                continue
            event = Event(self._clock)
            event._ok, event._value = True, trip
            event.callbacks.append(self._computed)  # type: ignore[union-attr]
            self._clock.schedule_at(event, trip.due_s)
        self._transport.restore(moving, done, state)


def transport_of(clock: SimClock, dynamics: Dynamics) -> Transport:
    """What moves the bytes in a fleet: shared, varying or constant links."""
    if dynamics.sharing is not None:
        return SharedLinks(clock, dynamics.sharing, dynamics.curve)
    return PrivateLinks(clock) if dynamics.curve is None else VaryingLinks(clock, dynamics.curve)


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
