"""Sentences of many clients in one batch, without padding between them.

Each client's tokens stand one after another in a row of ``T`` places, the longest client's count; only attention sees
sentences apart. It takes them in *buckets* of similar length, so that a long sentence does not pad all others.

What a batch holds comes from `fedsim.learn.train.batches`: the same samples as the reference trainer draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.learn.cohort.kernels import RowMap
from fedsim.learn.train.batches import IGNORED, EncodedText, successors

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class PackRule:
    """How a model wants its sentences.

    Attributes:
        pooling: ``first`` token, ``last`` token, or ``mean`` of the tokens; ``next``: no pooling, every token before a
            token of a response is read by itself.
        first_position: number of a sentence's first position (RoBERTa and MPNet count from their padding token
            on).
        pad_token: id on empty places; where positions count from it, a token with this id does not count as one.
        length_step: attention takes sentences together whose lengths, rounded up to this, are equal.
        owners: whether attention must know whose each sentence is.
    """

    pooling: str
    first_position: int
    pad_token: int
    length_step: int
    owners: bool = False


@dataclass(frozen=True, eq=False)
class Bucket:
    """Sentences that attention takes together: how many, the longest, and an additive mask of padding, if any.

    Attributes:
        owners: each sentence's client, ``(sentences,)``; None where `PackRule.owners` does not ask for them.
    """

    sentences: int
    length: int
    padding: torch.Tensor | None
    owners: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One batch of each of C clients: T tokens per client, and up to n slots, which are what is scored.

    A slot is a sentence, or, where responses are learned, a token whose successor belongs to a response.

    Attributes:
        clients, tokens, slots: C, T, n.
        input_ids, position_ids, token_type_ids: ``(1, C * T)``; types are None where the text has none.
        labels: ``(C, n)``, classes or successors; weights: ``(C, n)``, 1 / slots of the client, 0 on empty slots.
        buckets: in the order in which their sentences stand.
        to_buckets: packed tokens to the buckets' places ``sum(sentences * length)``; None where that is the same order.
        readout: packed tokens to the one token per sentence that is read, ``C * n`` rows; None with other pooling.
        readout_to_buckets: slots to sentences in bucket order; None where that is the same order.
        averages: ``(C, n, T)``, the weights of ``mean`` pooling; None without.
        predicting: packed tokens to slots, ``C * n`` rows, with ``next`` pooling; None without.
    """

    clients: int
    tokens: int
    slots: int
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    token_type_ids: torch.Tensor | None
    labels: torch.Tensor
    weights: torch.Tensor
    buckets: tuple[Bucket, ...]
    to_buckets: RowMap | None
    readout: RowMap | None
    readout_to_buckets: RowMap | None
    averages: torch.Tensor | None
    predicting: RowMap | None


def pack(
    text: EncodedText, samples: Sequence[IntArray], rule: PackRule, device: torch.device, dtype: torch.dtype
) -> PackedBatch:
    """Pack one batch of every client.

    Args:
        samples: per client the sample numbers of its batch, at least one each.
        dtype: of the floating tensors.
    """
    counts = np.array([len(part) for part in samples])
    clients = len(counts)
    chosen = np.concatenate(samples)
    lengths = text.lengths[chosen]
    owner = np.repeat(np.arange(clients), counts)
    ends = np.cumsum(lengths)
    per_client = np.bincount(owner, weights=lengths, minlength=clients).astype(np.int64)
    tokens = int(per_client.max())
    # First place of each sentence: its client's row, and what stands in that row before it.
    before = np.concatenate([[0], ends])[:-1] - np.repeat(np.cumsum(per_client) - per_client, counts)
    start = owner * tokens + before

    within = np.arange(lengths.max())
    real = within < lengths[:, None]
    places = (start[:, None] + within)[real]
    input_ids = np.full(clients * tokens, rule.pad_token, dtype=np.int64)
    input_ids[places] = text.input_ids[chosen, : len(within)][real]
    positions = np.full(clients * tokens, rule.first_position, dtype=np.int64)
    positions[places] = _positions(text.input_ids[chosen, : len(within)], rule)[real]
    types = None
    if text.token_type_ids is not None:
        types = np.zeros(clients * tokens, dtype=np.int64)
        types[places] = text.token_type_ids[chosen, : len(within)][real]
    scored = _next_tokens(text, chosen, start) if rule.pooling == "next" else _sentences(text, chosen)
    slot_owner = owner[scored.sentence]
    slot_counts = np.bincount(slot_owner, minlength=clients)
    slots = int(slot_counts.max())
    first_slot = np.cumsum(slot_counts) - slot_counts
    flat_slot = slot_owner * slots + np.arange(len(slot_owner)) - first_slot[slot_owner]
    labels = np.zeros(clients * slots, dtype=np.int64)
    labels[flat_slot] = scored.label
    weights = np.zeros(clients * slots)
    weights[flat_slot] = 1.0 / slot_counts[slot_owner]

    rows = clients * tokens
    order = np.argsort(-_rounded(lengths, rule.length_step), kind="stable")
    to_buckets, buckets = _bucketed(start[order], lengths[order], rule.length_step, rows)
    readout = read_to_buckets = averages = predicting = None
    if scored.place is not None:
        predicting = np.full(clients * slots, -1)
        predicting[flat_slot] = scored.place
    elif rule.pooling == "mean":
        averages = np.zeros((clients, slots, tokens))
        averages.reshape(clients * slots, tokens)[np.repeat(flat_slot, lengths), places % tokens] = np.repeat(
            1.0 / lengths, lengths
        )
    else:
        token = start + (lengths - 1 if rule.pooling == "last" else 0)
        readout = np.full(clients * slots, -1)
        readout[flat_slot] = token
        read_to_buckets = flat_slot[order]

    put = _Sender(device, dtype)
    sentence_owners = np.split(owner[order], np.cumsum([count for count, _, _ in buckets])[:-1])
    return PackedBatch(
        clients=clients,
        tokens=tokens,
        slots=slots,
        input_ids=put.tensor(input_ids[None]),
        position_ids=put.tensor(positions[None]),
        token_type_ids=None if types is None else put.tensor(types[None]),
        labels=put.tensor(labels.reshape(clients, slots)),
        weights=put.tensor(weights.reshape(clients, slots)),
        buckets=tuple(
            Bucket(count, longest, put.padding(lens, longest), put.tensor(owners) if rule.owners else None)
            for (count, longest, lens), owners in zip(buckets, sentence_owners, strict=True)
        ),
        to_buckets=put.row_map(to_buckets, rows),
        readout=None if readout is None else put.row_map(readout, rows, keep_identity=True),
        readout_to_buckets=None if read_to_buckets is None else put.row_map(read_to_buckets, clients * slots),
        averages=None if averages is None else put.tensor(averages),
        predicting=None if predicting is None else put.row_map(predicting, rows, keep_identity=True),
    )


