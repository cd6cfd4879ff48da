"""Links whose bandwidth changes in time: recorded traces replayed, and clients that move between groups of links.

A `Curve` says how long a transfer takes that begins at a given moment, from the seconds that it would take at the
link's mean bandwidth. Where the link is shared, too, that time is what the transfer needs of it alone: the trace is not
stretched along with the transfer. [ours]
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.errors import ProfileError, RunError
from fedsim.rng import Stream, uniforms

_MOST_PIECES = 10_000_000


class Curve(Protocol):
    """A bandwidth in time, relative to the link's own."""

    def seconds(self, client: int, now_s: float, mean_s: float, *, up: bool) -> float:
        """How long a transfer takes from now on that takes `mean_s` at the link's own bandwidth."""


@dataclass(frozen=True)
class BandwidthTrace:
    """Pieces of constant bandwidth with mean one over the whole.

    Attributes:
        starts_s: begin of each piece, from 0, ascending; `ends_at_s`: end of the last.
        rates: relative bandwidth of each piece.
        moved: integral of the rates from 0 to each start; the whole is `ends_at_s`, as the mean is one.
    """

    starts_s: list[float]
    rates: list[float]
    moved: list[float]
    ends_at_s: float

    def seconds(self, at_s: float, mean_s: float) -> float:
        """Seconds from `at_s` in the trace until `mean_s` is moved; the trace begins anew after its end."""
        at_s %= self.ends_at_s
        place = bisect_right(self.starts_s, at_s) - 1
        before = self.moved[place] + (at_s - self.starts_s[place]) * self.rates[place]
        laps, rest = divmod(before + mean_s, self.ends_at_s)
        place = bisect_right(self.moved, rest) - 1
        return laps * self.ends_at_s + self.starts_s[place] + (rest - self.moved[place]) / self.rates[place] - at_s


@dataclass(frozen=True, eq=False)
class Replays:
    """A trace and a place in it for each client, shape (clients,); -1: the link is constant."""

    traces: list[BandwidthTrace]
    trace_of: IntArray
    offset: FloatArray

    def seconds(self, client: int, now_s: float, mean_s: float, *, up: bool) -> float:
        """Both directions follow the same trace."""
        which = int(self.trace_of[client])
        if which < 0 or mean_s <= 0.0:
            return mean_s
        trace = self.traces[which]
        return trace.seconds(now_s + float(self.offset[client]) * trace.ends_at_s, mean_s)


@dataclass(frozen=True, eq=False)
class Roams:
    """Clients that stay in a group of links for an exponential time and then go to a neighbouring one.

    Attributes:
        first: each client's group at the start, shape (clients,).
        down, up: bandwidth of each client in each group relative to that in its first, shape (clients, groups).
    """

    mean_stay_s: float
    first: IntArray
    down: FloatArray
    up: FloatArray
    seed: int
    walks: dict[int, tuple[list[float], list[int]]] = field(default_factory=dict)

    def seconds(self, client: int, now_s: float, mean_s: float, *, up: bool) -> float:
        """Walk through the client's stays."""
        leave_s, groups = self._walk(client, now_s)
        place, at_s, left_s = bisect_right(leave_s, now_s), now_s, mean_s
        rates = (self.up if up else self.down)[client]
        while True:
            if place >= len(groups):
                leave_s, groups = self._walk(client, at_s)
            rate, until_s = float(rates[groups[place]]), leave_s[place]
            if left_s <= (until_s - at_s) * rate:
                return at_s + left_s / rate - now_s
            left_s, at_s, place = left_s - (until_s - at_s) * rate, until_s, place + 1

    def _walk(self, client: int, until_s: float) -> tuple[list[float], list[int]]:
        """When the client leaves each of its stays, and which group it was in, beyond `until_s`."""
        leave_s, groups = self.walks.setdefault(client, ([], []))
        one, last = np.array([client]), self.down.shape[1] - 1
        while not leave_s or leave_s[-1] <= until_s:
            index = len(leave_s)
            if index > _MOST_PIECES:
                raise RunError(
                    f"client {client} changed its place more than {_MOST_PIECES} times: its stays are too short"
                )
            stay, way = (float(uniforms(self.seed, Stream.ROAMING, one, key, index)[0]) for key in range(2))
            group = int(self.first[client]) if not index else self._neighbour(groups[-1], last, way)
            leave_s.append((leave_s[-1] if index else 0.0) - self.mean_stay_s * float(np.log(stay)))
            groups.append(group)
        return leave_s, groups

    @staticmethod
    def _neighbour(group: int, last: int, way: float) -> int:
        if last == 0:
            return group
        return (
            min(last, max(0, group + (1 if way < 0.5 else -1))) if 0 < group < last else (1 if group == 0 else last - 1)
        )


