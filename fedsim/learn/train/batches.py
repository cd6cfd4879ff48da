"""Text to token ids once, and the batches that training, probing and testing take from them.

Padding is on the right, to the longest sample of the batch, with the tokenizer's padding token (RoBERTa counts
positions by it) and a 0 in the attention mask: padded positions neither change a result nor get a gradient.

Which samples a batch holds depends on seed, client, round and the client's own samples only. It does not depend on
the method, so that methods are compared on the same batches, nor on other clients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fedsim.errors import DataError
from fedsim.rng import Stream, generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IntArray = NDArray[np.int64]
_CPU = torch.device("cpu")
IGNORED = -100
"""The label that PyTorch's cross-entropy leaves out."""


class LabelledTextLike(Protocol):
    """Labelled sentences, or pairs of sentences."""

    @property
    def texts(self) -> Sequence[str]:
        """Sentences, N of them."""

    @property
    def pairs(self) -> Sequence[str] | None:
        """Second sentences, N of them; None where samples are single sentences."""

    @property
    def labels(self) -> ArrayLike:
        """Class indices, shape (N,)."""


@dataclass(frozen=True, eq=False)
class EncodedText:
    """Token ids of N samples, on the host.

    Attributes:
        input_ids: shape (N, longest), int32, padded on the right.
        lengths: real tokens of each sample, shape (N,), >= 1.
        labels: class indices, shape (N,).
        token_type_ids: shape (N, longest), int32, or None where the tokenizer makes none.
        response_start: first token of each sample's response, shape (N,), >= 1 and below its length; None where
            samples are classified. What is learned then is every token from there on, `labels` are only categories.
        cut: samples that lost tokens, as they are longer than the longest length allowed.
    """

    input_ids: NDArray[np.int32]
    lengths: IntArray
    labels: IntArray
    token_type_ids: NDArray[np.int32] | None
    response_start: IntArray | None = None
    cut: int = 0

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.lengths)


@dataclass(frozen=True, eq=False)
class Batch:
    """What a model takes: int64 tensors of shape (batch, longest in the batch), and what it is to say.

    `labels` are classes, shape (batch,); where responses are learned, each token's successor, shape (batch, longest),
    `IGNORED` where that is no token of a response.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_type_ids: torch.Tensor | None
    labels: torch.Tensor

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of a Hugging Face model's forward, without the labels."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.token_type_ids is not None:
            inputs["token_type_ids"] = self.token_type_ids
        return inputs


def encode(texts: LabelledTextLike, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedText:
    """Tokenize every sample once, with the tokenizer's special tokens, cut at `max_length` tokens.

    Of a pair the longer sentence is cut first. A tokenizer without a padding token pads with its end token (the mask
    hides it), or with 0.

    Raises:
        DataError: no samples, or a sample without a single token.
    """
    labels = np.asarray(texts.labels, dtype=np.int64)
    if len(labels) == 0:
        raise DataError("data has no samples; at least 1 is needed")
    pairs = None if texts.pairs is None else list(texts.pairs)
    rows = tokenizer(list(texts.texts), pairs, truncation=True, max_length=max_length, padding=False)
    ids = rows["input_ids"]
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    if lengths.min() == 0:
        raise DataError(f"data: the text of sample {int(lengths.argmin())} has no tokens; at least 1 is needed")
    pad = padding_token(tokenizer)
    types = rows.get("token_type_ids")
    # Only a sample that fills the length can have lost something: the others need no second look.
    full = np.flatnonzero(lengths >= max_length).tolist()
    second = None if pairs is None else [pairs[row] for row in full]
    whole = tokenizer([texts.texts[row] for row in full], second, verbose=False)["input_ids"] if len(full) else []
    return EncodedText(
        input_ids=padded(ids, lengths, pad),
        lengths=lengths,
        labels=labels,
        token_type_ids=None if types is None else padded(types, lengths, 0),
        cut=sum(len(row) > max_length for row in whole),
    )


def make_batch(encoded: EncodedText, indices: ArrayLike, device: torch.device = _CPU) -> Batch:
    """The samples `indices`, in that order, padded to the longest of them, as tensors on `device`."""
    chosen = np.asarray(indices, dtype=np.int64)
    lengths = encoded.lengths[chosen]
    longest = int(lengths.max())
    mask = np.arange(longest) < lengths[:, None]
    types = encoded.token_type_ids
    labels = encoded.labels[chosen] if encoded.response_start is None else successors(encoded, chosen)
    return Batch(
        input_ids=_tensor(encoded.input_ids[chosen, :longest], device),
        attention_mask=_tensor(mask, device),
        token_type_ids=None if types is None else _tensor(types[chosen, :longest], device),
        labels=_tensor(labels, device),
    )


def successors(encoded: EncodedText, chosen: IntArray) -> IntArray:
    """Each token's successor where that belongs to a response, else `IGNORED`: shape (chosen, longest of them)."""
    assert encoded.response_start is not None
    lengths, start = encoded.lengths[chosen, None], encoded.response_start[chosen, None]
    longest = int(lengths.max())
    after = np.full((len(chosen), longest), IGNORED, dtype=np.int64)
    after[:, :-1] = encoded.input_ids[chosen, 1:longest]
    place = np.arange(1, longest + 1)
    return np.where((place >= start) & (place < lengths), after, IGNORED)


