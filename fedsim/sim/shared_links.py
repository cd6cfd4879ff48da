"""Transfers that meet: processor sharing at access points and at the server's link, event by event and exact.

An access point shares its airtime evenly: of n transfers under way each progresses at 1/n of the speed that it has
alone, as stations of a wireless network with airtime fairness do. So a transfer needs *seconds alone*, and one virtual
clock per access point and direction, which runs at the speed of every transfer there, tells when each ends: a transfer
ends when the clock has moved on by what it needs. A change costs O(log n).

Where the server's link is narrower than all transfers of a direction together would use, all of them are slowed down by
the same factor. [ours] Latency comes before a transfer and takes no airtime. Transfers of clients without an access
point meet at the server's link only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count

import numpy as np

from fedsim.fleet.bandwidth import Curve
from fedsim.fleet.dynamics import Sharing
from fedsim.fleet.link import BITS_PER_BYTE
from fedsim.sim.flight_clock import UPLOADING, SimClock, Trip
from fedsim.sim.transport import Done

DOWN, UP = 0, 1
_LATENCY, _MOVING = 0, 1


@dataclass(eq=False, slots=True)
class _Transfer:
    """One transfer in a lane: it ends when the lane's clock shows `ends`."""

    trip: Trip
    done: Done
    needs_s: float
    ends: float
    bits_per_s: int
    over: bool = False


@dataclass(eq=False, slots=True)
class _Lane:
    """One direction at one access point, or of all clients without one.

    Attributes:
        clock: its virtual clock, in seconds alone, as of `since_s`; it runs at `speed`.
        bits_per_s: of all transfers under way, alone. Whole numbers, so that sums do not depend on their order.
        twin: the other direction, where both share the medium.
        beside: all lanes whose speed a change in this one may change, itself included.
        due_s: when the next transfer ends; `wakes_s`: when an event in the queue looks, not after `due_s`.
    """

    direction: int
    divides: bool
    clock: float = 0.0
    since_s: float = 0.0
    speed: float = 1.0
    count: int = 0
    bits_per_s: int = 0
    due_s: float = math.inf
    wakes_s: float = math.inf
    queue: list[tuple[float, int, int, _Transfer]] = field(default_factory=list)
    twin: _Lane | None = None
    beside: tuple[_Lane, ...] = ()

    @property
    def users(self) -> int:
        """Transfers that share the medium."""
        return self.count + (self.twin.count if self.twin is not None else 0)


class _Wake:
    """An event of SimPy's queue, as small as the queue allows."""

    __slots__ = ("_ok", "callbacks", "lane", "time_s")

    def __init__(self, lane: _Lane, time_s: float, callbacks: list[Callable[[_Wake], None]]) -> None:
        self.lane, self.time_s, self.callbacks, self._ok = lane, time_s, callbacks, True


class _Late:
    """As `_Wake`, at the end of a latency."""

    __slots__ = ("_ok", "callbacks", "done", "trip")

    def __init__(self, trip: Trip, done: Done, callbacks: list[Callable[[_Late], None]]) -> None:
        self.trip, self.done, self.callbacks, self._ok = trip, done, callbacks, True


class _Over:
    """What the end of a transfer is told with: it happens now, and never was in the queue."""

    __slots__ = ("_value",)

    def __init__(self, trip: Trip) -> None:
        self._value = trip


