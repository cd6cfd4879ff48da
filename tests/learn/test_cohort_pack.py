"""Packed batches against naive padding: every token once, and nothing of one sentence in another."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from cohort_toys import toy_text
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.learn.cohort.pack import PackRule, pack

CPU = torch.device("cpu")
RULE = PackRule(pooling="first", first_position=0, pad_token=0, length_step=4)
TEXT = toy_text(30, seed=4)


@st.composite
def cases(draw):
    """Uneven batches; a sample may come twice; sentences rounded up to any step."""
    samples = st.lists(st.integers(0, len(TEXT) - 1), min_size=1, max_size=5).map(np.array)
    parts = draw(st.lists(samples, min_size=1, max_size=4))
    pooling = draw(st.sampled_from(["first", "last", "mean"]))
    roberta = draw(st.booleans())
    return parts, PackRule(pooling, 2 * roberta, int(roberta), draw(st.sampled_from([1, 4, 64])))


def sentences(parts):
    """(client, slot, sample) of every sentence."""
    return [(c, slot, int(sample)) for c, part in enumerate(parts) for slot, sample in enumerate(part)]


def tokens_of(sample):
    return TEXT.input_ids[sample, : TEXT.lengths[sample]]


def spans(parts, batch):
    """First packed row of every sentence: one after another in the client's row."""
    starts, place = {}, 0
    for client, part in enumerate(parts):
        place = client * batch.tokens
        for slot, sample in enumerate(part):
            starts[client, slot] = place
            place += int(TEXT.lengths[sample])
    return starts


@settings(max_examples=80, deadline=None)
@given(cases())
def test_every_token_lands_once_with_its_position_type_and_label(case):
    parts, rule = case
    batch = pack(TEXT, parts, rule, CPU, torch.float64)
    assert (batch.clients, batch.slots) == (len(parts), max(map(len, parts)))
    assert batch.tokens == max(int(TEXT.lengths[part].sum()) for part in parts)
    ids, positions, types = (
        tensor.squeeze(0).numpy() for tensor in (batch.input_ids, batch.position_ids, batch.token_type_ids)
    )
    untouched = np.ones(len(ids), dtype=bool)
    starts = spans(parts, batch)
    for client, slot, sample in sentences(parts):
        own = slice(starts[client, slot], starts[client, slot] + int(TEXT.lengths[sample]))
        assert untouched[own].all()
        untouched[own] = False
        assert np.array_equal(ids[own], tokens_of(sample))
        assert np.array_equal(types[own], TEXT.token_type_ids[sample, : TEXT.lengths[sample]])
        if rule.first_position == 0:
            want = np.arange(len(tokens_of(sample)))
        else:  # RoBERTa: padding tokens keep the padding's position and are not counted
            counted = tokens_of(sample) != rule.pad_token
            want = np.where(counted, np.cumsum(counted), 0) + rule.first_position - 1
        assert np.array_equal(positions[own], want)
        assert int(batch.labels[client, slot]) == TEXT.labels[sample]
        assert float(batch.weights[client, slot]) == pytest.approx(1 / len(parts[client]))
    assert (ids[untouched] == rule.pad_token).all()
    torch.testing.assert_close(batch.weights.sum(dim=1), torch.ones(len(parts), dtype=torch.float64))
    for client, part in enumerate(parts):
        assert not batch.weights[client, len(part) :].any()


