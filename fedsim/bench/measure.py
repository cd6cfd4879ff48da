"""Timing contenders in turn, and the rows that come of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from fedsim.errors import FedsimError


class BenchError(FedsimError):
    """Contenders disagree on the result: nothing that is wrong is timed."""


@dataclass(frozen=True)
class Target:
    """What a row should reach: its ``ratio`` or its ``value``, not below `at_least`, not above `at_most`."""

    of: str
    at_least: float | None = None
    at_most: float | None = None

    def met_by(self, row: Row) -> bool:
        """Whether `row` reaches it."""
        figure = row.ratio if self.of == "ratio" else row.value
        if figure is None:
            return False
        return (self.at_least is None or figure >= self.at_least) and (self.at_most is None or figure <= self.at_most)


@dataclass(frozen=True)
class Row:
    """One measured figure.

    Attributes:
        value, low, high: median, least and largest over `repeats`.
        ratio: median over the turns of this contender's speed over the baseline's in the same turn; None for the
            baseline itself and for figures without one.
        cpu_ratio: the same by processor time, which other processes on a busy host disturb less; None on a card.
        baseline: name of the row that the ratios are taken against.
        note: what the name does not say.
    """

    section: str
    case: str
    name: str
    value: float
    unit: str
    low: float
    high: float
    repeats: int
    ratio: float | None = None
    cpu_ratio: float | None = None
    baseline: str | None = None
    target: Target | None = None
    note: str = ""

    def as_dict(self) -> dict[str, object]:
        """For ``--json``; keys are stable."""
        target = None
        if self.target is not None:
            target = {
                "of": self.target.of,
                "at_least": self.target.at_least,
                "at_most": self.target.at_most,
                "met": self.target.met_by(self),
            }
        return {
            "section": self.section,
            "case": self.case,
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "low": self.low,
            "high": self.high,
            "repeats": self.repeats,
            "ratio": self.ratio,
            "cpu_ratio": self.cpu_ratio,
            "baseline": self.baseline,
            "target": target,
            "note": self.note,
        }


@dataclass(frozen=True)
class Check:
    """What was asserted before the clock started: `figure` did not exceed `limit` (0: equal)."""

    section: str
    case: str
    name: str
    figure: float
    limit: float

    @classmethod
    def of(cls, section: str, case: str, name: str, figure: float, limit: float) -> Check:
        """Raises BenchError where `figure` exceeds `limit` or is not a number."""
        if not figure <= limit:
            raise BenchError(f"bench {section}, {case}: {name} is {figure:.3g} (allowed: at most {limit:g})")
        return cls(section, case, name, figure, limit)


@dataclass(frozen=True)
class Skipped:
    """What was not measured, and why."""

    section: str
    case: str
    reason: str


@dataclass(frozen=True)
class Findings:
    """What a section brings."""

    rows: tuple[Row, ...] = ()
    checks: tuple[Check, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    def __add__(self, other: Findings) -> Findings:
        """Both, in order."""
        return Findings(self.rows + other.rows, self.checks + other.checks, self.skipped + other.skipped)


@dataclass(frozen=True)
class Turns:
    """Seconds of every turn: on the clock, and of the processor (all threads)."""

    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """On the clock."""
        return median(self.wall_s)

    def per(self, amount: float) -> Turns:
        """Seconds of one part of `amount`."""
        return Turns(tuple(one / amount for one in self.wall_s), tuple(one / amount for one in self.cpu_s))


def in_turn(
    contenders: Mapping[str, Callable[[], object]], repeats: int, wait: Callable[[], None] = lambda: None
) -> dict[str, Turns]:
    """Seconds of each contender, A, B, A, B, and so on, so that what else the host does falls on all alike.

    Args:
        repeats: turns, >= 1.
        wait: until the work that was started is done (a card's).
    """
    wall_s: dict[str, list[float]] = {name: [] for name in contenders}
    cpu_s: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    for _ in range(repeats):
        for name, contender in contenders.items():
            wait()
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            contender()
            wait()
            wall_s[name].append(time.perf_counter() - began_s)
            cpu_s[name].append(time.process_time() - began_cpu_s)
    return {name: Turns(tuple(wall_s[name]), tuple(cpu_s[name])) for name in contenders}


def speedup(ours: Sequence[float], baseline: Sequence[float]) -> float:
    """Median over the turns of how many times faster we are."""
    return median(theirs / mine for mine, theirs in zip(ours, baseline, strict=True))


def rate_row(
    section: str,
    case: str,
    name: str,
    amount: float,
    unit: str,
    turns: Turns,
    baseline: tuple[str, Turns] | None = None,
    target: Target | None = None,
    note: str = "",
    on_card: bool = False,
) -> Row:
    """A row of `amount` of work per second.

    Args:
        baseline: name and seconds of what ran in the same turns, on the same amount of work.
        on_card: the processor's time then says nothing.
    """
    rates = [amount / one for one in turns.wall_s]
    ratio = cpu_ratio = None
    if baseline is not None:
        ratio = speedup(turns.wall_s, baseline[1].wall_s)
        cpu_ratio = None if on_card else speedup(turns.cpu_s, baseline[1].cpu_s)
    return Row(
        section,
        case,
        name,
        median(rates),
        unit,
        min(rates),
        max(rates),
        len(rates),
        ratio,
        cpu_ratio,
        None if baseline is None else baseline[0],
        target,
        note,
    )