@dataclass(frozen=True, eq=False)
class _Scored:
    """What is scored, in the order of the sentences: the sentence, the label, and the packed place if it is a token."""

    sentence: IntArray
    label: IntArray
    place: IntArray | None


def _sentences(text: EncodedText, chosen: IntArray) -> _Scored:
    return _Scored(np.arange(len(chosen)), text.labels[chosen], None)


def _next_tokens(text: EncodedText, chosen: IntArray, start: IntArray) -> _Scored:
    """Every token whose successor belongs to a response; the sentences begin at the packed places `start`."""
    label = successors(text, chosen)
    sentence, within = np.nonzero(label != IGNORED)
    return _Scored(sentence, label[sentence, within], start[sentence] + within)


def _positions(ids: NDArray[np.int32], rule: PackRule) -> Positions:
    """Position numbers, as the family counts them."""
    if rule.first_position == 0:
        return np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    counted = ids != rule.pad_token
    return np.where(counted, np.cumsum(counted, axis=1) + rule.first_position - 1, rule.first_position - 1)


def _rounded(lengths: IntArray, step: int) -> IntArray:
    return -(-lengths // step) * step


def _bucketed(
    start: IntArray, lengths: IntArray, step: int, rows: int
) -> tuple[IntArray, list[tuple[int, int, IntArray]]]:
    """Source row of every place of all buckets (-1 on padding), and per bucket its count, longest and lengths.

    Sentences come sorted by rounded length.
    """
    sources, buckets = [], []
    cuts = np.flatnonzero(np.diff(_rounded(lengths, step))) + 1
    for part_start, part_lengths in zip(np.split(start, cuts), np.split(lengths, cuts), strict=True):
        longest = int(part_lengths.max())
        within = np.arange(longest)
        place = np.where(within < part_lengths[:, None], part_start[:, None] + within, -1)
        sources.append(place.ravel())
        buckets.append((len(part_lengths), longest, part_lengths))
    return np.concatenate(sources), buckets


@dataclass(frozen=True)
class _Sender:
    """Arrays to the device; from pinned memory and without waiting where that helps."""

    device: torch.device
    dtype: torch.dtype

    def tensor(self, array: NDArray[np.generic] | FloatArray) -> torch.Tensor:
        host = torch.from_numpy(np.ascontiguousarray(array))
        if host.is_floating_point():
            host = host.to(self.dtype)
        if self.device.type == "cuda":
            return host.pin_memory().to(self.device, non_blocking=True)
        return host

    def padding(self, lengths: IntArray, longest: int) -> torch.Tensor | None:
        """``(sentences, 1, 1, longest)``, the lowest number on padding, 0 elsewhere."""
        if (lengths == longest).all():
            return None
        is_padding = np.arange(longest) >= lengths[:, None]
        return self.tensor(is_padding[:, None, None, :] * float(torch.finfo(self.dtype).min))

    def row_map(self, source: IntArray, rows: int, keep_identity: bool = False) -> RowMap | None:
        """The map that fills each target row from `source` (-1: from none); None where it changes nothing."""
        if not keep_identity and len(source) == rows and np.array_equal(source, np.arange(rows)):
            return None
        back = np.full(rows, -1)
        filled = np.flatnonzero(source >= 0)
        back[source[filled]] = filled
        return RowMap(*self._half(source), *self._half(back))

    def _half(self, source: IntArray) -> tuple[torch.Tensor, torch.Tensor | None]:
        empty = np.flatnonzero(source < 0)
        return self.tensor(np.maximum(source, 0)), self.tensor(empty) if len(empty) else None