def read_traces(folder: Path, floor: float | None, max_gap_s: float) -> list[BandwidthTrace]:
    """All files of a folder, by name.

    Raises:
        ProfileError: no file, or a line that is not a time after the one before and a bandwidth above 0.
    """
    if not folder.is_dir():
        raise ProfileError(f"replay.folder: there is no folder '{folder}'")
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not paths:
        raise ProfileError(f"replay.folder: there is no trace in '{folder}'")
    return [read_trace(path, floor, max_gap_s) for path in paths]


def read_trace(path: Path, floor: float | None, max_gap_s: float) -> BandwidthTrace:
    """Lines of ``seconds Mbit/s``; the last piece is as long as the one before it."""

    def refuse(line: int, why: str) -> ProfileError:
        return ProfileError(f"bandwidth trace '{path}', line {line}: {why}")

    times: list[float] = []
    rates: list[float] = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"bandwidth trace '{path}' cannot be read: {error}") from error
    for line, row in enumerate(text.splitlines(), 1):
        if not row.strip():
            continue
        try:
            time_s, mbps = (float(word) for word in row.split())
        except ValueError as error:
            raise refuse(line, f"must be two numbers, seconds and Mbit/s, not {row[:40]!r}") from error
        if not np.isfinite(time_s) or not np.isfinite(mbps) or mbps < 0 or mbps > 1e6:
            raise refuse(line, f"a time of {time_s:g} s and {mbps:g} Mbit/s (allowed: finite, 0 to 1e6 Mbit/s)")
        if mbps == 0 and floor is None:
            raise refuse(line, "a bandwidth of 0 (allowed: above 0, or say replay.floor, a share of the mean)")
        if times and time_s <= times[-1]:
            raise refuse(line, f"{time_s:g} s does not come after {times[-1]:g} s")
        if times and time_s - times[-1] > max_gap_s:
            raise refuse(line, f"a gap of {time_s - times[-1]:g} s (allowed: replay.max_gap_s = {max_gap_s:g} s)")
        times.append(time_s)
        rates.append(mbps)
    if len(times) < 2:
        raise ProfileError(f"bandwidth trace '{path}' has fewer than two lines")
    return scaled_trace(np.array(times), np.array(rates), floor, str(path))


def scaled_trace(times_s: FloatArray, mbps: FloatArray, floor: float | None, name: str) -> BandwidthTrace:
    """The same variation with mean one."""
    lengths_s = np.append(np.diff(times_s), times_s[-1] - times_s[-2])
    mean = float(mbps @ lengths_s / lengths_s.sum())
    if mean <= 0:
        raise ProfileError(f"bandwidth trace '{name}' has a mean of 0")
    if floor is not None:
        mbps = np.maximum(mbps, floor * mean)
        mean = float(mbps @ lengths_s / lengths_s.sum())
    rates = mbps / mean
    starts_s = np.append(0.0, np.cumsum(lengths_s)[:-1])
    moved = np.append(0.0, np.cumsum(rates * lengths_s)[:-1])
    return BandwidthTrace(starts_s.tolist(), rates.tolist(), moved.tolist(), float(lengths_s.sum()))
