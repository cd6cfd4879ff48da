"""A quantile of the last so many values, kept up to date at the cost of what comes and goes, not of what stays."""

from __future__ import annotations

from math import isqrt

import numpy as np

from fedsim.contracts.common import FloatArray, State
from fedsim.state import take

_LEAST_TURNS = 8
"""A bracket reaches at least this many times `turnover` to each side, so that it lasts for some rounds,"""
_MOST_SHARE = 16
"""but no further than this part of the window: beyond that a new bracket is cheaper than keeping a wide one."""


class RunningQuantile:
    """``numpy.quantile`` of the last `room` values added.

    Only the values near the quantile are kept in order (a bracket), with the number of values below them; those that
    come and go elsewhere are counted. Where the quantile leaves its bracket, a new one is cut out of the whole window:
    the bracket is wide enough for that to be rare when few values come at a time.
    """

    def __init__(self, fraction: float, room: int) -> None:
        self._fraction = fraction
        self._window = np.full(room, np.nan)
        self._written = np.zeros(1, dtype=np.int64)
        self._bracket = np.empty(0)
        self._below = 0

    def add(self, values: FloatArray) -> None:
        """Take in finite values, shape (K,), K at most `room`; the oldest beyond `room` go."""
        room = self._window.size
        if values.size > room:
            raise ValueError(f"{values.size} values at once do not fit a window of {room}")
        order = int(self._written[0]) + np.arange(values.size)
        leaving = self._window[order[order >= room] % room]
        self._window[order % room] = values
        self._written += values.size
        if self._bracket.size == 0:
            return
        low, high = self._bracket[0], self._bracket[-1]
        coming, going = np.sort(_within(values, low, high)), np.sort(_within(leaving, low, high))
        self._below += int((values < low).sum()) - int((leaving < low).sum())
        # Equal values that go take places side by side.
        places = np.searchsorted(self._bracket, going) + np.arange(going.size) - np.searchsorted(going, going)
        kept = np.delete(self._bracket, places)
        self._bracket = np.insert(kept, np.searchsorted(kept, coming), coming)

    def value(self, *, turnover: int) -> float:
        """The quantile (linear between two values), 0 before the first value.

        Args:
            turnover: how many values come at a time: the wider the bracket should be. The result does not depend on it.
        """
        count = min(int(self._written[0]), self._window.size)
        if count == 0:
            return 0.0
        place = self._fraction * (count - 1)
        first = int(place)
        second = min(first + 1, count - 1)
        if first < self._below or second >= self._below + self._bracket.size:
            self._cut_bracket(count, first, second, turnover)
        ends = self._bracket[[first - self._below, second - self._below]]
        return float(np.quantile(ends, place - first))

    def _cut_bracket(self, count: int, first: int, second: int, turnover: int) -> None:
        """Put the values around places `first` and `second` in order."""
        half = min(max(isqrt(count), _LEAST_TURNS * turnover), max(1, count // _MOST_SHARE))
        ends = max(0, first - half), min(count - 1, second + half)
        values = np.partition(self._window[:count], ends)
        low, high = values[list(ends)]
        self._below = int((values < low).sum())
        self._bracket = np.sort(_within(values, low, high))

    def state(self) -> State:
        """Arrays for the checkpoint."""
        return {"window": self._window.copy(), "written": self._written.copy()}

    def restore(self, state: State) -> None:
        """Take the arrays of a checkpoint. Raises RunError where they do not fit."""
        self._window = take(state, "window", self._window)
        self._written = take(state, "written", self._written)
        self._bracket, self._below = np.empty(0), 0


def _within(values: FloatArray, low: float, high: float) -> FloatArray:
    return values[(values >= low) & (values <= high)]
