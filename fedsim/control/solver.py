"""Level a round: the common deadline at which the fleet-mean ratio is on schedule, then ranks for the time to spare.

[ours] One deadline for all means that nobody waits; the deadline is the smallest that keeps the mean ratio on the
schedule when every device takes the smallest feasible ratio with which it meets it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.contracts.control import Arms, Ask, RoundContext, Work
from fedsim.control.recentre import recentre

Times = Callable[[IntArray, Work], FloatArray]
"""Seconds of jobs: client ids (P,), work (P,), (P, K) or (1, K) for all alike -> (P,) or (P, K)."""

GRID_STEP = 0.01
_CHUNK = 1024
_SAMPLE = 4096


def ratio_grid(context: RoundContext) -> FloatArray:
    """Common ratios to choose from, ascending, shape (G,): in steps of at most 0.01 from 0 to the cap.

    Of those beyond every client's bounds only the nearest on each side stays: clipped, they would all be the same.
    """
    cap = max(context.ratio_max, float(context.ratio_high.max()))
    steps = max(1, int(np.ceil(cap / GRID_STEP - 1e-9))) if cap > 0 else 0
    grid = np.linspace(0.0, cap, steps + 1)
    last_below = grid.searchsorted(context.ratio_low.min(), side="right") - 1
    first_above = grid.searchsorted(context.ratio_high.max(), side="left")
    return grid[last_below : first_above + 1]


def common_deadline(
    times_s: FloatArray, grid: FloatArray, low: FloatArray, high: FloatArray, target_mean: float
) -> tuple[float, FloatArray]:
    """The smallest deadline that keeps the mean ratio at or below the target, and the ratios, topped up to it.

    Args:
        times_s: job seconds at each grid ratio within the client's bounds, (G, P): a row holds one ratio of all
            clients. They need not fall with the ratio, and may be a step function of it: a device takes its first
            ratio that meets the deadline, or where none does its first fastest one.
        grid: ratios, ascending, (G,), at most 2**15.
        low, high: each client's bounds, (P,); its ratios are those of the grid clipped to them.
        target_mean: wished mean over the P clients.
    Returns:
        ``(deadline_s, ratio (P,))``. Only the devices whose ratio steps at this deadline share what is missing to
        the target, each the same part of its step; the mean is exact where the bounds allow it.
    """
    best = times_s.copy()
    for row in range(1, grid.size):
        np.minimum(best[row - 1], best[row], out=best[row])
    fastest = best[-1]

    def ratio_at(deadline: float) -> FloatArray:
        misses = best > np.maximum(deadline, fastest)
        return _within(grid[misses.sum(axis=0, dtype=np.int16)], low, high)

    def keeps_schedule(deadline: float) -> bool:
        return bool(ratio_at(deadline).mean() <= target_mean)

    # Any of the times may be the deadline. A sample of them says between which two it lies, so that only the few
    # between these must be sorted. The slowest time of all lets every device stay at its lower bound, so it always
    # qualifies, unless the target lies below all lower bounds, where it is the answer too.
    sample = np.unique(np.append(best.ravel()[:: 1 + best.size // _SAMPLE], best[0].max()))
    place = _first(sample, keeps_schedule)
    between = best <= sample[place]
    if place > 0:
        between &= best > sample[place - 1]
    candidates = np.unique(best[between])
    deadline = float(candidates[_first(candidates, keeps_schedule)])
    under = ratio_at(deadline)
    shorter = deadline > fastest.min()
    over = ratio_at(np.nextafter(deadline, -np.inf)) if shorter else _within(grid[-1:], low, high)
    missing, room = target_mean - under.mean(), over.mean() - under.mean()
    part = min(1.0, max(0.0, missing / room)) if room > 0 else 0.0
    lowest, highest = _within(grid[:1], low, high), _within(grid[-1:], low, high)
    return deadline, recentre(under + part * (over - under), target_mean, lowest, highest)


def _within(ratio: FloatArray, low: FloatArray, high: FloatArray) -> FloatArray:
    return np.minimum(np.maximum(ratio, low), high)


def _first(ascending: FloatArray, good: Callable[[float], bool]) -> int:
    """Place of the first good value, where all that follow a good one are good; the last where none is."""
    first, last = 0, ascending.size - 1
    while first < last:
        middle = (first + last) // 2
        if good(ascending[middle]):
            last = middle
        else:
            first = middle + 1
    return last


def largest_ranks(times_s: FloatArray, deadline_s: float, fastest: IntArray, highest: IntArray) -> IntArray:
    """Index of the largest allowed rank with which each client meets the deadline; `fastest` where none does.

    Args:
        times_s: (P, R), ranks ascending.
        fastest: index of the rank with the shortest expected time, (P,).
        highest: index of the largest rank that each client may take, (P,).
    Returns:
        Indices (P,).
    """
    meets = (times_s <= deadline_s * (1.0 + 1e-12)) & (np.arange(times_s.shape[1]) <= highest[:, None])
    largest = times_s.shape[1] - 1 - meets[:, ::-1].argmax(axis=1)
    return np.where(meets.any(axis=1), largest, fastest)


def level(
    context: RoundContext,
    ask: Ask,
    times: Times,
    *,
    cautious_times: Times | None = None,
    highest_rank: IntArray | None = None,
) -> Arms:
    """Arms of a levelled round.

    A ratio is weighed by the job that *starts and ends* at it, not by this round's job: in the round of a cut most
    steps still run before it, so that this round's time would call any cut nearly useless and the choice would swing.
    Ratios are weighed at the smallest rank, which never asks for more than a larger one; ranks by this round's job.
    Clients are taken in chunks, so that memory stays bounded however many take part.

    Args:
        times: expected seconds of each client's jobs.
        cautious_times: seconds that ranks are weighed by, where these are not the expected ones: a larger rank fills
            spare time, and must not make the round longer.
        highest_rank: index of the largest rank that each client may take, (P,); None: all.
    """
    grid = ratio_grid(context)
    low, high = context.ratio_low, context.ratio_high
    times_s = _grid_times(context, ask, times, grid)
    deadline, ratio = common_deadline(times_s, grid, low, high, context.schedule_ratio)
    # The exact ratio lies between two grid points: ranks are weighed at it, not at its neighbour.
    work = ask.work(context.ratio_before[:, None], ratio[:, None], ask.ranks)
    highest = np.full(ratio.shape, ask.ranks.size - 1) if highest_rank is None else highest_rank
    expected = times(context.clients, work)
    # The round lasts as long as its slowest client at its fastest rank, whatever the deadline: others may use that.
    deadline = max(deadline, float(expected.min(axis=1).max()))
    weighed = expected if cautious_times is None else cautious_times(context.clients, work)
    return Arms(ratio=ratio, rank=ask.ranks[largest_ranks(weighed, deadline, expected.argmin(axis=1), highest)])


def _grid_times(context: RoundContext, ask: Ask, times: Times, grid: FloatArray) -> FloatArray:
    """Seconds of the jobs that start and end at each grid ratio, clipped to the client's bounds, (G, P).

    What lies within the bounds is asked of all clients alike, so each is priced once for the grid and twice for its
    bounds, not once for every ratio.
    """
    low, high, smallest = context.ratio_low[:, None], context.ratio_high[:, None], ask.ranks[0]
    at_grid = ask.work(grid[None], grid[None], smallest)
    at_low = times(context.clients, ask.work(low, low, smallest))
    at_high = times(context.clients, ask.work(high, high, smallest))
    times_s = np.empty((grid.size, context.clients.size))
    for start in range(0, context.clients.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        times_part = times(context.clients[part], at_grid)
        np.copyto(times_part, at_low[part], where=grid < low[part])
        np.copyto(times_part, at_high[part], where=grid > high[part])
        times_s[:, part] = times_part.T
    return times_s