class SharedLinks:
    """Implements `fedsim.sim.transport.Transport`.

    Args:
        curve: how each client's own bandwidth changes; None: not at all.
    """

    def __init__(self, clock: SimClock, sharing: Sharing, curve: Curve | None) -> None:
        self._clock, self._curve = clock, curve
        self._point_of = sharing.point_of.tolist()
        self._limits = (sharing.down_bits_per_s, sharing.up_bits_per_s)
        self._limited = (math.isfinite(self._limits[DOWN]), math.isfinite(self._limits[UP]))
        self._lanes: list[tuple[_Lane, _Lane]] = []
        for half in (*sharing.half_duplex, None):  # the last: clients without an access point
            pair = (_Lane(DOWN, half is not None), _Lane(UP, half is not None))
            if half:
                pair[DOWN].twin, pair[UP].twin = pair[UP], pair[DOWN]
            self._lanes.append(pair)
        self._any_limit = any(self._limited)
        self._ways = ([pair[DOWN] for pair in self._lanes], [pair[UP] for pair in self._lanes])
        for pair in self._lanes:
            for lane in pair:
                lane.beside = tuple(self._beside(lane))
        self._serial = count()
        self._under_way: dict[int, _Transfer | None] = {}  # by client; None while it waits for its latency

    # -- a transfer ---------------------------------------------------------------------------------------------------

    def download(self, trip: Trip, done: Done) -> None:
        """Start a download now."""
        self._begin(trip, done)

    def upload(self, trip: Trip, done: Done) -> None:
        """Start an upload now."""
        self._begin(trip, done)

    def _begin(self, trip: Trip, done: Done) -> None:
        if trip.latency_s > 0.0:
            trip.due_s = self._clock._now + trip.latency_s
            self._wait(trip, done)
        else:
            self._enter(trip, done)

    def _wait(self, trip: Trip, done: Done) -> None:
        """For the latency, which is over at `trip.due_s`."""
        self._under_way[trip.client] = None
        late = _Late(trip, done, [self._latency_over])
        self._clock.schedule_at(late, trip.due_s)  # type: ignore[arg-type]

    def _latency_over(self, late: _Late) -> None:
        if not late.trip.gone:
            self._enter(late.trip, late.done)

    def _enter(self, trip: Trip, done: Done) -> None:
        up = trip.phase == UPLOADING
        needs_s = (trip.upload_s if up else trip.download_s) - trip.latency_s
        if self._curve is not None:
            needs_s = self._curve.seconds(trip.client, self._clock._now, needs_s, up=up)
        lane = self._lanes[self._point_of[trip.client]][up]
        changed = self._settle(lane)
        transfer = _Transfer(
            trip, done, needs_s, lane.clock + needs_s, _bits_per_s(trip, needs_s, up=up) if self._limited[up] else 0
        )
        heappush(lane.queue, (transfer.ends, trip.client, next(self._serial), transfer))
        lane.count += 1
        lane.bits_per_s += transfer.bits_per_s
        self._under_way[trip.client] = transfer
        self._speed_up(changed)

    def stop(self, trip: Trip) -> float:
        """End a transfer: those beside it go on faster."""
        transfer = self._under_way.pop(trip.client)
        if transfer is None:
            return 0.0  # its latency was not over
        lane = self._lanes[self._point_of[trip.client]][trip.phase == UPLOADING]
        changed = self._settle(lane)
        transfer.over = True
        left = transfer.ends - lane.clock
        self._leave(lane, transfer)
        self._speed_up(changed)
        return min(1.0, max(0.0, 1.0 - left / transfer.needs_s)) if transfer.needs_s > 0 else 1.0

    def _leave(self, lane: _Lane, transfer: _Transfer) -> None:
        lane.count -= 1
        lane.bits_per_s -= transfer.bits_per_s
        if not lane.count:
            lane.clock, lane.queue = 0.0, []

    def _beside(self, lane: _Lane) -> list[_Lane]:
        way, other = lane.direction, 1 - lane.direction
        lanes = list(self._ways[way]) if self._limited[way] else [lane]
        if lane.twin is not None:
            lanes += self._ways[other] if self._limited[other] else [lane.twin]
        return lanes

    # -- clocks -------------------------------------------------------------------------------------------------------

    def _settle(self, lane: _Lane) -> tuple[_Lane, ...]:
        """Bring all clocks up to now whose speed a change in this lane may change; these lanes."""
        now_s, changed = self._clock._now, lane.beside
        for one in changed:
            if one.count:
                one.clock += (now_s - one.since_s) * one.speed
            one.since_s = now_s
        return changed

    def _speed_up(self, changed: tuple[_Lane, ...]) -> None:
        """Set the speeds, and when the next transfer of each lane ends."""
        factors = [1.0, 1.0]
        if self._any_limit:
            for direction in {lane.direction for lane in changed}:
                factors[direction] = self._factor(direction)
        for lane in changed:
            if not lane.count:
                lane.due_s = math.inf
                continue
            users = lane.count if lane.twin is None else lane.count + lane.twin.count
            speed = factors[lane.direction] / users if lane.divides else factors[lane.direction]
            queue = lane.queue
            while queue[0][3].over:
                heappop(queue)
            lane.speed, due_s = speed, lane.since_s + max(0.0, queue[0][0] - lane.clock) / speed
            lane.due_s = due_s
            if due_s < lane.wakes_s:
                self._wake_at(lane, due_s)

    def _factor(self, direction: int) -> float:
        """By how much the server's link slows all transfers of a direction down."""
        if not self._limited[direction]:
            return 1.0
        wanted = 0.0
        for lane in self._ways[direction]:
            if lane.count:
                wanted += lane.bits_per_s / lane.users if lane.divides else lane.bits_per_s
        limit = self._limits[direction]
        return 1.0 if wanted <= limit else limit / wanted

    def _wake_at(self, lane: _Lane, time_s: float) -> None:
        lane.wakes_s = time_s
        self._clock.schedule_at(_Wake(lane, time_s, [self._look]), time_s)  # type: ignore[arg-type]

    def _look(self, wake: _Wake) -> None:
        """At the end of a transfer, or at a time that was one before the lane slowed down."""
        lane, time_s = wake.lane, wake.time_s
        if time_s != lane.wakes_s:
            return  # an earlier look has taken its place
        lane.wakes_s = math.inf
        if lane.due_s > time_s:
            if lane.count:
                self._wake_at(lane, lane.due_s)
            return
        changed = self._settle(lane)
        # What ends now ends exactly, whatever the clock was rounded to.
        lane.clock = lane.queue[0][0]
        ended, queue, now = [], lane.queue, lane.clock
        while queue and (queue[0][0] <= now or queue[0][3].over):
            transfer = heappop(queue)[3]
            if not transfer.over:
                transfer.over = True
                lane.count -= 1
                lane.bits_per_s -= transfer.bits_per_s
                del self._under_way[transfer.trip.client]
                ended.append(transfer)
        if not lane.count:
            lane.clock = 0.0
        self._speed_up(changed)
        for transfer in ended:
            transfer.done(_Over(transfer.trip))  # type: ignore[arg-type]

    # -- checkpoint ---------------------------------------------------------------------------------------------------

    def state(self, trips: list[Trip]) -> dict[str, np.ndarray]:
        """Each transfer's remaining need, and each lane's clock with the time of its last change."""
        rows = [(trip.client in self._under_way, self._under_way.get(trip.client)) for trip in trips]
        return _packed(rows, [lane for pair in self._lanes for lane in pair])

    def restore(self, trips: list[Trip], done: Mapping[int, Done], state: dict[str, np.ndarray]) -> None:
        """Rebuild the lanes and their events."""
        for trip in trips:
            row = trip.place
            if int(state["link.stage"][row]) == _LATENCY:
                self._wait(trip, done[trip.phase])
                continue
            needs_s, ends = float(state["link.needs_s"][row]), float(state["link.ends"][row])
            transfer = _Transfer(trip, done[trip.phase], needs_s, ends, int(state["link.bits_per_s"][row]))
            lane = self._lanes[self._point_of[trip.client]][trip.phase == UPLOADING]
            lane.queue.append((ends, trip.client, next(self._serial), transfer))
            lane.count += 1
            lane.bits_per_s += transfer.bits_per_s
            self._under_way[trip.client] = transfer
        for place, lane in enumerate(lane for pair in self._lanes for lane in pair):
            heapify(lane.queue)
            lane.clock, lane.since_s = float(state["lane.clock"][place]), float(state["lane.since_s"][place])
            lane.speed, lane.due_s = float(state["lane.speed"][place]), float(state["lane.due_s"][place])
            if lane.count:
                self._wake_at(lane, lane.due_s)