def batch_stream(
    encoded: EncodedText,
    indices: ArrayLike,
    batch_size: int,
    seed: int,
    client: int,
    flight: int,
    device: torch.device = _CPU,
) -> Iterator[Batch]:
    """An endless stream of one client's batches in one flight.

    The client's samples are shuffled, again and again, and the shuffled passes follow each other without a gap: every
    batch holds ``min(batch_size, samples)`` samples (so that steps cost alike) and every pass holds each sample once.
    A batch over the seam of two passes may hold a sample twice.

    Args:
        indices: the client's samples, positions in `encoded`, at least one.
        batch_size: samples per batch, >= 1.
    Raises:
        ValueError: no samples (at the call, not at the first batch).
    """
    chosen = sample_stream(indices, batch_size, seed, client, flight)
    return (make_batch(encoded, batch, device) for batch in chosen)


def sample_stream(indices: ArrayLike, batch_size: int, seed: int, client: int, flight: int) -> Iterator[IntArray]:
    """The sample numbers behind the batches of `batch_stream`."""
    samples = _some(indices, client)
    order = generator(seed, Stream.BATCH_ORDER, client, flight)
    return _passes(samples, min(batch_size, len(samples)), order)


def fixed_batch(
    encoded: EncodedText, indices: ArrayLike, size: int, seed: int, client: int, device: torch.device = _CPU
) -> Batch:
    """The client's probe batch: ``min(size, samples)`` of its samples, the same in every round and method.

    Raises:
        ValueError: no samples.
    """
    return make_batch(encoded, fixed_samples(indices, size, seed, client), device)


def fixed_samples(indices: ArrayLike, size: int, seed: int, client: int) -> IntArray:
    """The sample numbers behind `fixed_batch`."""
    samples = _some(indices, client)
    draw = generator(seed, Stream.PROBE_BATCH, client).permutation(len(samples))[: max(1, size)]
    return samples[np.sort(draw)]


def eval_batches(
    encoded: EncodedText, batch_size: int, device: torch.device = _CPU
) -> tuple[list[Batch], torch.Tensor]:
    """All samples once, the longest first, so that little is padded.

    Returns:
        The batches, and `order` of shape (N,): the sample behind each row of the concatenated batches
        (`in_original_order` puts outputs back).
    """
    order = np.argsort(-encoded.lengths, kind="stable")
    batches = [
        make_batch(encoded, order[start : start + batch_size], device) for start in range(0, len(order), batch_size)
    ]
    return batches, torch.from_numpy(order).to(device)


def in_original_order(outputs: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows of the concatenated outputs of `eval_batches`, shape (N, ...), in the order of the samples."""
    restored = torch.empty_like(outputs)
    restored[order] = outputs
    return restored


def _passes(samples: IntArray, size: int, order: np.random.Generator) -> Iterator[IntArray]:
    waiting = np.empty(0, dtype=np.int64)
    while True:
        if len(waiting) < size:
            waiting = np.concatenate([waiting, order.permutation(samples)])
        yield waiting[:size]
        waiting = waiting[size:]


def _some(indices: ArrayLike, client: int) -> IntArray:
    samples = np.asarray(indices, dtype=np.int64)
    if samples.ndim != 1 or samples.size == 0:
        raise ValueError(f"client {client} has no samples to draw batches from")
    return samples


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding token, else its end token (a mask hides it), else 0."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(pad or 0)


def padded(rows: Sequence[Sequence[int]], lengths: IntArray, pad: int) -> NDArray[np.int32]:
    """Ragged rows as one array, filled up on the right."""
    filled = np.full((len(rows), int(lengths.max())), pad, dtype=np.int32)
    filled[np.arange(filled.shape[1]) < lengths[:, None]] = np.concatenate([np.asarray(row, np.int32) for row in rows])
    return filled


def _tensor(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64)).to(device)
