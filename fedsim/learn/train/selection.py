"""Which groups to keep, given a score for each: no tensor library, no randomness.

``layer_local`` (default): every layer keeps the same counts (`fedsim.structure.kept_counts`); heads and channels are
never ranked together. ``global``: scores per parameter, heads and channels of all layers in one ranking. At least one
group of each kind stays in every layer (FedSpine, arXiv 2501.02438, in whose summary the ranking is open: our reading).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsim.errors import ConfigError, unknown
from fedsim.structure import ModelShape, Structure, kept_counts, largest_ratio

SELECTIONS = ("layer_local", "global")
_TOLERANCE = 1e-9


class Scores(Protocol):
    """Scores of all groups at full width; higher stays. NaN counts as the lowest."""

    @property
    def heads(self) -> ArrayLike:
        """Shape ``(layers, head_groups)``."""

    @property
    def channels(self) -> ArrayLike:
        """Shape ``(layers, ffn)``."""


def select(scores: Scores, start: Structure, shape: ModelShape, ratio: float, selection: str) -> Structure:
    """Keep the best groups until the pruning ratio is reached.

    Ties go to the lower index (in ``global``: lower layer, then heads before channels, then lower index). A structure
    that is pruned further than asked stays as it is: nothing grows back here (see `grow`).

    Args:
        start: only its groups may be kept.
        ratio: cumulative pruning ratio to reach. ``layer_local`` takes the nearest counts, so that the achieved ratio
            may differ either way; ``global`` removes groups, worst first, until the ratio is reached.
        selection: ``layer_local`` or ``global``.
    Raises:
        ConfigError: a ratio below 0, or above what one head group and one channel per layer leave; or an unknown
            `selection`.
    """
    _check_ratio(shape, ratio)
    heads, channels = _clean(scores.heads), _clean(scores.channels)
    if selection == "layer_local":
        keep_heads, keep_channels = kept_counts(shape, ratio)
        return Structure(
            _best(heads, start.head_mask, int(keep_heads)), _best(channels, start.channel_mask, int(keep_channels))
        )
    if selection == "global":
        return _select_global(heads, channels, start, shape, ratio)
    raise ConfigError(f"prune.selection: {unknown('value', selection, SELECTIONS)}")


def grow(scores: Scores, start: Structure, shape: ModelShape, ratio: float) -> Structure:
    """Add back the best missing groups, in each layer up to the counts of `ratio`. Nothing is removed.

    Raises:
        ConfigError: a ratio out of range, as in `select`.
    """
    _check_ratio(shape, ratio)
    keep_heads, keep_channels = kept_counts(shape, ratio)
    return Structure(
        _add_best(_clean(scores.heads), start.head_mask, int(keep_heads)),
        _add_best(_clean(scores.channels), start.channel_mask, int(keep_channels)),
    )


def _check_ratio(shape: ModelShape, ratio: float) -> None:
    largest = largest_ratio(shape)
    if not 0.0 <= ratio <= largest + _TOLERANCE:
        raise ConfigError(
            f"pruning ratio {ratio:g} is out of reach for model '{shape.name}' (allowed: 0 to {largest:.4f}, which "
            "leaves one head group and one channel in every layer)"
        )


def _clean(scores: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    return np.where(np.isnan(values), -np.inf, values)


def _best(scores: NDArray[np.float64], pool: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """Per row, the `count` >= 1 best members of `pool` (all of them where there are fewer); of equals the first."""
    ranked = np.where(pool, scores, -np.inf)
    place = ranked.shape[-1] - min(count, ranked.shape[-1])
    # The score of the last one that stays: a partition costs a tenth of a sort by score and index.
    last = np.partition(ranked, place, axis=-1)[..., place : place + 1]
    above, equal = ranked > last, (ranked == last) & pool
    room = count - above.sum(axis=-1, keepdims=True)
    return above | (equal & (np.cumsum(equal, axis=-1) <= room))


def _add_best(scores: NDArray[np.float64], kept: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    grown = kept.copy()
    for layer in range(len(kept)):
        missing = count - int(kept[layer].sum())
        if missing > 0:
            grown[layer] |= _best(scores[layer : layer + 1], ~kept[layer : layer + 1], missing)[0]
    return grown


def _select_global(
    heads: NDArray[np.float64], channels: NDArray[np.float64], pool: Structure, shape: ModelShape, ratio: float
) -> Structure:
    """Drop the lowest scores per parameter, never a layer's best head group or best channel."""
    per_parameter = np.hstack([heads / shape.weights_per_head_group, channels / shape.weights_per_channel])
    weights = np.hstack(
        [np.full(heads.shape, shape.weights_per_head_group), np.full(channels.shape, shape.weights_per_channel)]
    ).ravel()
    kept = np.hstack([pool.head_mask, pool.channel_mask])
    protected = np.hstack([_best(heads, pool.head_mask, 1), _best(channels, pool.channel_mask, 1)])
    candidates = np.flatnonzero(kept & ~protected)[::-1]
    # Worst first; of equals the one with the higher index goes first.
    order = candidates[np.argsort(per_parameter.ravel()[candidates], kind="stable")]
    to_remove = ratio * shape.prunable_weights - (shape.prunable_weights - int(weights[kept.ravel()].sum()))
    removed = np.concatenate([[0], np.cumsum(weights[order])])
    # A hair of tolerance: a ratio that is met but for rounding is met.
    count = int(np.searchsorted(removed, to_remove - _TOLERANCE * shape.prunable_weights))
    result = kept.ravel().copy()
    result[order[: min(count, len(order))]] = False
    split = result.reshape(kept.shape)
    return Structure(split[:, : shape.head_groups].copy(), split[:, shape.head_groups :].copy())
