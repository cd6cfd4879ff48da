"""Index axes of stacked, sliced weights against loops over clients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsim.learn.cohort.axes import Axis, Widths, group_axis
from fedsim.learn.model.linears import kept_columns, kept_rows, prunable_linears
from fedsim.structure import ModelShape, Structure

CPU = torch.device("cpu")


def nonempty(masks):
    """At least one group stays per client."""
    masks[np.arange(len(masks)), np.arange(len(masks)) % masks.shape[1]] = True
    return masks


MASKS = hnp.arrays(np.bool_, st.tuples(st.integers(1, 4), st.integers(1, 6))).map(nonempty)
SAME = st.tuples(st.integers(1, 4), hnp.arrays(np.bool_, st.integers(1, 6))).map(
    lambda pair: np.tile(nonempty(pair[1][None]), (pair[0], 1))
)
ANY = st.one_of(MASKS, SAME)
WIDTH = st.integers(1, 3)


def kept(masks, width):
    """Per client the kept features."""
    return [np.flatnonzero(np.repeat(row, width)) for row in masks]


def padded(rows, longest, places):
    """``(C, longest, ...)`` with each client's kept rows first and zeros after them."""
    result = torch.zeros(len(places), longest, *rows.shape[2:], dtype=rows.dtype)
    for client, own in enumerate(places):
        result[client, : len(own)] = rows[client][own]
    return result


@settings(max_examples=80, deadline=None)
@given(ANY, WIDTH)
def test_kept_places_of_shared_and_stacked_tensors(masks, width):
    axis = group_axis(masks, CPU).widened(width)
    places = kept(masks, width)
    clients, full, longest = len(masks), masks.shape[1] * width, max(map(len, places))
    assert axis.full == full
    shared = torch.arange(1.0, 1.0 + full * 2).view(full, 2)
    want = padded(shared.expand(clients, full, 2), longest, places)
    for tensor, along in ((shared, 0), (shared.T.contiguous(), 1)):
        own = axis.of_shared(tensor, along)
        own = own.expand(clients, *own.shape[-2:])  # shared where all keep the same
        assert torch.equal(own if along == 0 else own.transpose(1, 2), want)
    bias = axis.of_shared(shared[:, 0], 0)
    assert torch.equal(bias.expand(clients, bias.shape[-1]), want[:, :, 0])
    stack = torch.arange(1.0, 1.0 + clients * 3 * full).view(clients, 3, full)
    assert torch.equal(axis.of_stack(stack), padded(stack.transpose(1, 2), longest, places).transpose(1, 2))
    # The frozen weights and the adapter stay as they were.
    assert torch.equal(shared, torch.arange(1.0, 1.0 + full * 2).view(full, 2))
    assert torch.equal(stack, torch.arange(1.0, 1.0 + clients * 3 * full).view(clients, 3, full))


@settings(max_examples=80, deadline=None)
@given(ANY)
def test_spread_puts_values_back_and_zero_elsewhere(masks):
    axis, places = group_axis(masks, CPU), kept(masks, 1)
    longest = max(map(len, places))
    values = torch.arange(1.0, 1.0 + len(masks) * longest).view(len(masks), longest)  # on the filling too
    want = torch.zeros(masks.shape)
    for client, own in enumerate(places):
        want[client, own] = values[client, : len(own)]
    assert torch.equal(axis.spread(values), want)


@settings(max_examples=150, deadline=None)
@given(ANY, WIDTH, st.data())
def test_places_within_a_wider_axis(masks, width, data):
    """Slicing twice is slicing once: what a cut in mid-job does to factors and moments."""
    rows = data.draw(hnp.arrays(np.bool_, masks.shape))
    smaller = masks & (rows[:1] if data.draw(st.booleans()) else rows)
    first = masks.argmax(axis=1)
    smaller[np.arange(len(masks)), first] = True
    old, new = group_axis(masks, CPU).widened(width), group_axis(smaller, CPU).widened(width)
    full, clients = masks.shape[1] * width, len(masks)
    stack = torch.arange(1.0, 1.0 + clients * 2 * full).view(clients, 2, full)
    within = new.within(old, clients)
    assert torch.equal(within.of_stack(old.of_stack(stack)), new.of_stack(stack))


def test_axes_are_shared_where_clients_are_alike():
    assert group_axis(np.ones((3, 4), dtype=bool), CPU).index is None
    alike = np.tile([True, False, True], (3, 1))
    assert group_axis(alike, CPU).index.tolist() == [0, 2]
    even = np.array([[True, False], [False, True]])
    axis = group_axis(even, CPU)
    assert axis.index.tolist() == [[0], [1]]
    assert axis.valid is None
    uneven = group_axis(np.array([[True, True], [False, True]]), CPU)
    assert uneven.index.tolist() == [[0, 1], [1, 0]]
    assert uneven.valid.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_widths_keep_the_features_that_slicing_keeps(architecture):
    """Against `kept_rows` and `kept_columns`, which the reference engine slices by; grouped queries included."""
    shape = ModelShape(
        "toy", architecture, 2, 8, 4, 2 if architecture == "llama" else 4, 2, 6, 10, 0, gated=architecture == "llama"
    )
    draw, structures = np.random.default_rng(0), []
    for _ in range(3):
        heads = nonempty(draw.random((2, shape.head_groups)) < 0.5)
        structures.append(Structure(heads, nonempty(draw.random((2, shape.ffn)) < 0.5)))
    widths = Widths.of(shape, structures, True, CPU)
    for linear in prunable_linears(shape):
        axis = widths.features(linear)
        for client, structure in enumerate(structures):
            rows, columns = kept_rows(linear, structure, shape), kept_columns(linear, structure, shape)
            mine = columns if rows is None else rows
            want = np.arange(axis.full) if mine is None else mine
            index = torch.arange(axis.full) if axis.index is None else axis.index
            own = index if index.dim() == 1 else index[client]
            own = own if axis.valid is None else own[axis.valid[client]]
            assert own.tolist() == want.tolist()
    hidden = Widths.of(shape, structures, False, CPU)
    assert all(axis.index is None for axis in (*hidden.heads, *hidden.channels))
    assert np.array_equal(hidden.head_masks, widths.head_masks)


def test_the_full_axis_changes_nothing():
    axis, tensor = Axis(4, None, None), torch.arange(8.0).view(2, 1, 4)
    assert axis.of_stack(tensor) is tensor
    assert axis.widened(3).full == 12
    assert torch.equal(axis.spread(tensor[:, 0]), tensor[:, 0])
