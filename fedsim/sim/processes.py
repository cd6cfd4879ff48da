"""The event loop of record: every flight plays its phases as SimPy events, and may meet others on the way.

A flight needs no generator: each phase is one SimPy timeout, and what follows it is a callback. Downloads and uploads
go through a `Transport`, which is given bytes and says when they have moved, so that clients can contend for a link;
computing takes the seconds of the flight's own device. The server is woken once at each moment at which it has to look
(`Player.advance`), behind everything else that happens at that very moment, so that ties do not depend on the order of
events. Flights that are given up leave their event in the queue; it finds them gone.
"""

from __future__ import annotations

import math

import numpy as np
from simpy.events import Event

from fedsim.contracts.common import IntArray
from fedsim.sim.courses import Courses
from fedsim.sim.flight_clock import ARRIVED, BEHIND_ALL, COMPUTING, DOWNLOADING, UPLOADING, Trip
from fedsim.sim.flight_columns import by_arrival, by_client, by_start, columns_of, packed, rows_of, stamps_of, unpacked
from fedsim.sim.trips import Landed, Moves, Trips


class ProcessPlayer(Courses):
    """Implements `fedsim.sim.trips.Player` on SimPy's event queue.

    Args:
        clients: of the fleet.
        now_s: the simulated clock at the start.
        fleet: whose clients may meet, drop or change; None: they do not.
    """

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
        for place, (client, download_s, compute_s, upload_s, fits) in enumerate(rows_of(trips)):
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

    @property
    def first_left_s(self) -> float | None:
        """When the flight at work left that left first."""
        return next((trip.start_s for trip in self._at_work.values()), None)

    def at_work_for(self, seconds: float) -> IntArray:
        """Clients whose flights have been at work for so long, ascending."""
        late, now_s = [], self._clock.now
        for client, trip in self._at_work.items():
            if trip.start_s + seconds > now_s:
                break  # they are in the order of dispatch
            late.append(client)
        return np.array(sorted(late), dtype=np.int64)

    def set_aside(self, version: int) -> None:
        """Updates that wait and started from a version before `version` will end with the next merge, unmerged."""
        old = [trip for trip in self._arrived if trip.batch.flights.version[trip.place] < version]
        if old:
            self._stopped += old
            self._arrived = [trip for trip in self._arrived if trip.batch.flights.version[trip.place] >= version]
            self.waiting = len(self._arrived)

    def land(self, merged: int, given_up: IntArray | None) -> Landed:
        """End flights; what is given up is cut now."""
        self._arrived.sort(key=by_arrival)
        landed, self._arrived = self._arrived[:merged], self._arrived[merged:]
        landed += self._stopped
        late = list(self._at_work) if given_up is None else given_up.tolist()
        for client in late:
            trip = self._at_work.pop(client)
            self._halt(trip)
            self._touch(trip)
            landed.append(trip)
        self._stopped, self.flying, self.waiting = [], len(self._at_work), len(self._arrived)
        landed.sort(key=by_client)
        touched, self._touched = self._touched, []
        self._block += 1
        self._timer_s, self.timer_over = math.nan, False
        trips, stamps = columns_of(landed), stamps_of(landed, self._clock.now, moving=self._moving)
        self.idle[trips.flights.clients] = True
        if len(touched) == len(landed) and all(trip.gone or trip.phase >= ARRIVED for trip in touched):
            moves_of, moving, moved = landed, trips, stamps
        else:
            # None where all that lands now moved before the last merge: updates that arrived at one moment.
            moving = columns_of(touched) if touched else trips.take(np.empty(0, dtype=np.int64))
            moves_of, moved = touched, stamps_of(touched, self._clock.now, moving=self._moving)
        moves = Moves(
            moving,
            moved,
            phases_logged=np.array([trip.logged for trip in moves_of], dtype=np.int64),
            late=np.array([trip.gone and not trip.lost for trip in moves_of], dtype=bool),
        )
        for trip in touched:
            trip.logged = trip.phases_done
        return Landed(trips, stamps, moves)

    # -- checkpoint ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, np.ndarray]:
        """Flights at work and updates that wait, as arrays; empty where there are none."""
        trips = sorted([*self._at_work.values(), *self._arrived], key=by_client)
        lasting = self._computing.state() if self._computing is not None else {}
        if not trips:
            return lasting
        return {**packed(trips), **self._transport.state(trips), **lasting}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Rebuild the event queue from what `state` gave."""
        if not state:
            return
        if self._computing is not None:
            self._computing.restore(state)
        if "phase" not in state:
            return
        done = {DOWNLOADING: self._downloaded, UPLOADING: self._uploaded}
        moving: list[Trip] = []
        trips = unpacked(state)
        at_work = sorted((trip for trip in trips if trip.phase < ARRIVED), key=by_start)
        self._at_work = {trip.client: trip for trip in at_work}  # in the order of dispatch
        for trip in trips:
            self.idle[trip.client] = False
            if trip.phase == ARRIVED:
                self._arrived.append(trip)
                self.waiting += 1
                continue
            self.flying += 1
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
