"""What the bandits share: the ratio's axis of the arm space, the upper confidence bound, and room for more leaves.

A device's pruning ratio is a number x in [0, 1]: with ``control.arms: absolute`` p = x * ratio_max, with ``offset``
p = schedule + (2 x - 1) * `OFFSET_SPAN`, after which the server shifts all participants so that their mean is on the
schedule [ours; FedSpine, arXiv 2501.02438, does not say how a device's ratio accumulates].
"""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.contracts.control import RoundContext
from fedsim.control.recentre import recentred
from fedsim.settings import ControlSettings

OFFSET_SPAN = 0.2
"""Largest deviation from the schedule that an offset arm asks for [ours]. At a fleet mean of 0.5 it levels devices
whose speeds differ by 2.3 times; twice as much made exploring devices set the length of every round. Re-centring may
carry a device further."""
NEVER_PLAYED = 1e-9
"""A discounted count below this counts as none."""
LEAST_CHILD_SHARE = 0.01
"""A cut at the played point leaves each child at least this share of the side, else it is made in the middle."""
BLOCK = 1024
"""Clients weighed at once: their arms then stay in the processor's cache, and memory stays bounded."""


def feasible_interval(context: RoundContext, settings: ControlSettings) -> tuple[FloatArray, FloatArray]:
    """Lowest and highest feasible x of each participant, shape (P,) each.

    A feasible set beyond [0, 1] is met by its nearest end; the ratio itself is clipped afterwards.
    """
    bounds = np.stack([context.ratio_low, context.ratio_high])
    if settings.arms == "offset":
        x = 0.5 * (1.0 + (bounds - context.schedule_ratio) / OFFSET_SPAN)
    else:
        x = bounds / context.ratio_max if context.ratio_max > 0 else np.zeros_like(bounds)
    low, high = np.clip(x, 0.0, 1.0)
    return low, high


def ratio_at(context: RoundContext, settings: ControlSettings, x: FloatArray) -> FloatArray:
    """Ratios that the participants' x (P,) stand for, within their bounds; offset arms re-centred."""
    low, high = context.ratio_low, context.ratio_high
    if settings.arms == "absolute":
        return np.clip(x * context.ratio_max, low, high)
    wish = np.clip(context.schedule_ratio + (2.0 * x - 1.0) * OFFSET_SPAN, low, high)
    return recentred(wish, context)


def best_bound(
    count: FloatArray, reward: FloatArray, playable: np.ndarray, exploration: float, draws: FloatArray
) -> IntArray:
    """The playable arm with the largest U = S/N + s sqrt(max(0, ln n)/N) of each client.

    n is the sum of N over the playable arms; N up to `NEVER_PLAYED` gives +inf (D-UCB, arXiv 0805.3415, whose
    2 B sqrt(xi) is s).

    Args:
        count, reward: discounted N and S, shape (arms, P).
        playable: boolean (arms, P), at least one per client.
        draws: a number in (0, 1) per client, (P,): which of the arms that tie is taken.
    Returns:
        Places of the arms, (P,).
    """
    count = np.where(playable, count, 0.0)
    total = np.zeros(draws.size)
    for of_arm in count:  # one by one, in order: pairwise summation would round otherwise
        total += of_arm
    bonus = np.log(np.maximum(total, 1.0))
    seen = count > NEVER_PLAYED
    safe = np.where(seen, count, 1.0)
    value = reward / safe + exploration * np.sqrt(bonus / safe)
    value = np.where(seen, value, np.where(playable, np.inf, -np.inf))
    tied = value == value.max(axis=0)
    wanted = np.floor(draws * tied.sum(axis=0, dtype=np.int32))
    passed, place = np.zeros(draws.size, dtype=np.int32), np.zeros(draws.size, dtype=np.int64)
    for of_arm in tied:  # the wanted one is the first arm at which more than `wanted` tied ones were passed
        passed += of_arm
        place += passed <= wanted
    return place


def cut_point(start: FloatArray, end: FloatArray, point: FloatArray, settings: ControlSettings) -> FloatArray:
    """Where a side is cut, as ``control.cut`` says: in its middle, or at the played point unless that is too near."""
    at = 0.5 * (start + end)
    if settings.cut == "played":
        margin = LEAST_CHILD_SHARE * (end - start)
        at = np.where((point - start >= margin) & (end - point >= margin), point, at)
    return at


def doubled(array: FloatArray, empty: float) -> FloatArray:
    """Twice the room for leaves, the last axis but one; `empty` in the new part."""
    return np.concatenate([array, np.full_like(array, empty)], axis=-2)
