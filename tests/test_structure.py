"""Counts, ratios and masks of prunable structures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.structure import ModelShape, Structure, achieved_ratio, kept_counts, largest_ratio

ROBERTA = ModelShape("roberta-base", "roberta", 12, 768, 12, 12, 64, 3072, 50265, 514, pooler_width=768)
LLAMA = ModelShape("grouped", "llama", 3, 64, 8, 2, 8, 96, 100, 0, gated=True)


def test_prunable_weights_are_those_of_the_blocks():
    assert ROBERTA.prunable_weights == 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    # Grouped queries: q and o have 8 heads, k and v have 2; gate, up and down.
    assert LLAMA.prunable_weights == 3 * (2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 96)
    assert LLAMA.head_groups == 2
    assert ROBERTA.head_weights == 768 * 769 + 2 * 769


@given(st.floats(0.0, 1.0), st.sampled_from([ROBERTA, LLAMA]))
def test_counts_are_the_nearest_and_leave_one_of_each(ratio, shape):
    heads, channels = kept_counts(shape, ratio)
    assert 1 <= heads <= shape.head_groups
    assert 1 <= channels <= shape.ffn
    assert abs(heads - max(1, (1 - ratio) * shape.head_groups)) <= 0.5 + 1e-9
    assert abs(channels - max(1, (1 - ratio) * shape.ffn)) <= 0.5 + 1e-9


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=30))
def test_counts_never_rise_with_the_ratio(ratios):
    heads, channels = kept_counts(ROBERTA, np.sort(ratios))
    assert (np.diff(heads) <= 0).all()
    assert (np.diff(channels) <= 0).all()


def test_achieved_ratio_counts_removed_weights():
    """Against a count of the masks' weights, one group after another."""
    rng = np.random.default_rng(2)
    for shape in (ROBERTA, LLAMA):
        structure = Structure(
            rng.random((shape.layers, shape.head_groups)) < 0.6, rng.random((shape.layers, shape.ffn)) < 0.4
        )
        removed = 0
        for layer in range(shape.layers):
            removed += sum(shape.weights_per_head_group for kept in structure.head_mask[layer] if not kept)
            removed += sum(shape.weights_per_channel for kept in structure.channel_mask[layer] if not kept)
        assert structure.ratio(shape) == pytest.approx(removed / shape.prunable_weights)


def test_half_of_roberta_is_exactly_half():
    heads, channels = kept_counts(ROBERTA, 0.5)
    assert (heads, channels) == (6, 1536)
    assert achieved_ratio(ROBERTA, [heads], [channels]) == 0.5
    assert Structure.full(ROBERTA).ratio(ROBERTA) == 0.0


def test_largest_ratio_leaves_one_of_each():
    assert largest_ratio(ROBERTA) == pytest.approx(1 - (4 * 64 * 768 + 2 * 768) / (4 * 768**2 + 2 * 768 * 3072))


def test_same_as_compares_masks():
    one, other = Structure.full(LLAMA), Structure.full(LLAMA)
    assert one.same_as(other)
    other.head_mask[0, 0] = False
    assert not one.same_as(other)
