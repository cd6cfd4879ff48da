"""Who is there when: stretches of time in which a client is on, from draws or from a file, within its membership.

A stretch is half open: at its end the client is off. The k-th stretch of a client is a function of the seed, of the
client and of k alone, so that nothing depends on who else there is, nor on when somebody looked: a resumed run finds
the same stretches without having stored any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.errors import RunError
from fedsim.rng import Stream, uniforms

_MOST_STRETCHES = 1_000_000
"""Of one client in one run: beyond it the file describes no device. [ours]"""


class Rhythm(Protocol):
    """Stretches of time by number, ascending and apart."""

    def stretch(self, clients: IntArray, index: IntArray, before_s: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Start and end of stretch `index` of each client, shape (P,); infinite where there is none.

        Args:
            before_s: end of the stretch before; 0 for the first.
        """


@dataclass(frozen=True)
class Always:
    """One stretch without end."""

    def stretch(self, clients: IntArray, index: IntArray, before_s: FloatArray) -> tuple[FloatArray, FloatArray]:
        """All of time, then nothing."""
        return np.where(index == 0, 0.0, np.inf), np.full(len(clients), np.inf)


@dataclass(frozen=True, eq=False)
class OnOffRhythm:
    """Exponential times on and off, shape (clients,) each; on at the start with the long-run chance."""

    mean_on_s: FloatArray
    mean_off_s: FloatArray
    seed: int

    def stretch(self, clients: IntArray, index: IntArray, before_s: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Off for an exponential time after the stretch before, then on for one. Exponential times have no memory, so
        that the first may begin at the start of the run."""
        on_s, off_s = self.mean_on_s[clients], self.mean_off_s[clients]
        off, on, begins = (uniforms(self.seed, Stream.AVAILABILITY, clients, key, index) for key in range(3))
        starts_on = (index == 0) & (begins < on_s / (on_s + off_s))
        start_s = np.where(starts_on, 0.0, before_s - off_s * np.log(off))
        return start_s, start_s - on_s * np.log(on)


@dataclass(frozen=True, eq=False)
class DailyRhythm:
    """One stretch a period, shape (clients,) each."""

    period_s: FloatArray
    start_s: FloatArray
    on_s: FloatArray
    spread_s: FloatArray
    seed: int

    def stretch(self, clients: IntArray, index: IntArray, before_s: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Stretch k lies in period k - 1, so that one that spans the start of the run is there."""
        moved = uniforms(self.seed, Stream.AVAILABILITY, clients, 3, index) - 0.5
        start_s = (index - 1) * self.period_s[clients] + self.start_s[clients] % self.period_s[clients]
        start_s = start_s + self.spread_s[clients] * moved
        return start_s, start_s + self.on_s[clients]


@dataclass(frozen=True, eq=False)
class RecordedRhythm:
    """Stretches of a file: those of its client j are `start_s[first[j]:first[j + 1]]`, and so are the ends."""

    first: IntArray
    start_s: FloatArray
    end_s: FloatArray
    repeat_s: float | None

    def stretch(self, clients: IntArray, index: IntArray, before_s: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The index-th stretch of the file's client, again and again with `repeat_s`."""
        row = clients % (len(self.first) - 1)
        count = self.first[row + 1] - self.first[row]
        lap, place = np.divmod(index, np.maximum(count, 1))
        there = (count > 0) & ((lap == 0) | (self.repeat_s is not None))
        place = np.where(there, self.first[row] + place, 0)
        shift_s = lap * (self.repeat_s or 0.0)
        return (
            np.where(there, self.start_s[place] + shift_s, np.inf),
            np.where(there, self.end_s[place] + shift_s, np.inf),
        )


class Presence:
    """Which clients are there, now and next. Looks never go back in time.

    Args:
        rhythm: of all clients.
        join_s, leave_s: each client is there from the one to the other at most, shape (clients,).
    """

    def __init__(self, rhythm: Rhythm, join_s: FloatArray, leave_s: FloatArray) -> None:
        self._rhythm, self.join_s, self.leave_s = rhythm, join_s, leave_s
        self.forget()

    def forget(self) -> None:
        """Begin at time 0 again: a run of this fleet starts."""
        clients = len(self.join_s)
        self._index = np.full(clients, -1, dtype=np.int64)
        self._start_s, self._end_s = np.full(clients, -np.inf), np.full(clients, -np.inf)
        self._uncut_s = np.zeros(clients)
        self._on: NDArray[np.bool_] = np.zeros(clients, dtype=bool)
        self._now_s = self._next_s = -np.inf
        self._next_arrival_s = np.inf
        self._everyone = np.arange(clients, dtype=np.int64)

    def on(self, now_s: float) -> NDArray[np.bool_]:
        """Mask (clients,) of those that are there; not to be changed."""
        self._look(now_s)
        return self._on

    def off_s(self, clients: IntArray, now_s: float) -> FloatArray:
        """When each of some clients that are there will be gone, shape (P,)."""
        self._look(now_s)
        off_s: FloatArray = self._end_s[clients]
        return off_s

    def next_arrival_s(self, now_s: float) -> float:
        """When the next client that is gone comes; infinite where none does."""
        self._look(now_s)
        return self._next_arrival_s

    def _look(self, now_s: float) -> None:
        if now_s < self._now_s:
            self.forget()  # another run of the same fleet
        self._now_s = now_s
        if now_s < self._next_s:
            return
        over = self._everyone[self._end_s <= now_s]
        while len(over):
            self._advance(over)
            over = over[self._end_s[over] <= now_s]
        self._on = (self._start_s <= now_s) & (now_s < self._end_s)
        self._next_arrival_s = float(np.where(self._on, np.inf, self._start_s).min())
        self._next_s = float(np.minimum(np.where(self._on, np.inf, self._start_s), self._end_s).min())

    def _advance(self, clients: IntArray) -> None:
        """Each one's next stretch, cut to its membership."""
        self._index[clients] += 1
        if int(self._index[clients].max()) > _MOST_STRETCHES:
            client = int(clients[np.argmax(self._index[clients])])
            raise RunError(
                f"client {client} came and went more than {_MOST_STRETCHES} times: its stretches are too short"
            )
        before_s = self._uncut_s[clients]
        start_s, end_s = self._rhythm.stretch(clients, self._index[clients], before_s)
        self._uncut_s[clients] = end_s
        join_s, leave_s = self.join_s[clients], self.leave_s[clients]
        never = (start_s >= leave_s) | (join_s >= leave_s)
        start_s, end_s = np.maximum(start_s, join_s), np.minimum(end_s, leave_s)
        self._start_s[clients] = np.where(never, np.inf, start_s)
        # What membership leaves nothing of is over at once, so that the next stretch follows.
        self._end_s[clients] = np.where(never, np.inf, np.where(start_s >= end_s, -np.inf, end_s))
