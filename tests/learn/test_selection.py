"""Selecting groups: exact counts, never more than the pool, one of each kind per layer, and the worst first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.errors import ConfigError
from fedsim.learn.train.importance import GroupScores
from fedsim.learn.train.selection import grow, select
from fedsim.structure import ModelShape, Structure, kept_counts, largest_ratio


def encoder(layers: int, heads: int, ffn: int) -> ModelShape:
    return ModelShape("toy", "bert", layers, 4 * heads, heads, heads, 4, ffn, 50, 20)


SHAPES = st.builds(encoder, st.integers(1, 4), st.integers(1, 6), st.integers(1, 20))


def scores_of(shape: ModelShape, seed: int, levels: int = 1000) -> GroupScores:
    """Integer scores, so that few levels make many ties."""
    rng = np.random.default_rng(seed)
    return GroupScores(
        rng.integers(0, levels, (shape.layers, shape.head_groups)).astype(float),
        rng.integers(0, levels, (shape.layers, shape.ffn)).astype(float),
    )


def within(inner: Structure, outer: Structure) -> bool:
    return not ((inner.head_mask & ~outer.head_mask).any() or (inner.channel_mask & ~outer.channel_mask).any())


@settings(deadline=None)
@given(SHAPES, st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1), st.sampled_from([2, 1000]))
def test_layer_local_counts_subset_and_order(shape, seed, first, second, levels):
    scores = scores_of(shape, seed, levels)
    low, high = sorted((first * largest_ratio(shape), second * largest_ratio(shape)))
    start = select(scores_of(shape, seed + 1), Structure.full(shape), shape, low, "layer_local")
    result = select(scores, start, shape, high, "layer_local")
    heads, channels = kept_counts(shape, high)
    assert (result.heads_kept == heads).all()
    assert (result.channels_kept == channels).all()
    assert within(result, start)
    for kept, pool, values in (
        (result.head_mask, start.head_mask, scores.heads),
        (result.channel_mask, start.channel_mask, scores.channels),
    ):
        for layer in range(shape.layers):
            gone = np.flatnonzero(pool[layer] & ~kept[layer])
            for index in np.flatnonzero(kept[layer]):
                better = (values[layer, gone] > values[layer, index]).any()
                tie_before = ((values[layer, gone] == values[layer, index]) & (gone < index)).any()
                assert not better
                assert not tie_before


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([np.nan, -np.inf, -1.0, 0.0, -0.0, 1.0, 2.0, np.inf]), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    st.floats(0, 0.95),
)
def test_layer_local_is_a_sort_by_score_and_index(channels, ratio):
    """Any pool and any values: infinite ones, zeros of both signs, and NaN, which counts as the lowest."""
    shape = encoder(1, 1, len(channels))
    ratio = min(ratio, largest_ratio(shape))
    values, pool = (np.array(column) for column in zip(*channels, strict=True))
    start = Structure(np.ones((1, 1), dtype=bool), pool[None])
    result = select(GroupScores(np.zeros((1, 1)), values[None]), start, shape, ratio, "layer_local")
    ranks = sorted((-np.inf if np.isnan(value) else value, -index) for index, value in enumerate(values) if pool[index])
    count = int(kept_counts(shape, ratio)[1])
    best = sorted(-index for _, index in ranks[::-1][:count])
    assert np.flatnonzero(result.channel_mask[0]).tolist() == best


def slow_global(scores: GroupScores, start: Structure, shape: ModelShape, ratio: float) -> Structure:
    """Drop one group at a time, the lowest per parameter that may go, until the ratio is reached."""
    kept = Structure(start.head_mask.copy(), start.channel_mask.copy())
    while kept.ratio(shape) < ratio - 1e-9:
        options = []
        for layer in range(shape.layers):
            for kind, (mask, values, weights) in enumerate(
                (
                    (kept.head_mask, scores.heads, shape.weights_per_head_group),
                    (kept.channel_mask, scores.channels, shape.weights_per_channel),
                )
            ):
                members = np.flatnonzero(mask[layer])
                if len(members) > 1:
                    options += [(values[layer, i] / weights, -layer, -kind, -i) for i in members]
        _, layer, kind, index = min(options)
        (kept.channel_mask if kind else kept.head_mask)[-layer, -index] = False
    return kept


@settings(deadline=None)
@given(SHAPES, st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1), st.sampled_from([2, 1000]))
def test_global_equals_dropping_one_at_a_time(shape, seed, first, second, levels):
    scores = scores_of(shape, seed, levels)
    low, high = sorted((first * largest_ratio(shape), second * largest_ratio(shape)))
    start = select(scores_of(shape, seed + 1), Structure.full(shape), shape, low, "global")
    result = select(scores, start, shape, high, "global")
    assert result.same_as(slow_global(scores, start, shape, high))
    assert within(result, start)
    assert result.heads_kept.min() >= 1
    assert result.channels_kept.min() >= 1
    assert result.ratio(shape) >= high - 1e-9


@settings(deadline=None)
@given(SHAPES, st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_growing_adds_the_best_and_removes_nothing(shape, seed, first, second):
    scores = scores_of(shape, seed, 3)
    low, high = sorted((first * largest_ratio(shape), second * largest_ratio(shape)))
    start = select(scores_of(shape, seed + 1), Structure.full(shape), shape, high, "layer_local")
    result = grow(scores, start, shape, low)
    heads, channels = kept_counts(shape, low)
    assert (result.heads_kept == heads).all()
    assert (result.channels_kept == channels).all()
    assert within(start, result)
    for layer in range(shape.layers):
        added = np.flatnonzero(result.channel_mask[layer] & ~start.channel_mask[layer])
        left = np.flatnonzero(~result.channel_mask[layer])
        if len(added) and len(left):
            assert scores.channels[layer, added].min() >= scores.channels[layer, left].max()
    assert grow(scores, result, shape, high).same_as(result)


@pytest.mark.parametrize("selection", ["layer_local", "global"])
def test_a_lower_ratio_brings_nothing_back(selection):
    shape = encoder(2, 4, 10)
    scores, others = scores_of(shape, 1), scores_of(shape, 2)
    start = select(scores, Structure.full(shape), shape, 0.6, selection)
    assert select(others, start, shape, 0.2, selection).same_as(start)
    assert select(others, start, shape, 0.6, selection) is not start


def test_golden_by_hand():
    """One layer of width 16: 4 heads of 4 * 4 * 16 = 256 weights, 4 channels of 2 * 16 = 32."""
    shape = encoder(1, 4, 4)
    assert (shape.weights_per_head_group, shape.weights_per_channel) == (256, 32)
    scores = GroupScores(np.array([[256.0, 2560.0, 512.0, 5120.0]]), np.array([[32.0, 320.0, 16.0, np.nan]]))
    local = select(scores, Structure.full(shape), shape, 0.5, "layer_local")
    assert local.head_mask.tolist() == [[False, True, False, True]]
    assert local.channel_mask.tolist() == [[True, True, False, False]]
    # Per parameter: heads 1, 10, 2, 20; channels 1, 10, 0.5, nothing. To lose 0.3 * 1152 = 345.6 weights:
    # channels 3 and 2 (64), then of the equals the higher index: channel 0 (96), head 0 (352).
    whole = select(scores, Structure.full(shape), shape, 0.3, "global")
    assert whole.head_mask.tolist() == [[False, True, True, True]]
    assert whole.channel_mask.tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("ratio", [-0.01, 0.9, float("nan")])
def test_ratios_out_of_reach_are_refused(ratio):
    shape = encoder(2, 4, 4)  # one of four heads and channels: 0.75 at most
    for act in (
        lambda: select(scores_of(shape, 0), Structure.full(shape), shape, ratio, "layer_local"),
        lambda: grow(scores_of(shape, 0), Structure.full(shape), shape, ratio),
    ):
        with pytest.raises(ConfigError, match=r"out of reach for model 'toy' \(allowed: 0 to 0\.7500"):
            act()
    for selection in ("layer_local", "global"):
        smallest = select(scores_of(shape, 0), Structure.full(shape), shape, largest_ratio(shape), selection)
        assert smallest.heads_kept.tolist() == smallest.channels_kept.tolist() == [1, 1]


def test_unknown_selection_is_refused():
    shape = encoder(1, 2, 2)
    with pytest.raises(ConfigError, match=r"prune\.selection: unknown value 'locale'"):
        select(scores_of(shape, 0), Structure.full(shape), shape, 0.1, "locale")
