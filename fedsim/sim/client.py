"""The client processes: wait, download, compute, upload, then idle until the round closes.

All durations of a round are computed at once beforehand; each client's process plays its own (`Itinerary`) as SimPy
timeouts and writes down the clock at each change. What the close of the round interrupts ends at that moment.

This is the general way to play a round, for protocols in which clients meet, and the measure of `fedsim.sim.rounds`.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import simpy

from fedsim.sim.timeline import PHASES, Timeline, Trips
from fedsim.sim.trace import Event, Trace


class Itinerary(NamedTuple):
    """What one client is about to do in a round.

    Attributes:
        fits_memory: False: the client downloads, finds that the job does not fit, and stops.
    """

    client: int
    download_s: float
    compute_s: float
    upload_s: float
    download_bytes: float
    upload_bytes: float
    peak_memory_bytes: float
    fits_memory: bool


class RoundBoard:
    """What the processes of one round write down, by slot (the client's position among the participants).

    Attributes:
        download_start_s, download_end_s, compute_end_s, upload_end_s: the clock at each change; NaN until it happens.
        released_s: the clock when the client learned that the round had closed.
        phases_done: completed phases out of `PHASES`; an update has arrived when all are.
        enough: fires when as many updates as the server waits for have arrived, or nobody is left at work.
        closed: fires when the server closes the round.
    """

    def __init__(self, env: simpy.Environment, participants: int, quota: int) -> None:
        self.download_start_s = [math.nan] * participants
        self.download_end_s = [math.nan] * participants
        self.compute_end_s = [math.nan] * participants
        self.upload_end_s = [math.nan] * participants
        self.released_s = [math.nan] * participants
        self.phases_done = [0] * participants
        self.at_work = [True] * participants
        self.arrived = 0
        self.enough = env.event()
        self.closed = env.event()
        self._working = participants
        self._quota = quota

    def finish(self, slot: int, *, arrived: bool) -> None:
        """A client's own part of the round is over."""
        self.at_work[slot] = False
        self._working -= 1
        self.arrived += arrived
        if (self.arrived >= self._quota or self._working == 0) and not self.enough.triggered:
            self.enough.succeed()

    def cut(self, slot: int, now_s: float) -> None:
        """The round closed while the client was at work: what it had not ended ends now."""
        self.at_work[slot] = False
        for stamps in (self.download_start_s, self.download_end_s, self.compute_end_s, self.upload_end_s):
            if math.isnan(stamps[slot]):
                stamps[slot] = now_s


def client_process(
    env: simpy.Environment, slot: int, round_index: int, trip: Itinerary, board: RoundBoard, trace: Trace
) -> Generator[simpy.Event, Any, None]:
    """Play one client's round. Nothing makes a client wait yet: its download starts at once."""
    client, now_s = trip.client, env.now
    board.download_start_s[slot] = now_s
    trace.add(now_s, round_index, client, Event.DOWNLOAD_START, trip.download_bytes)
    try:
        yield env.timeout(trip.download_s)
        now_s = env.now
        board.download_end_s[slot] = now_s
        board.phases_done[slot] = 1
        trace.add(now_s, round_index, client, Event.DOWNLOAD_END, trip.download_bytes)
        if trip.fits_memory:
            yield env.timeout(trip.compute_s)
            now_s = env.now
            board.compute_end_s[slot] = now_s
            board.phases_done[slot] = 2
            trace.add(now_s, round_index, client, Event.COMPUTE_END, trip.compute_s)
            yield env.timeout(trip.upload_s)
            now_s = env.now
            board.upload_end_s[slot] = now_s
            board.phases_done[slot] = PHASES
            trace.add(now_s, round_index, client, Event.UPLOAD_END, trip.upload_bytes)
        else:
            board.compute_end_s[slot] = board.upload_end_s[slot] = now_s
            trace.add(now_s, round_index, client, Event.OUT_OF_MEMORY, trip.peak_memory_bytes)
        board.finish(slot, arrived=trip.fits_memory)
        yield board.closed
    except simpy.Interrupt:
        board.cut(slot, env.now)
        trace.add(env.now, round_index, client, Event.LATE, board.phases_done[slot])
    board.released_s[slot] = env.now


class ClientProcesses:
    """Implements `fedsim.sim.timeline.Player` with a SimPy process per participant.

    Args:
        start_s: the simulated clock at the start of the run.
    """

    def __init__(self, start_s: float) -> None:
        self._env = simpy.Environment(initial_time=start_s)

    def play(self, trips: Trips, start_s: float, quota: int, deadline_s: float | None, trace: Trace) -> Timeline:
        """Play one round; `start_s` is where the last one ended."""
        if self._env.now != start_s:
            raise RuntimeError(
                f"round {trips.round_index} opens at {start_s} s, but the clock stands at {self._env.now}"
            )
        board = RoundBoard(self._env, len(trips.clients), quota)
        self._env.run(until=self._env.process(self._round(trips, board, deadline_s, trace)))
        stamps = (board.download_start_s, board.download_end_s, board.compute_end_s, board.upload_end_s)
        download_start_s, download_end_s, compute_end_s, upload_end_s = (np.array(column) for column in stamps)
        return Timeline(
            start_s=start_s,
            end_s=float(self._env.now),
            download_start_s=download_start_s,
            download_end_s=download_end_s,
            compute_end_s=compute_end_s,
            upload_end_s=upload_end_s,
            phases_done=np.array(board.phases_done, dtype=np.int64),
        )

    def _round(
        self, trips: Trips, board: RoundBoard, deadline_s: float | None, trace: Trace
    ) -> Generator[simpy.Event, Any, None]:
        """The server's side of a round."""
        env = self._env
        processes = [
            env.process(client_process(env, slot, trips.round_index, trip, board, trace))
            for slot, trip in enumerate(_itineraries(trips))
        ]
        if deadline_s is None:
            yield board.enough
        else:
            yield board.enough | env.timeout(deadline_s)
        # Let what else ends at this very moment end first, so that ties do not depend on the order of processes; as
        # often as a client may have phases that take no time.
        for _ in range(PHASES):
            yield env.timeout(0)
        end_s = float(env.now)
        for process, at_work in zip(processes, board.at_work, strict=True):
            if at_work:
                process.interrupt()
        board.closed.succeed()
        yield env.timeout(0)
        if any(released != end_s for released in board.released_s):
            raise RuntimeError(f"a client of round {trips.round_index} was not released when the round closed")


def _itineraries(trips: Trips) -> list[Itinerary]:
    columns = (
        trips.clients,
        trips.download_s,
        trips.compute_s,
        trips.upload_s,
        trips.download_bytes,
        trips.upload_bytes,
        trips.peak_memory_bytes,
        trips.fits_memory,
    )
    return [Itinerary(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
