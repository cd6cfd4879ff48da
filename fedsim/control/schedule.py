"""How far the fleet should be pruned after each round, and how far each device may go.

The rise is the cubic schedule of Zhu and Gupta 2017 (arXiv 1710.01878, eq. 1), from zero, one step a round.
The bounds are [ours]: FedSpine (arXiv 2501.02438) does not say how a device's ratio accumulates.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from fedsim.contracts.common import FloatArray
from fedsim.settings import PruneSettings

_LEAST_STEP_MAX = 0.05
_STEP_MARGIN = 1.5


def cubic_ratio(round_index: int, warmup_rounds: int, end_round: int, target: float) -> float:
    """Ratio where the fleet mean should be after a round.

    Args:
        round_index: 0-based.
        warmup_rounds: rounds before the first cut; the ratio is 0 in all of them.
        end_round: exclusive end of the rise, above `warmup_rounds`; the ratio is `target` from ``end_round - 1`` on.
        target: final ratio in [0, 1).
    Returns:
        ``target * (1 - (1 - t)^3)`` with t the share of the rise that is done after this round.
    Raises:
        ValueError: `end_round` is not above `warmup_rounds`.
    """
    if end_round <= warmup_rounds:
        raise ValueError(f"end_round {end_round} must be above warmup_rounds {warmup_rounds}")
    done = (round_index + 1 - warmup_rounds) / (end_round - warmup_rounds)
    return float(target) * (1.0 - (1.0 - min(1.0, max(0.0, done))) ** 3)


def default_step_max(
    warmup_rounds: int, end_round: int, target: float, *, clients: int, participants_per_round: int
) -> float:
    """Largest rise of a device's ratio in one participation, where ``prune.max_step`` is null.

    The larger of 0.05 and 1.5 times the schedule's largest step (its first) times clients / participants, because a
    device that is sampled rarely must catch up with all the rounds it missed; at most 1. [ours]
    """
    first_step = cubic_ratio(warmup_rounds, warmup_rounds, end_round, target)
    return min(1.0, max(_LEAST_STEP_MAX, _STEP_MARGIN * first_step * clients / participants_per_round))


def ratio_cap(prune: PruneSettings) -> float:
    """The highest ratio any device may ever reach: the common target, or ``prune.max_ratio`` for a fleet mean."""
    return prune.target if prune.target_scope == "every_device" else prune.max_ratio


def feasible_bounds(
    prune: PruneSettings,
    *,
    round_index: int,
    ratio_before: ArrayLike,
    warmup_rounds: int,
    end_round: int,
    step_max: float,
) -> tuple[FloatArray, FloatArray]:
    """Feasible cumulative ratios of one round.

    * Warm-up: nothing is pruned (a ratio reached before the first round stays where groups cannot come back).
    * Upper bound: the cap (`ratio_cap`), and `step_max` above the ratio before.
    * Lower bound: the ratio before, or 0 where groups may come back (``prune.reversible``).
    * From `end_round` on, with ``target_scope: every_device``: everyone goes to the target as fast as steps allow.
      A fleet mean has no such floor: the final cut re-centres it.

    Args:
        prune: target, scope, cap and reversibility.
        ratio_before: cumulative ratios as last asked, shape (P,).
        step_max: largest rise in one participation.
    Returns:
        ``(low, high)``, shape (P,) each, ``low <= high``.
    """
    before = np.asarray(ratio_before, dtype=np.float64)
    low = np.zeros_like(before) if prune.reversible else before.copy()
    if round_index < warmup_rounds:
        return low, low.copy()
    high = np.minimum(ratio_cap(prune), before + step_max)
    if round_index >= end_round and prune.target_scope == "every_device":
        low = np.maximum(low, high)
    return low, np.maximum(high, low)
