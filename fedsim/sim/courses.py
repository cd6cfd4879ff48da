"""What happens to flights under way: download, compute, upload, and what may end them before their time."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from simpy.events import Event, Timeout

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
from fedsim.sim.shared_links import SharedLinks
from fedsim.sim.transport import PrivateLinks, Transport, VaryingLinks


class Courses:
    """The part of `fedsim.sim.processes.ProcessPlayer` that the event queue calls."""

    def __init__(self, clients: int, now_s: float, fleet: Fleet | None = None) -> None:
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
        self._at_work: dict[int, Trip] = {}
        self._arrived: list[Trip] = []
        self._stopped: list[Trip] = []
        self._touched: list[Trip] = []  # of which something happened since the last merge
        self._block = 0
        self._left = 0  # arrivals until the server looks
        self._awake = False
        self._wake_due = False
        self._timer_s = math.nan

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


def transport_of(clock: SimClock, dynamics: Dynamics) -> Transport:
    """What moves the bytes in a fleet: shared, varying or constant links."""
    if dynamics.sharing is not None:
        return SharedLinks(clock, dynamics.sharing, dynamics.curve)
    return PrivateLinks(clock) if dynamics.curve is None else VaryingLinks(clock, dynamics.curve)
