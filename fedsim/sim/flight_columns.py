"""From flights on their way to columns, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from fedsim.sim.flight_clock import Trip
from fedsim.sim.mid_flight import pack_trips, unpack_trips
from fedsim.sim.trips import Stamps, Trips


def rows_of(trips: Trips) -> Iterator[tuple[int, float, float, float, bool]]:
    """Client, seconds down, computing and up, and whether the job fits, of each."""
    return zip(
        trips.flights.clients.tolist(),
        trips.download_s.tolist(),
        trips.compute_s.tolist(),
        trips.upload_s.tolist(),
        trips.fits_memory.tolist(),
        strict=True,
    )


def by_arrival(trip: Trip) -> tuple[float, int, int]:
    """Key of the order in which updates arrived."""
    return trip.upload_end_s, trip.client, trip.place


def by_start(trip: Trip) -> tuple[float, int]:
    """Key of the order of dispatch."""
    return trip.start_s, trip.client


def by_client(trip: Trip) -> tuple[int, float]:
    """Key of the order by client, then flight."""
    return trip.client, trip.start_s


def columns_of(trips: list[Trip]) -> Trips:
    """The columns of some flights, in their order. It costs no more than they are, however large their batches."""
    batches: dict[int, tuple[Trips, list[int], list[int]]] = {}
    for order, trip in enumerate(trips):
        _, places, orders = batches.setdefault(id(trip.batch), (trip.batch, [], []))
        places.append(trip.place)
        orders.append(order)
    if not batches:
        raise RuntimeError("a merge without a flight")
    parts = [_some(batch, places) for batch, places, _ in batches.values()]
    if len(parts) == 1:
        return parts[0]
    ordered = np.concatenate([of_batch for _, _, of_batch in batches.values()])
    return Trips.joined(parts).take(np.argsort(ordered))


def _some(batch: Trips, places: list[int]) -> Trips:
    whole = len(places) == len(batch) and places == list(range(len(batch)))
    return batch if whole else batch.take(np.array(places, dtype=np.int64))


def stamps_of(trips: list[Trip], now_s: float, *, moving: bool) -> Stamps:
    """When they did what; what has not happened is stamped with the present."""
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
        lost=np.array([trip.lost for trip in trips], dtype=bool) if moving else None,
        moved=np.array([trip.moved for trip in trips], dtype=np.float64) if moving else None,
    )


def packed(trips: list[Trip]) -> dict[str, np.ndarray]:
    """The trips and where each is, for a checkpoint."""
    stamps = ("start_s", "download_end_s", "compute_end_s", "upload_end_s", "due_s")
    columns: dict[str, np.ndarray] = {
        name: np.array([getattr(trip, name) for trip in trips], dtype=np.float64) for name in stamps
    }
    counts = {name: np.array([getattr(trip, name) for trip in trips], dtype=np.int64) for name in ("phase", "logged")}
    return {**pack_trips(columns_of(trips)), **columns, **counts}


def unpacked(state: Mapping[str, np.ndarray]) -> list[Trip]:
    """What `packed` was given, in the same order, each in the batch of all."""
    batch, trips = unpack_trips(state), []
    for place, (client, download_s, compute_s, upload_s, fits) in enumerate(rows_of(batch)):
        trip = Trip(batch, place, client, download_s, compute_s, upload_s, fits, float(state["start_s"][place]), -1)
        for name in ("download_end_s", "compute_end_s", "upload_end_s", "due_s"):
            setattr(trip, name, float(state[name][place]))
        trip.phase, trip.logged = int(state["phase"][place]), int(state["logged"][place])
        trips.append(trip)
    return trips
