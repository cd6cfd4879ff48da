"""Flights played in arrays: no event per phase.

Where clients do not meet (each has its link to itself, nobody drops out) a flight's times are sums of its own
durations. The sums are taken in the order in which the event loop of `fedsim.sim.processes` takes them, so that both
give the same numbers to the last bit; a test holds them against each other. One dispatch at a time is under way.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.sim.trips import PHASES, Landed, Moves, Stamps, Trips


class ArrayPlayer:
    """Implements `fedsim.sim.trips.Player` for all flights of a dispatch at once.

    Args:
        clients: of the fleet.
        now_s: the simulated clock at the start.
    """

    def __init__(self, clients: int, now_s: float) -> None:
        self._now_s = now_s
        self.flying = self.waiting = self.stopped = 0
        self.timer_over = False
        self.idle: NDArray[np.bool_] = np.ones(clients, dtype=bool)
        self._trips: Trips | None = None
        self._start_s = now_s
        self._ends_s: tuple[FloatArray, FloatArray, FloatArray] = (np.empty(0),) * 3

    @property
    def now_s(self) -> float:
        """The simulated clock."""
        return self._now_s

    def launch(self, trips: Trips) -> None:
        """Send flights off now; nothing else may be under way."""
        if self._trips is not None:
            raise RuntimeError("flights played in arrays leave together; others are under way")
        fits, self._start_s, self._trips = trips.fits_memory, self._now_s, trips
        download_end_s = self._now_s + trips.download_s
        compute_end_s = np.where(fits, download_end_s + trips.compute_s, download_end_s)
        upload_end_s = np.where(fits, compute_end_s + trips.upload_s, download_end_s)
        self._ends_s = (download_end_s, compute_end_s, upload_end_s)
        self.flying, self.waiting = len(trips), 0
        self.idle[trips.flights.clients] = False

    def advance(self, patience: int, timer_s: float | None) -> bool:
        """Play on to the next moment at which the server looks."""
        if self._trips is None or not self.flying:
            self.timer_over = timer_s is not None
            self._now_s = self._now_s if timer_s is None else max(self._now_s, timer_s)
            return timer_s is not None
        fits, end_s = self._trips.fits_memory, self._ends_s[2]
        arrivals, wanted = end_s[fits], self.waiting + patience
        if wanted < len(arrivals):
            next_s = float(np.partition(arrivals, wanted - 1)[wanted - 1])
        else:
            next_s = float(np.max(arrivals if wanted == len(arrivals) else end_s))
        self._now_s = next_s if timer_s is None else min(next_s, timer_s)
        self.timer_over = timer_s is not None and timer_s <= next_s
        ended = end_s <= self._now_s
        self.flying = int(np.count_nonzero(~ended))
        self.waiting = int(np.count_nonzero(ended & fits))
        self.stopped = int(np.count_nonzero(ended & ~fits))
        return True

    @property
    def first_left_s(self) -> float | None:
        """When all of them left."""
        return self._start_s if self.flying else None

    def at_work_for(self, seconds: float) -> IntArray:
        """All that are at work, once they have been for so long."""
        if self._trips is None or self._start_s + seconds > self._now_s:
            return np.empty(0, dtype=np.int64)
        late: IntArray = self._trips.flights.clients[self._ends_s[2] > self._now_s]
        return late

    def set_aside(self, version: int) -> None:
        """None is old: what leaves together is merged together."""

    def land(self, merged: int, given_up: IntArray | None) -> Landed:
        """End all flights: those that are not at their end are given up."""
        trips = self._trips
        if trips is None or given_up is not None or merged != self.waiting:
            raise RuntimeError("flights played in arrays end together")
        now_s, fits = self._now_s, trips.fits_memory
        down_s, compute_s, up_s = self._ends_s
        done = (down_s <= now_s, fits & (compute_s <= now_s), fits & (up_s <= now_s))
        stamps = Stamps(
            download_start_s=np.full(len(trips), self._start_s),
            download_end_s=np.minimum(down_s, now_s),
            compute_end_s=np.minimum(compute_s, now_s),
            upload_end_s=np.minimum(up_s, now_s),
            phases_done=np.sum(done, axis=0, dtype=np.int64),
        )
        late = (stamps.phases_done < PHASES) & (fits | (stamps.phases_done == 0))
        moves = Moves(trips, stamps, np.full(len(trips), -1), late)
        self._trips, self.flying, self.waiting, self.stopped, self.timer_over = None, 0, 0, 0, False
        self.idle[trips.flights.clients] = True
        return Landed(trips, stamps, moves)

    def state(self) -> dict[str, np.ndarray]:
        """Nothing is under way between two dispatches."""
        return {}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Nothing to take.

        Raises:
            RuntimeError: flights were under way, which only the event loop can go on with.
        """
        if state:
            raise RuntimeError("flights were under way: only the event loop can go on with them")