@settings(max_examples=80, deadline=None)
@given(cases())
def test_buckets_hold_every_sentence_once_padded_like_a_plain_batch(case):
    parts, rule = case
    batch = pack(TEXT, parts, rule, CPU, torch.float64)
    rows = torch.arange(1.0, 1.0 + batch.clients * batch.tokens, dtype=torch.float64).unsqueeze(1)
    laid = rows if batch.to_buckets is None else batch.to_buckets.forth(rows)
    starts, seen, place = spans(parts, batch), [], 0
    for bucket in batch.buckets:
        block = laid[place : place + bucket.sentences * bucket.length].view(bucket.sentences, bucket.length)
        place += bucket.sentences * bucket.length
        lengths = (block > 0).sum(dim=1)
        assert int(lengths.max()) == bucket.length
        # Lengths that round up to the same number.
        assert len({-(-int(length) // rule.length_step) for length in lengths}) == 1
        is_padding = torch.zeros(block.shape, dtype=torch.bool)
        for row, length in enumerate(lengths.tolist()):
            start = int(block[row, 0]) - 1
            assert block[row, :length].tolist() == [1.0 + start + i for i in range(length)]
            assert not block[row, length:].any()
            is_padding[row, length:] = True
            seen.append((start, length))
        if bucket.padding is None:
            assert not is_padding.any()
        else:
            assert bucket.padding.shape == (bucket.sentences, 1, 1, bucket.length)
            assert torch.equal(bucket.padding[:, 0, 0] < -1e300, is_padding)
            assert not bucket.padding[:, 0, 0][~is_padding].any()
    assert place == len(laid)
    assert sorted(seen) == sorted((starts[c, slot], int(TEXT.lengths[sample])) for c, slot, sample in sentences(parts))
    if batch.to_buckets is not None:
        real = torch.zeros(len(rows), 1, dtype=torch.bool)
        for start, length in seen:
            real[start : start + length] = True
        assert torch.equal(batch.to_buckets.reverse(laid), rows * real)


@settings(max_examples=80, deadline=None)
@given(cases())
def test_pooling_reads_the_right_tokens(case):
    parts, rule = case
    batch = pack(TEXT, parts, rule, CPU, torch.float64)
    rows = torch.arange(1.0, 1.0 + batch.clients * batch.tokens, dtype=torch.float64).unsqueeze(1)
    starts = spans(parts, batch)
    if rule.pooling == "mean":
        assert batch.readout is None
        assert batch.readout_to_buckets is None
        pooled = torch.bmm(batch.averages, rows.view(batch.clients, batch.tokens, 1)).view(batch.clients, batch.slots)
    else:
        assert batch.averages is None
        pooled = batch.readout.forth(rows).view(batch.clients, batch.slots)
    want = torch.zeros(batch.clients, batch.slots, dtype=torch.float64)
    for client, slot, sample in sentences(parts):
        start, length = starts[client, slot], int(TEXT.lengths[sample])
        places = {"first": [start], "last": [start + length - 1], "mean": range(start, start + length)}[rule.pooling]
        want[client, slot] = np.mean([place + 1.0 for place in places])
    torch.testing.assert_close(pooled, want)
    if rule.pooling != "mean":
        # Slots in the buckets' order: the token that is read belongs to the sentence of that place.
        flat = pooled.view(-1, 1)
        ordered = flat if batch.readout_to_buckets is None else batch.readout_to_buckets.forth(flat)
        laid = rows if batch.to_buckets is None else batch.to_buckets.forth(rows)
        assert len(ordered) == sum(bucket.sentences for bucket in batch.buckets)
        sentence = iter(ordered[:, 0].tolist())
        place = 0
        for bucket in batch.buckets:
            for _ in range(bucket.sentences):
                assert next(sentence) in laid[place : place + bucket.length, 0].tolist()
                place += bucket.length


def test_one_full_row_needs_no_moving_and_no_mask():
    text = dataclasses.replace(TEXT, lengths=np.full(len(TEXT), 5), token_type_ids=None)
    batch = pack(text, [np.array([1, 2]), np.array([3, 4])], RULE, CPU, torch.float32)
    assert batch.to_buckets is None
    assert batch.token_type_ids is None
    (bucket,) = batch.buckets
    assert (bucket.sentences, bucket.length, bucket.padding) == (4, 5, None)
    assert batch.readout.take.tolist() == [0, 5, 10, 15]
    assert batch.weights.dtype == torch.float32
