"""Move many ratios by one common shift so that their mean lands on a target, within bounds."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from fedsim.contracts.common import FloatArray

_BISECTIONS = 200
_TOLERANCE = 1e-13


def recentre(ratio: ArrayLike, target_mean: float, low: ArrayLike, high: ArrayLike) -> FloatArray:
    """Shift all ratios by one amount, clip to the bounds, so that the mean is `target_mean` (water-filling).

    The shift is found by bisection; the clients that are not held by a bound keep their differences. Where the
    bounds do not allow the target, the result is the reachable mean nearest to it: all at `low`, or all at `high`.
    This is what "the server re-centres" means here [ours: FedSpine, arXiv 2501.02438, does not say how a common
    sparsity is kept].

    Args:
        ratio: wished ratios, shape (P,), P may be 0.
        target_mean: wished mean over the P clients.
        low, high: bounds, broadcast to (P,); ``low <= high``.
    Returns:
        Ratios within the bounds, shape (P,), whose mean is the target to 1e-9 where it is reachable.
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