def _bits_per_s(trip: Trip, needs_s: float, *, up: bool) -> int:
    """Of a transfer alone."""
    work = trip.batch.flights.work
    payload = float((work.upload_bytes if up else work.download_bytes)[trip.place])
    share = trip.drop_share if trip.drop_phase == trip.phase else 1.0
    return round(BITS_PER_BYTE * share * payload / needs_s) if needs_s > 0.0 else 0


def _packed(rows: list[tuple[bool, _Transfer | None]], lanes: list[_Lane]) -> dict[str, np.ndarray]:
    """Whether each trip moves bytes, and its transfer once its latency is over; and all lanes."""
    return {
        "link.stage": np.array([-1 if not here else _LATENCY if one is None else _MOVING for here, one in rows]),
        "link.needs_s": np.array([np.nan if one is None else one.needs_s for _, one in rows]),
        "link.ends": np.array([np.nan if one is None else one.ends for _, one in rows]),
        "link.bits_per_s": np.array([0 if one is None else one.bits_per_s for _, one in rows], dtype=np.int64),
        "lane.clock": np.array([lane.clock for lane in lanes]),
        "lane.since_s": np.array([lane.since_s for lane in lanes]),
        "lane.speed": np.array([lane.speed for lane in lanes]),
        "lane.due_s": np.array([lane.due_s for lane in lanes]),
    }
