"""A round in columns: what each participant is about to do, when it did it, and the report of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsim.contracts.common import FloatArray, IntArray, Outcome
from fedsim.contracts.flights import RoundPlan, RoundReport
from fedsim.cost.device import Rates
from fedsim.errors import ProfileError
from fedsim.fleet.fleet import Fleet
from fedsim.fleet.link import bytes_moved
from fedsim.sim.trace import Trace

PHASES = 3
"""Download, compute, upload."""


@dataclass(frozen=True, eq=False)
class Trips:
    """What the participants are about to do in a round, shape (P,) but for the first.

    Attributes:
        download_s, compute_s, upload_s: how long each phase takes if nothing cuts it.
        fits_memory: False: the client downloads, finds that the job does not fit, and stops.
        rates: of the devices in their modes of this round.
    """

    round_index: int
    clients: IntArray
    download_s: FloatArray
    compute_s: FloatArray
    upload_s: FloatArray
    download_bytes: FloatArray
    upload_bytes: FloatArray
    peak_memory_bytes: FloatArray
    fits_memory: NDArray[np.bool_]
    rates: Rates


@dataclass(frozen=True, eq=False)
class Timeline:
    """When the participants of a round did what, cut at its close, shape (P,) but for the first two.

    Attributes:
        phases_done: completed phases out of `PHASES`, before or at the close.
    """

    start_s: float
    end_s: float
    download_start_s: FloatArray
    download_end_s: FloatArray
    compute_end_s: FloatArray
    upload_end_s: FloatArray
    phases_done: IntArray


class Player(Protocol):
    """Plays one round: the same timeline and the same trace records, however it is done."""

    def play(self, trips: Trips, start_s: float, quota: int, deadline_s: float | None, trace: Trace) -> Timeline:
        """Play from `start_s` until `quota` updates have arrived, the deadline is over or nobody is left at work.

        An update whose upload ends at the very moment of the close has arrived. The participants' records go to
        `trace`; the server's own are not the player's.

        Args:
            deadline_s: seconds after `start_s`; None for no deadline.
        """


def trips_of(fleet: Fleet, plan: RoundPlan) -> Trips:
    """All durations of a round at once.

    Raises:
        ProfileError: a compute time that is not positive and finite, or a transfer time that is negative or not finite.
    """
    clients, round_index, work = plan.clients, plan.round_index, plan.work
    rates = fleet.rates(round_index, clients)
    memory = _column(work.peak_memory_bytes, clients)
    return Trips(
        round_index=round_index,
        clients=clients,
        download_s=_checked("download", fleet.download_seconds(round_index, clients, work.download_bytes), fleet, plan),
        compute_s=_checked("compute", fleet.compute_seconds(round_index, clients, work), fleet, plan),
        upload_s=_checked("upload", fleet.upload_seconds(round_index, clients, work.upload_bytes), fleet, plan),
        download_bytes=_column(work.download_bytes, clients),
        upload_bytes=_column(work.upload_bytes, clients),
        peak_memory_bytes=memory,
        fits_memory=memory <= rates.usable_memory_bytes,
        rates=rates,
    )


def report_of(fleet: Fleet, trips: Trips, timeline: Timeline) -> RoundReport:
    """What the strategy and the records are told of a round.

    Energy of a participant = busy power * compute seconds + (idle + radio power) * transfer seconds + idle power * the
    rest of the round [ours]. Energy and bytes of work that the close of the round cut short are counted up to the
    close.
    """
    clients, round_index, fits_memory = trips.clients, trips.round_index, trips.fits_memory
    phases_done = timeline.phases_done
    late = (phases_done < PHASES) & (fits_memory | (phases_done == 0))
    outcome = np.where(late, Outcome.LATE, np.where(fits_memory, Outcome.OK, Outcome.OUT_OF_MEMORY)).astype(np.int64)
    download_s = timeline.download_end_s - timeline.download_start_s
    compute_s = timeline.compute_end_s - timeline.download_end_s
    upload_s = timeline.upload_end_s - timeline.compute_end_s
    latency_s = fleet.latency(clients)
    cut_down = bytes_moved(trips.download_bytes, download_s, trips.download_s, latency_s)
    cut_up = bytes_moved(trips.upload_bytes, upload_s, trips.upload_s, latency_s)
    return RoundReport(
        round_index=round_index,
        start_s=timeline.start_s,
        end_s=timeline.end_s,
        clients=clients,
        device=fleet.devices(clients),
        mode=fleet.mode_labels(round_index, clients),
        download_start_s=timeline.download_start_s,
        download_end_s=timeline.download_end_s,
        compute_end_s=timeline.compute_end_s,
        upload_end_s=timeline.upload_end_s,
        bytes_down=np.where(phases_done >= 1, trips.download_bytes, cut_down),
        bytes_up=np.where(phases_done == PHASES, trips.upload_bytes, np.where(phases_done == 2, cut_up, 0.0)),
        energy_joules=_energy(trips.rates, compute_s, download_s + upload_s, timeline.end_s - timeline.start_s),
        outcome=outcome,
    )


def _column(values: ArrayLike, clients: IntArray) -> FloatArray:
    return np.broadcast_to(np.asarray(values, dtype=np.float64), clients.shape)


def _checked(phase: str, seconds: FloatArray, fleet: Fleet, plan: RoundPlan) -> FloatArray:
    """Refuse a time that would let a run go on with a wrong clock: a job must take time, a transfer may take none."""
    bad = ~np.isfinite(seconds) | (seconds < 0) | ((phase == "compute") & (seconds == 0))
    if bad.any():
        slot = int(np.argmax(bad))
        client = int(plan.clients[slot])
        allowed = "above 0" if phase == "compute" else "at least 0"
        raise ProfileError(
            f"the {phase} time of client {client} ({fleet.device_of[client]}) in round {plan.round_index} is "
            f"{seconds[slot]} s (allowed: finite and {allowed})"
        )
    return seconds


def _energy(rates: Rates, compute_s: FloatArray, transfer_s: FloatArray, duration_s: float) -> FloatArray:
    idle: FloatArray = rates.idle_power_watts * (duration_s - compute_s)
    return rates.busy_power_watts * compute_s + rates.radio_power_watts * transfer_s + idle
