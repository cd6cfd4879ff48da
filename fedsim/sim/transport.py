"""What moves the bytes of flights: the contract, and links that every client has to itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from simpy.events import Event, Timeout

from fedsim.fleet.bandwidth import Curve
from fedsim.sim.flight_clock import DOWNLOADING, SimClock, Trip

Done = Callable[[Event], None]
"""Called with an event whose value is the trip."""


class Transport(Protocol):
    """Moves the bytes of flights, down and up."""

    def download(self, trip: Trip, done: Done) -> None:
        """Start a download now; `done` is called when the last byte has arrived."""

    def upload(self, trip: Trip, done: Done) -> None:
        """Start an upload now."""

    def stop(self, trip: Trip) -> float:
        """End a transfer that is under way; the share of it that was moved, NaN: pro rata of its planned time."""

    def state(self, trips: list[Trip]) -> dict[str, np.ndarray]:
        """What must be known of transfers under way beside each trip's own columns, as arrays."""

    def restore(self, trips: list[Trip], done: Mapping[int, Done], state: dict[str, np.ndarray]) -> None:
        """Go on with the transfers of `trips` (those that download or upload).

        Args:
            done: what is called at the end, by phase.
        """


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

    def stop(self, trip: Trip) -> float:
        """Its event finds the trip gone."""
        return math.nan

    def state(self, trips: list[Trip]) -> dict[str, np.ndarray]:
        """Nothing: when each transfer ends is the trip's own."""
        return {}

    def restore(self, trips: list[Trip], done: Mapping[int, Done], state: dict[str, np.ndarray]) -> None:
        """Each transfer ends when it would have."""
        for trip in trips:
            event = Event(self._clock)
            event._ok, event._value = True, trip
            event.callbacks.append(done[trip.phase])  # type: ignore[union-attr]
            self._clock.schedule_at(event, trip.due_s)


class VaryingLinks(PrivateLinks):
    """Links to themselves whose bandwidth follows a curve. What a cut transfer has moved is counted pro rata."""

    def __init__(self, clock: SimClock, curve: Curve) -> None:
        super().__init__(clock)
        self._curve = curve

    def download(self, trip: Trip, done: Done) -> None:
        """Start a download now."""
        self._start(trip, trip.download_s, done, up=False)

    def upload(self, trip: Trip, done: Done) -> None:
        """Start an upload now."""
        self._start(trip, trip.upload_s, done, up=True)

    def stop(self, trip: Trip) -> float:
        """Pro rata of the time behind the latency."""
        began_s = (trip.start_s if trip.phase == DOWNLOADING else trip.compute_end_s) + trip.latency_s
        whole_s = trip.due_s - began_s
        return min(1.0, max(0.0, (self._clock._now - began_s) / whole_s)) if whole_s > 0 else 0.0

    def _start(self, trip: Trip, mean_s: float, done: Done, *, up: bool) -> None:
        now_s = self._clock._now
        begins_s = now_s + trip.latency_s
        takes_s = self._curve.seconds(trip.client, begins_s, mean_s - trip.latency_s, up=up)
        event = Timeout(self._clock, trip.latency_s + takes_s, trip)
        event.callbacks.append(done)  # type: ignore[union-attr]
        trip.due_s = now_s + (trip.latency_s + takes_s)
