"""Peak memory of a step.

Weights and a workspace as they are; activations and what is trained times what published peaks showed (see the
constants). Framework and context on top.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from fedsim.contracts.common import FloatArray
from fedsim.cost.bottleneck import bottleneck_saved_values
from fedsim.cost.setting import BYTES_PER_VALUE, TRAINED_BYTES, KeptSums, StepSetting, embeddings_run
from fedsim.cost.vocabulary import logits, own_output_weights, saved_logit_bytes
from fedsim.cost.widths import adapter_weights, block_weights, key_width, query_width, trained_weights
from fedsim.families.family import Role
from fedsim.families.family_catalogue import family_of
from fedsim.structure import ModelShape

# Peak memory (status: derived, two numbers fitted to the published TX2 peaks by fedsim.cost.calibrate).
FRAMEWORK_BYTES = 0.68e9
"""CUDA context, libraries and framework on the board."""
MEMORY_GROWTH = 2.11
"""Caching allocator, fragmentation, dropout masks and temporaries: over saved activations, gradients and moments."""
SAVED_HIDDEN = 5
"""Hidden-wide tensors kept for backward per layer: layer input, two norm inputs, middle norm's output, FFN output."""

FITTED_MEMORY = (
    "tx2-memory-bert-full-00",
    "tx2-memory-bert-full-02",
    "tx2-memory-bert-full-04",
    "tx2-memory-bert-full-06",
    "tx2-memory-bert-full-08",
    "tx2-memory-bert-full-10",
)
"""The published peaks that they are fitted to, by id."""
DROPPED_HIDDEN = 2
"""Hidden-wide outputs of dropout per layer; with a byte of mask a value, and scores likewise."""


def saved_values(shape: ModelShape, setting: StepSetting, kept: KeptSums) -> FloatArray:
    """Values kept for the backward pass: Linear inputs, query, key, value, context, softmax, FFN tensors."""
    heads_wide = 2 * (query_width(shape) + key_width(shape)) + shape.heads * setting.seq_len
    ffn_wide = (3 if shape.gated else 2) * shape.ffn
    return setting.tokens * (
        kept.trained_layers * SAVED_HIDDEN * shape.hidden
        + kept.heads_trained * heads_wide
        + kept.channels_trained * ffn_wide
    )


def saved_bytes(shape: ModelShape, setting: StepSetting, kept: KeptSums) -> FloatArray:
    """Bytes kept for the backward pass, logits apart.

    With checkpointing: every trained layer's input, and one layer's own tensors while it is run again.
    """
    size, top, tokens = BYTES_PER_VALUE[setting.precision], kept.trained_layers, setting.tokens
    saved = size * saved_values(shape, setting, kept)
    if setting.tuning == "adapter":
        saved = saved + size * bottleneck_saved_values(shape, setting) * top
    if setting.dropout:
        # The dropped copy, and a byte of mask for each of its values.
        dropped = top * DROPPED_HIDDEN * shape.hidden + kept.heads_trained * shape.heads * setting.seq_len
        saved = saved + (size + 1) * tokens * dropped
    if setting.checkpointing and top:
        saved = saved / top + size * tokens * top * shape.hidden
    return saved


def memory_parts(
    shape: ModelShape, kept: KeptSums, rank: ArrayLike, setting: StepSetting
) -> tuple[FloatArray, FloatArray]:
    """Memory of a step in bytes, framework apart: (weights and workspace, what `MEMORY_GROWTH` applies to)."""
    size = BYTES_PER_VALUE[setting.precision]
    weights = block_weights(shape, kept.heads_all, kept.channels_all)
    frozen = shape.head_weights + own_output_weights(shape)
    frozen = frozen + (shape.embedding_weights if embeddings_run(shape, setting) else 0)
    settled = size * (weights + frozen + _small_weights(shape, kept))
    settled = settled + size * setting.tokens * (2.0 * shape.ffn + shape.heads * setting.seq_len)
    if setting.tuning == "inference":
        return settled + size * logits(shape, setting.tokens), np.zeros_like(settled)
    trained = trained_weights(shape, setting, kept, rank)
    if setting.tuning != "full":
        settled = settled + TRAINED_BYTES * adapter_weights(shape, setting, kept, rank)
    elif size < TRAINED_BYTES:
        settled = settled + TRAINED_BYTES * trained  # fp32 masters of what is tuned
    # Saved activations and logits, gradients, two moments.
    saved = saved_bytes(shape, setting, kept) + saved_logit_bytes(shape, setting.tokens, size)
    return settled, saved + 3.0 * TRAINED_BYTES * trained


def peak_memory_bytes(shape: ModelShape, kept: KeptSums, rank: ArrayLike, setting: StepSetting) -> FloatArray:
    """Highest memory use of a step."""
    settled, growing = memory_parts(shape, kept, rank, setting)
    return FRAMEWORK_BYTES + settled + MEMORY_GROWTH * growing


def _small_weights(shape: ModelShape, kept: KeptSums) -> FloatArray:
    """Norms, a decoder's last one too, and biases where the family always has them."""
    family = family_of(shape)
    hidden_vectors = family.block.hidden_vectors + len(family.biases & {Role.ATTENTION_OUT, Role.DOWN})
    heads_wide = len(family.biases & {Role.QUERY}) * query_width(shape)
    heads_wide += len(family.biases & {Role.KEY, Role.VALUE}) * key_width(shape)
    return (
        float((kept.layers * hidden_vectors + int(family.causal)) * shape.hidden)
        + kept.heads_all * heads_wide
        + kept.channels_all * (len(family.biases & {Role.GATE, Role.UP}) * shape.ffn)
    )
