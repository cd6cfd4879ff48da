"""Peak memory of a step.

Weights and a workspace as they are; activations and what is trained times what published peaks showed (see the
constants). Framework and context on top.
"""

from __future__ import annotations

from typing import NamedTuple

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

# Peak memory (status: derived; three numbers fitted to the published TX2 peaks of even depths: fedsim.cost.calibrate).
FRAMEWORK_BYTES = 0.63e9
"""CUDA context, libraries and framework on the board."""
ACTIVATION_GROWTH = 2.92
"""Caching allocator, fragmentation, temporaries and dropout's masks, over saved activations."""
TRAINED_STATE_BYTES = 18.4
"""Of one trained weight beside itself: gradient, two moments (12 bytes), and what an update and the allocator add."""
LOGIT_GROWTH = 2.0
"""Over saved logits: at the peak both tensors have a gradient beside them (status: derived)."""
SAVED_HIDDEN = 5
"""Hidden-wide tensors kept for backward per layer: layer input, two norm inputs, middle norm's output, FFN output."""

FITTED_MEMORY = ("tx2-memory-bert-full-*[02468]", "tx2-memory-bert-adapter-*[02468]")
"""The published peaks that they are fitted to, by id: even depths."""
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
    if setting.checkpointing and top:
        saved = saved / top + size * tokens * top * shape.hidden
    return saved


def dropped_bytes(shape: ModelShape, setting: StepSetting, kept: KeptSums) -> FloatArray:
    """What dropout adds to them, as `ACTIVATION_GROWTH` has it in it: the dropped copies and a byte of mask a value."""
    size, top = BYTES_PER_VALUE[setting.precision], kept.trained_layers
    dropped = top * DROPPED_HIDDEN * shape.hidden + kept.heads_trained * shape.heads * setting.seq_len
    dropped = (size + 1) * setting.tokens * dropped
    return dropped / top if setting.checkpointing and top else dropped


class MemoryParts(NamedTuple):
    """Memory of a step, framework apart: bytes that are as they are, saved activations, and how many weights train."""

    settled: FloatArray
    activations: FloatArray
    trained: FloatArray


def memory_parts(shape: ModelShape, kept: KeptSums, rank: ArrayLike, setting: StepSetting) -> MemoryParts:
    """Memory of a step by what it grows with."""
    size = BYTES_PER_VALUE[setting.precision]
    weights = block_weights(shape, kept.heads_all, kept.channels_all)
    frozen = shape.head_weights + own_output_weights(shape)
    frozen = frozen + (shape.embedding_weights if embeddings_run(shape, setting) else 0)
    settled = size * (weights + frozen + _small_weights(shape, kept))
    settled = settled + size * setting.tokens * (2.0 * shape.ffn + shape.heads * setting.seq_len)
    if setting.tuning == "inference":
        nothing = np.zeros_like(settled)
        return MemoryParts(settled + size * logits(shape, setting.tokens), nothing, nothing)
    trained = trained_weights(shape, setting, kept, rank)
    if setting.tuning != "full":
        settled = settled + TRAINED_BYTES * adapter_weights(shape, setting, kept, rank)
    elif size < TRAINED_BYTES:
        settled = settled + TRAINED_BYTES * trained  # fp32 masters of what is tuned
    settled = settled + LOGIT_GROWTH * saved_logit_bytes(shape, setting.tokens, size)
    if not setting.dropout:
        settled = settled - dropped_bytes(shape, setting, kept)
    return MemoryParts(settled, saved_bytes(shape, setting, kept), trained)


def peak_memory_bytes(
    shape: ModelShape, kept: KeptSums, rank: ArrayLike, setting: StepSetting, constants: MemoryConstants | None = None
) -> FloatArray:
    """Highest memory use of a step; with `constants` of shape (S,), of each of their samples."""
    parts = memory_parts(shape, kept, rank, setting)
    moments = 2 * TRAINED_BYTES if setting.optimizer == "none" else 0  # of AdamW, which are then not there
    if constants is None:
        state = (TRAINED_STATE_BYTES - moments) * parts.trained
        return FRAMEWORK_BYTES + parts.settled + ACTIVATION_GROWTH * parts.activations + state
    framework, growth, state_bytes = constants
    return framework + parts.settled + growth * parts.activations + (state_bytes - moments) * parts.trained


class MemoryConstants(NamedTuple):
    """Samples of the three fitted constants, shape (S,) each."""

    framework: FloatArray
    growth: FloatArray
    state_bytes: FloatArray


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
