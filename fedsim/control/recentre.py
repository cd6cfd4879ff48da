"""Move many ratios by one common shift so that their mean lands on a target, within bounds."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from fedsim.contracts.common import FloatArray
from fedsim.contracts.control import RoundContext

_BISECTIONS = 200
_TOLERANCE = 1e-13


def recentre(
    ratio: ArrayLike,
    target_mean: float,
    low: ArrayLike,
    high: ArrayLike,
    *,
    others: int = 0,
    others_offset: float = 0.0,
) -> FloatArray:
    """Shift all ratios by one amount, clip to the bounds, so that the mean is `target_mean` (water-filling).

    The shift is found by bisection; the clients that are not held by a bound keep their differences. Where the
    bounds do not allow the target, the result is the reachable mean nearest to it: all at `low`, or all at `high`.
    This is what "the server re-centres" means here [ours: FedSpine, arXiv 2501.02438, does not say how a common
    sparsity is kept].

    Args:
        ratio: wished ratios, shape (P,), P may be 0.
        target_mean: wished mean over the P clients.
        low, high: bounds, broadcast to (P,); ``low <= high``.
        others: clients of the fleet beside the P. They cannot move now, but count as if they moved by the same shift:
            what is centred is the whole standing fleet, not the few who take part, whose common deviation would else
            vanish by construction (with P = 1, any wish).
        others_offset: sum of how far the others stand from the target of their time.
    Returns:
        Ratios within the bounds, shape (P,). Without others their mean is the target to 1e-9 where it is reachable;
        with others the sum of all deviations from the target is 0.
    Raises:
        ValueError: a lower bound above its upper bound, or a value that is not finite.
    """
    wish = np.asarray(ratio, dtype=np.float64)
    floor = np.broadcast_to(np.asarray(low, dtype=np.float64), wish.shape)
    cap = np.broadcast_to(np.asarray(high, dtype=np.float64), wish.shape)
    if not (np.isfinite(wish).all() and np.isfinite(floor).all() and np.isfinite(cap).all()):
        raise ValueError("recentre: ratios and bounds must be finite")
    if (floor > cap).any():
        raise ValueError("recentre: a lower bound lies above its upper bound")
    if others and wish.size:
        return _among_others(wish, target_mean, floor, cap, others, others_offset)
    if wish.size == 0 or target_mean <= floor.mean():
        return floor.copy()
    if target_mean >= cap.mean():
        return cap.copy()
    shift_low, shift_high = float((floor - wish).min()), float((cap - wish).max())
    moved = np.clip(wish, floor, cap)
    error = float(moved.mean()) - target_mean
    for _ in range(_BISECTIONS):
        if abs(error) <= _TOLERANCE:
            break
        shift = 0.5 * (shift_low + shift_high)
        moved = np.clip(wish + shift, floor, cap)
        error = float(moved.mean()) - target_mean
        if error > 0:
            shift_high = shift
        else:
            shift_low = shift
    return moved


def _among_others(
    wish: FloatArray, target: float, floor: FloatArray, cap: FloatArray, others: int, offset: float
) -> FloatArray:
    """`recentre` where most of the fleet is not there: the shift at which all deviations, theirs shifted too, are 0."""

    def excess(shift: float) -> float:
        return float(np.sum(np.clip(wish + shift, floor, cap) - target)) + offset + others * shift

    shift_low = -(offset + float(np.sum(cap - target))) / others
    shift_high = -(offset + float(np.sum(floor - target))) / others
    for _ in range(_BISECTIONS):
        shift = 0.5 * (shift_low + shift_high)
        if shift in (shift_low, shift_high):
            break
        if excess(shift) > 0:
            shift_high = shift
        else:
            shift_low = shift
    return np.clip(wish + 0.5 * (shift_low + shift_high), floor, cap)


def recentred(ratio: ArrayLike, context: RoundContext) -> FloatArray:
    """`recentre` on the schedule of a dispatch, within its bounds, against the standing fleet."""
    return recentre(
        ratio,
        context.schedule_ratio,
        context.ratio_low,
        context.ratio_high,
        others=context.others,
        others_offset=context.others_offset,
    )
