"""Level a round: the common deadline at which the fleet-mean ratio is on schedule, then ranks for the time to spare.

[ours] One deadline for all means that nobody waits; the deadline is the smallest that keeps the mean ratio on the
schedule when every device takes the smallest feasible ratio with which it meets it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import numpy as np

from fedsim.control.recentre import recentre
from fedsim.specs import Arms, Ask, FloatArray, IntArray, RoundContext, Work

Times = Callable[[IntArray, Work], FloatArray]
"""Seconds of jobs: client ids (P,), work (P,) or (P, K) -> the same shape."""

GRID_STEP = 0.01
_CHUNK = 1024


def ratio_grid(context: RoundContext) -> FloatArray:
    """Common ratios to choose from, ascending, shape (G,): from 0 to the cap in steps of at most 0.01."""
    cap = max(context.ratio_max, float(context.ratio_high.max(initial=0.0)))
    return np.linspace(0.0, cap, max(1, int(np.ceil(cap / GRID_STEP - 1e-9))) + 1)


def common_deadline(times_s: FloatArray, ratios: FloatArray, target_mean: float) -> tuple[float, FloatArray]:
    """The smallest deadline that keeps the mean ratio at or below the target, and the ratios, topped up to it.

    Args:
        times_s: job seconds for each ratio, (P, G). They need not fall with the ratio, and may be a step function
            of it: a device takes its first ratio that meets the deadline, or where none does its first fastest one.
        ratios: (P, G), ascending along G.
        target_mean: wished mean over the P clients.
    Returns:
        ``(deadline_s, ratio (P,))``. Only the devices whose ratio steps at this deadline share what is missing to
        the target, each the same part of its step; the mean is exact where the bounds allow it.
    """
    best = np.minimum.accumulate(times_s, axis=1)
    fastest = best[:, -1:]
    rows = np.arange(ratios.shape[0])

    def ratio_at(deadline: float) -> FloatArray:
        return ratios[rows, (best > np.maximum(deadline, fastest)).sum(axis=1)]

    candidates = np.unique(best)
    # The slowest time of all lets every device stay at its lower bound, so the last candidate always qualifies
    # unless the target lies below all lower bounds, where the last candidate is the answer too.
    first, last = 0, candidates.size - 1
    while first < last:
        middle = (first + last) // 2
        if ratio_at(candidates[middle]).mean() <= target_mean:
            last = middle
        else:
            first = middle + 1
    deadline = float(candidates[last])
    under = ratio_at(deadline)
    over = ratio_at(candidates[last - 1]) if last > 0 else ratios[:, -1]
    missing, room = target_mean - under.mean(), over.mean() - under.mean()
    part = min(1.0, max(0.0, missing / room)) if room > 0 else 0.0
    return deadline, recentre(under + part * (over - under), target_mean, ratios[:, 0], ratios[:, -1])


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
    low, high = context.ratio_low[:, None], context.ratio_high[:, None]
    ratios = np.clip(grid, low, high)
    smallest = ask.ranks[0]
    at_grid, at_low, at_high = (ask.work(ratio, ratio, smallest) for ratio in (grid, low, high))
    grid_times = np.empty_like(ratios)
    for start in range(0, context.clients.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        below, above = grid < low[part], grid > high[part]
        work = Work(
            *(
                np.where(below, low_value[part], np.where(above, high_value[part], value))
                for value, low_value, high_value in zip(
                    _fields(at_grid), _fields(at_low), _fields(at_high), strict=True
                )
            )
        )
        grid_times[part] = times(context.clients[part], work)
    deadline, ratio = common_deadline(grid_times, ratios, context.schedule_ratio)
    # The exact ratio lies between two grid points: ranks are weighed at it, not at its neighbour.
    work = ask.work(context.ratio_before[:, None], ratio[:, None], ask.ranks)
    highest = np.full(ratio.shape, ask.ranks.size - 1) if highest_rank is None else highest_rank
    expected = times(context.clients, work)
    # The round lasts as long as its slowest client at its fastest rank, whatever the deadline: others may use that.
    deadline = max(deadline, float(expected.min(axis=1).max()))
    weighed = expected if cautious_times is None else cautious_times(context.clients, work)
    return Arms(ratio=ratio, rank=ask.ranks[largest_ranks(weighed, deadline, expected.argmin(axis=1), highest)])


def _fields(work: Work) -> tuple[FloatArray, ...]:
    """The arrays of a work, in the order of its fields."""
    return tuple(getattr(work, field.name) for field in fields(work))
