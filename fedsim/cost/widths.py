"""Widths and weights of a model's parts, by kept fractions summed over layers."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from fedsim.contracts.common import FloatArray
from fedsim.cost.bottleneck import bottleneck_weights
from fedsim.cost.setting import HEAD_ROLES, KeptSums, StepSetting, embeddings_trained
from fedsim.cost.vocabulary import own_output_weights
from fedsim.families.family_catalogue import family_of
from fedsim.structure import ModelShape


def attention_weights(shape: ModelShape) -> int:
    return shape.head_groups * shape.weights_per_head_group


def ffn_weights(shape: ModelShape) -> int:
    return shape.ffn * shape.weights_per_channel


def query_width(shape: ModelShape) -> int:
    return shape.heads * shape.head_dim


def key_width(shape: ModelShape) -> int:
    return shape.kv_heads * shape.head_dim


def linear_widths(
    shape: ModelShape, roles: frozenset[str], layers: int, heads: FloatArray, channels: FloatArray
) -> FloatArray:
    """Sum over layers and Linears of `roles` of kept (d_in + d_out), given summed fractions."""
    query_wide = len(roles & {"query", "attention_out"}) * query_width(shape)
    key_wide = len(roles & {"key", "value"}) * key_width(shape)
    # One side of every Linear is as wide as the hidden state, whatever is pruned.
    fixed = len(roles) * shape.hidden
    return layers * fixed + heads * (query_wide + key_wide) + channels * len(roles - HEAD_ROLES) * shape.ffn


def lora_widths(shape: ModelShape, kept: KeptSums) -> FloatArray:
    """Sum of kept (d_in + d_out) over the Linears that carry LoRA."""
    return linear_widths(shape, kept.lora_roles, kept.trained_layers, kept.heads_trained, kept.channels_trained)


def block_weights(shape: ModelShape, heads_sum: FloatArray, channels_sum: FloatArray) -> FloatArray:
    """Kept prunable weights, given kept fractions summed over layers."""
    return heads_sum * attention_weights(shape) + channels_sum * ffn_weights(shape)


def lora_weights(shape: ModelShape, kept: KeptSums, rank: ArrayLike) -> FloatArray:
    """Trained LoRA weights on the targeted Linears of the trained layers, over kept rows and columns."""
    return np.asarray(rank, dtype=np.float64) * lora_widths(shape, kept)


def tuned_weights(shape: ModelShape, setting: StepSetting, kept: KeptSums) -> FloatArray:
    """Weights that full tuning trains, the classification head apart: kept blocks of the trained layers, embeddings.

    With the embeddings goes a language model's output over its vocabulary, where that has weights of its own.
    """
    blocks = block_weights(shape, kept.heads_trained, kept.channels_trained)
    return blocks + (shape.embedding_weights + own_output_weights(shape) if embeddings_trained(shape, setting) else 0)


def adapter_weights(shape: ModelShape, setting: StepSetting, kept: KeptSums, rank: ArrayLike) -> FloatArray:
    """Trained weights that stand beside the frozen ones: LoRA's or the bottlenecks'."""
    if setting.tuning == "lora":
        return lora_weights(shape, kept, rank)
    return np.asarray(float(kept.trained_layers * bottleneck_weights(shape, setting)))


def trained_weights(shape: ModelShape, setting: StepSetting, kept: KeptSums, rank: ArrayLike) -> FloatArray:
    """Every weight that a training step changes, the classification head among them."""
    head: FloatArray = np.asarray(float(shape.head_weights))
    if setting.tuning == "full":
        return head + tuned_weights(shape, setting, kept)
    return head + adapter_weights(shape, setting, kept, rank)


def trained_tensors(shape: ModelShape, setting: StepSetting, kept: KeptSums) -> int:
    """How many tensors an optimizer that loops over them visits."""
    head = 0 if shape.is_language_model else 4 if shape.pooler_width else 2
    if setting.tuning == "lora":
        return head + 2 * len(kept.lora_roles) * kept.trained_layers
    if setting.tuning == "adapter":
        return head + 4 * kept.trained_layers
    family = family_of(shape)
    # Words alone; or words, positions, perhaps token types, and a norm of two tensors.
    embeddings = 1 if family.causal else 4 + (family.types != "none") + (family.head_bias is not None)
    in_block = len(family.linears) + len(family.biases) + family.block.hidden_vectors
    return head + (embeddings if embeddings_trained(shape, setting) else 0) + in_block * kept.trained_layers
