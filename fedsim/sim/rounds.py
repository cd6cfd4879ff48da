"""A synchronous round played in arrays: no process per client.

In this protocol clients do not meet: each one's times are sums of its own durations, and the close of the round follows
from their order. The sums are taken in the order in which the client processes of `fedsim.sim.client` take them, so
that both give the same numbers to the last bit; a test holds them against each other.
"""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import FloatArray
from fedsim.sim.timeline import PHASES, Timeline, Trips
from fedsim.sim.trace import Event, Trace


class ArrayRounds:
    """Implements `fedsim.sim.timeline.Player` for all participants at once."""

    def play(self, trips: Trips, start_s: float, quota: int, deadline_s: float | None, trace: Trace) -> Timeline:
        """Play one round."""
        fits = trips.fits_memory
        download_end_s = start_s + trips.download_s
        compute_end_s = np.where(fits, download_end_s + trips.compute_s, download_end_s)
        upload_end_s = np.where(fits, compute_end_s + trips.upload_s, download_end_s)
        end_s = _close_s(upload_end_s, trips, start_s, quota, deadline_s)
        done = (download_end_s <= end_s, fits & (compute_end_s <= end_s), fits & (upload_end_s <= end_s))
        timeline = Timeline(
            start_s=start_s,
            end_s=end_s,
            download_start_s=np.full(len(fits), start_s),
            download_end_s=np.minimum(download_end_s, end_s),
            compute_end_s=np.minimum(compute_end_s, end_s),
            upload_end_s=np.minimum(upload_end_s, end_s),
            phases_done=np.sum(done, axis=0, dtype=np.int64),
        )
        _record(trips, timeline, trace)
        return timeline


def _close_s(upload_end_s: FloatArray, trips: Trips, start_s: float, quota: int, deadline_s: float | None) -> float:
    """When the round closes: with the quota-th arrival, with the last client at work, or at the deadline."""
    arrivals = upload_end_s[trips.fits_memory]
    if quota < len(arrivals):
        end_s = float(np.partition(arrivals, quota - 1)[quota - 1])
    else:
        end_s = float(np.max(arrivals if quota == len(arrivals) else upload_end_s))
    return end_s if deadline_s is None else min(end_s, start_s + deadline_s)


def _record(trips: Trips, timeline: Timeline, trace: Trace) -> None:
    """The records that the client processes would write."""
    fits, phases_done = trips.fits_memory, timeline.phases_done
    downloaded = phases_done >= 1
    stopped = downloaded & ~fits
    late = (phases_done < PHASES) & ~stopped

    def add(event: Event, times_s: FloatArray, values: FloatArray, mask: np.ndarray) -> None:
        everyone = bool(mask.all())
        rows = (times_s, trips.clients, values) if everyone else (times_s[mask], trips.clients[mask], values[mask])
        trace.add_many(rows[0], trips.round_index, rows[1], event, rows[2])

    trace.add_many(
        timeline.download_start_s, trips.round_index, trips.clients, Event.DOWNLOAD_START, trips.download_bytes
    )
    add(Event.DOWNLOAD_END, timeline.download_end_s, trips.download_bytes, downloaded)
    add(Event.OUT_OF_MEMORY, timeline.download_end_s, trips.peak_memory_bytes, stopped)
    add(Event.COMPUTE_END, timeline.compute_end_s, trips.compute_s, phases_done >= 2)
    add(Event.UPLOAD_END, timeline.upload_end_s, trips.upload_bytes, phases_done == PHASES)
    add(Event.LATE, np.full(len(fits), timeline.end_s), phases_done.astype(np.float64), late)
