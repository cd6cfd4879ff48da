"""Throttling: how the rate of computing falls with the seconds that a device has been busy, and how it recovers.

The state is one number per device, its busy seconds h: they rise by one a second of computing up to the last step's
mark, and fall by ``last mark / recover_s`` a second when the device does not compute. With h in [mark k, mark k+1) the
device computes at rate k; below the first mark at 1. [ours: the course of a table of marks and rates that has one
state; a board's own course is that of temperatures, which no public table gives.]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class HeatTable:
    """Marks in busy seconds, ascending, and the rate from each mark on; `cooling` in busy seconds per second."""

    marks_s: tuple[float, ...]
    rates: tuple[float, ...]
    cooling: float

    @staticmethod
    def of(steps: Sequence[tuple[float, float]], recover_s: float) -> HeatTable:
        """From (busy seconds, rate) pairs."""
        marks = tuple(mark for mark, _ in steps)
        return HeatTable(marks, tuple(rate for _, rate in steps), marks[-1] / recover_s)

    def cooled(self, busy_s: float, rest_s: float) -> float:
        """Busy seconds after a rest."""
        return max(0.0, busy_s - self.cooling * rest_s)

    def heated(self, busy_s: float, compute_s: float) -> float:
        """Busy seconds after computing."""
        return min(self.marks_s[-1], busy_s + compute_s)

    def seconds(self, busy_s: float, work_s: float) -> float:
        """How long work of so many seconds at the full rate takes from a state on."""
        taken_s, rate = 0.0, 1.0
        for mark_s, next_rate in zip(self.marks_s, self.rates, strict=True):
            if busy_s < mark_s:
                until_s = mark_s - busy_s
                if work_s <= until_s * rate:
                    return taken_s + work_s / rate
                taken_s, work_s, busy_s = taken_s + until_s, work_s - until_s * rate, mark_s
            rate = next_rate
        return taken_s + work_s / rate

    def work(self, busy_s: float, elapsed_s: float) -> float:
        """How much work, in seconds at the full rate, is done in a time: the inverse of `seconds`."""
        done_s, rate = 0.0, 1.0
        for mark_s, next_rate in zip(self.marks_s, self.rates, strict=True):
            if busy_s < mark_s:
                until_s = mark_s - busy_s
                if elapsed_s <= until_s:
                    return done_s + elapsed_s * rate
                done_s, elapsed_s, busy_s = done_s + until_s * rate, elapsed_s - until_s, mark_s
            rate = next_rate
        return done_s + elapsed_s * rate
