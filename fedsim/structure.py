"""What can be pruned from a transformer, counted and masked without any tensor library.

A `ModelShape` gives the widths of an encoder or decoder of one of `fedsim.families`. Two kinds of group can go:

* a *head group*: one attention head (encoders), or one key-value head with all the query heads that read it
  (grouped-query attention): its rows of query, key and value and its columns of the attention output;
* a *channel*: one row of the feed-forward's first projection (gate and up where it is gated) and one column
  of its second.

The *pruning ratio* is removed / all weights of these Linear layers; embeddings, norms, biases and the classifier
do not count (our reading of FedSpine, arXiv 2501.02438, where the paper does not say).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class ModelShape:
    """Widths of a transformer. All counts are positive integers.

    Attributes:
        name: how the shape is named in tables.
        architecture: name of its family (`fedsim.families.family_catalogue`).
        layers, hidden, heads, kv_heads, head_dim, ffn: block widths; ``kv_heads == heads`` but for grouped queries.
        vocab, positions: rows of the word and of the learned position embeddings (0 for rotary positions).
        labels: outputs of the classifier; 0: there is none, a frozen product with the vocabulary predicts tokens.
        pooler_width: hidden width of a trained dense layer in the classification head, 0 where there is none.
        tied: whether that product with the vocabulary reads the word embeddings instead of weights of its own.
        gated: whether the FFN has a gate projection beside its up projection.
    """

    name: str
    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    positions: int
    labels: int = 2
    pooler_width: int = 0
    tied: bool = False
    gated: bool = False

    @property
    def is_language_model(self) -> bool:
        """Whether the model predicts the next token, and so has no classification head."""
        return self.labels == 0

    @property
    def head_groups(self) -> int:
        """Prunable attention groups per layer."""
        return self.kv_heads

    @property
    def weights_per_head_group(self) -> int:
        """Block weights that go with one head group: query rows, key and value rows, output columns."""
        queries = self.heads // self.kv_heads
        return (2 * queries + 2) * self.head_dim * self.hidden

    @property
    def weights_per_channel(self) -> int:
        """Block weights that go with one FFN channel."""
        return (3 if self.gated else 2) * self.hidden

    @property
    def prunable_weights(self) -> int:
        """All weights that count in the pruning ratio."""
        per_layer = self.head_groups * self.weights_per_head_group + self.ffn * self.weights_per_channel
        return self.layers * per_layer

    @property
    def embedding_weights(self) -> int:
        """Word and position embeddings (never pruned)."""
        return (self.vocab + self.positions) * self.hidden

    @property
    def head_weights(self) -> int:
        """Trained weights and biases of the classification head: sent both ways, never pruned."""
        if self.is_language_model:
            return 0
        dense = self.pooler_width * (self.hidden + 1)
        return dense + self.labels * ((self.pooler_width or self.hidden) + 1)

    @property
    def output_weights(self) -> int:
        """Frozen weights of a language model's product with its vocabulary (0 for classifiers)."""
        return self.vocab * self.hidden if self.is_language_model else 0

    @property
    def all_weights(self) -> int:
        """Blocks, embeddings, head or output, each weight once; norms and the blocks' biases apart."""
        own_output = 0 if self.tied else self.output_weights
        return self.prunable_weights + self.embedding_weights + self.head_weights + own_output


def kept_counts(shape: ModelShape, ratio: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Head groups and channels that *each* layer keeps when every layer loses the share `ratio` (``layer_local``).

    Nearest count (halves round to even, as NumPy's rint), at least one of each left.

    Args:
        ratio: asked pruning ratio in [0, 1], any shape.
    Returns:
        Two integer arrays of `ratio`'s shape.
    """
    keep = 1.0 - np.asarray(ratio, dtype=np.float64)
    heads = np.maximum(1, np.rint(keep * shape.head_groups)).astype(np.int64)
    channels = np.maximum(1, np.rint(keep * shape.ffn)).astype(np.int64)
    return heads, channels


def achieved_ratio(shape: ModelShape, heads: ArrayLike, channels: ArrayLike) -> NDArray[np.float64]:
    """Pruning ratio of kept counts.

    Args:
        heads, channels: kept head groups and channels, shape ``(..., layers)``; or ``(...,)`` with a last axis of
            length 1 when every layer keeps as many.
    Returns:
        Array of shape ``(...)``, in [0, 1).
    """
    heads = np.asarray(heads, dtype=np.float64)
    channels = np.asarray(channels, dtype=np.float64)
    kept = heads * shape.weights_per_head_group + channels * shape.weights_per_channel
    full = shape.head_groups * shape.weights_per_head_group + shape.ffn * shape.weights_per_channel
    return 1.0 - kept.mean(axis=-1) / full


def largest_ratio(shape: ModelShape) -> float:
    """The highest pruning ratio that leaves one head group and one channel in every layer."""
    return float(achieved_ratio(shape, [1], [1]))


@dataclass(frozen=True, eq=False)
class Structure:
    """Which groups a model keeps: boolean masks ``head_mask (layers, head_groups)``, ``channel_mask (layers, ffn)``."""

    head_mask: NDArray[np.bool_]
    channel_mask: NDArray[np.bool_]

    @classmethod
    def full(cls, shape: ModelShape) -> Structure:
        """Nothing pruned."""
        return cls(
            np.ones((shape.layers, shape.head_groups), dtype=bool), np.ones((shape.layers, shape.ffn), dtype=bool)
        )

    @property
    def heads_kept(self) -> NDArray[np.int64]:
        """Kept head groups per layer, shape ``(layers,)``."""
        return self.head_mask.sum(axis=1)

    @property
    def channels_kept(self) -> NDArray[np.int64]:
        """Kept channels per layer, shape ``(layers,)``."""
        return self.channel_mask.sum(axis=1)

    def ratio(self, shape: ModelShape) -> float:
        """Achieved pruning ratio."""
        return float(achieved_ratio(shape, self.heads_kept, self.channels_kept))

    def within(self, other: Structure) -> Structure:
        """The groups that both keep."""
        return Structure(self.head_mask & other.head_mask, self.channel_mask & other.channel_mask)

    def joined(self, other: Structure) -> Structure:
        """The groups that either keeps."""
        return Structure(self.head_mask | other.head_mask, self.channel_mask | other.channel_mask)

    def same_as(self, other: Structure) -> bool:
        """Whether both keep the same groups."""
        return np.array_equal(self.head_mask, other.head_mask) and np.array_equal(self.channel_mask, other.channel_mask)
