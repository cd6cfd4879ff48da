"""Intervals over seeds: the percentile bootstrap (Efron and Tibshirani 1993, chapter 13), with a seeded generator.

With few seeds a percentile interval is too narrow rather than too wide (three values have but ten distinct resamples);
below three there is none at all, and whoever prints one says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEAST_PAIRS = 3
"""Fewer values have no interval."""
RESAMPLES = 10_000
PERCENTILES = (2.5, 97.5)


class Interval(NamedTuple):
    """A mean and its 95% interval; `low` and `high` are NaN below three values, `mean` too without any."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], seeds: Sequence[int]) -> Interval:
    """Arithmetic mean and its 95% bootstrap interval.

    Args:
        values: one number per seed.
        seeds: the root seeds behind them, at least 0, which seed the resampling.
    """
    if not values:
        return Interval(math.nan, math.nan, math.nan)
    array = np.asarray(values, dtype=np.float64)
    if len(array) < LEAST_PAIRS:
        return Interval(float(array.mean()), math.nan, math.nan)
    generator = np.random.default_rng(np.random.SeedSequence(list(seeds)))
    means = array[generator.integers(0, len(array), size=(RESAMPLES, len(array)))].mean(axis=1)
    low, high = np.percentile(means, PERCENTILES)
    return Interval(float(array.mean()), float(low), float(high))


def ratio_interval(ratios: Sequence[float], seeds: Sequence[int]) -> Interval:
    """Geometric mean of paired positive ratios and its 95% bootstrap interval: `mean_interval` of their logarithms."""
    mean, low, high = (math.exp(one) for one in mean_interval([math.log(ratio) for ratio in ratios], seeds))
    return Interval(mean, low, high)
