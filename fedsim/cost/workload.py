"""What one step of a model asks of any device: operations, bytes moved, kernel launches, peak memory.

Everything is counted from widths and kept fractions, vectorised over any leading axes, and linear in the fractions
and the rank, so that a policy can price every arm of every client at once. No seconds and no device here.

Counting rules (1 multiply-accumulate = 2 operations; N = batch times sequence tokens):

* Forward of a layer: ``2 N`` times its kept weights, plus ``4 N s`` times its kept attention width.
* Backward: full tuning doubles that. LoRA passes activations through frozen weights once, doubles the score and value
  products (both operands need gradients), and trains its own products: 3 times their forward in all. The pass stops
  below the lowest trained layer: the query, key and value inputs of that layer need no gradient (unless the
  embeddings are trained too). LoRA on some Linears only: counted through that whole layer all the same (upper bound).
* Bytes: each Linear reads its weights and inputs and writes its outputs; norms, activations and attention scores pass
  through memory as the constants below say. Kernels count as unfused.
* Causal models count full score matrices (no saving for the mask).
* A language model (no classifier) multiplies every token by its vocabulary: see `fedsim.cost.vocabulary`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from fedsim.contracts.common import FloatArray
from fedsim.cost.vocabulary import logits, output_work, own_output_weights, saved_logit_bytes
from fedsim.errors import ConfigError, unknown
from fedsim.structure import ModelShape

Tuning = Literal["lora", "full", "inference"]
Precision = Literal["fp32", "fp16"]

BYTES_PER_VALUE = {"fp32": 4, "fp16": 2}
HEAD_ROLES = frozenset({"query", "key", "value", "attention_out"})
CHANNEL_ROLES = {False: frozenset({"up", "down"}), True: frozenset({"gate", "up", "down"})}
"""Prunable Linears of a layer that go with attention heads, and with FFN channels (encoder / gated)."""
TRAINED_BYTES = 4
"""LoRA, gradients, optimizer moments and traffic are fp32 whatever the backbone's precision."""

# Passes over memory, counted kernel by kernel for an unfused forward (status: derived from what each operation does).
HIDDEN_PASSES = 10
"""Hidden-wide reads and writes per layer: two residual additions (3 each) and two norms (2 each)."""
HEAD_COPY_PASSES = 2
"""Reads and writes that re-order query, key, value and context by heads."""
SCORE_PASSES = 6
"""Score-sized reads and writes: product out, mask in and out, softmax in and out, value product in."""
ACTIVATION_PASSES = {False: 2, True: 5}
"""FFN-wide reads and writes of the activation function; gated: SiLU (2) and product (3)."""
BACKWARD_PASS_FACTOR = 1.5
"""Backward of an elementwise kernel reads the gradient and a saved tensor and writes one: 3 passes for 2."""
LORA_PASSES = 5
"""Passes over a LoRA'd Linear's inputs and outputs, forward and backward together, that its low-rank branch adds."""
ADAMW_PASSES = 7
"""AdamW fused: reads weight, gradient and two moments, writes weight and two moments. The least traffic it can have;
the published TX2 steps do not show more (see `fedsim.cost.calibrate`)."""

# Kernel launches (status: measured, by counting the operations that PyTorch's eager attention and PEFT dispatch, views
# apart: 19 and 35 per encoder layer, 42 and 76 per LLaMA layer; each one's cost is an upper bound).
FORWARD_LAUNCHES = {False: 19, True: 42}
"""Per layer, encoder / gated decoder with rotary positions."""
BACKWARD_LAUNCH_FACTOR = 1.8
LORA_LAUNCHES_FORWARD = 4
"""Per LoRA'd Linear: down, up, scale, add."""
LORA_LAUNCHES_BACKWARD = 4
"""Per LoRA'd Linear, net of the weight gradient that its frozen weight does without."""
MODEL_LAUNCHES = 20
"""Per step: embeddings, their norm, mask, classifier, loss."""
OPTIMIZER_LAUNCHES = 40

# Peak memory (status: derived, two numbers fitted to the published TX2 peaks by fedsim.cost.calibrate).
FRAMEWORK_BYTES = 0.68e9
"""CUDA context, libraries and framework on the board."""
MEMORY_GROWTH = 2.11
"""Caching allocator, fragmentation, dropout masks and temporaries: over saved activations, gradients and moments."""
SAVED_HIDDEN = 5
"""Hidden-wide tensors kept for backward per layer: layer input, two norm inputs, middle norm's output, FFN output."""

IMPORTANCE_PASSES = 12
"""Weight-sized passes of one importance estimate: low-rank products, |G * (W + c B A)|, sums per group."""
IMPORTANCE_ELEMENTWISE_FLOPS = 6
IMPORTANCE_LAUNCHES = 12
SLICE_LAUNCHES = 4
"""Per prunable Linear and change of structure: gather weight, bias and the two LoRA factors."""


@dataclass(frozen=True)
class StepSetting:
    """How a step is run.

    Attributes:
        batch_size, seq_len: sequences per step and tokens per sequence, >= 1.
        precision: of weights and activations.
        tuning: ``lora``, ``full``, or ``inference`` (forward only, LoRA merged).
        train_top_layers: how many of the last layers are trained; None: all, and in full tuning the embeddings too
            (so does a number equal to the model's layers). 0 trains the classifier alone.
        lora_roles: prunable Linears of each trained layer that carry LoRA, by role (`HEAD_ROLES`, `CHANNEL_ROLES`);
            None: all. Read in LoRA tuning only.
    """

    batch_size: int
    seq_len: int
    precision: Precision = "fp32"
    tuning: Tuning = "lora"
    train_top_layers: int | None = None
    lora_roles: frozenset[str] | None = None

    def __post_init__(self) -> None:
        for field, value in (("batch_size", self.batch_size), ("seq_len", self.seq_len)):
            if value < 1:
                raise ConfigError(f"{field} is {value}; it must be at least 1")
        if self.precision not in BYTES_PER_VALUE:
            raise ConfigError(f"precision is '{self.precision}'; allowed are fp32 and fp16")
        if self.tuning not in ("lora", "full", "inference"):
            raise ConfigError(f"tuning is '{self.tuning}'; allowed are lora, full and inference")
        if self.train_top_layers is not None and self.train_top_layers < 0:
            raise ConfigError(f"train_top_layers is {self.train_top_layers}; it must be at least 0")
        if self.lora_roles is not None:
            known = HEAD_ROLES | CHANNEL_ROLES[True]
            if not self.lora_roles:
                raise ConfigError(f"lora_roles is empty; it must name at least one of {', '.join(sorted(known))}")
            for role in sorted(self.lora_roles - known):
                raise ConfigError(f"lora_roles: {unknown('role', role, known)}")

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch_size * self.seq_len


@dataclass(frozen=True, eq=False)
class StepWork:
    """What one step (or another piece of work) asks; arrays of one shape. See `fedsim.contracts.control.Work`."""

    flops: FloatArray
    memory_bytes: FloatArray
    launches: FloatArray
    peak_memory_bytes: FloatArray


@dataclass(frozen=True, eq=False)
class KeptSums:
    """Kept fractions summed over layers: all, the trained ones, the lowest trained one. What of these carries LoRA."""

    heads_all: FloatArray
    channels_all: FloatArray
    heads_trained: FloatArray
    channels_trained: FloatArray
    heads_lowest: FloatArray
    trained_layers: int
    lora_roles: frozenset[str]


def trained_layers(shape: ModelShape, setting: StepSetting) -> int:
    """How many layers the backward pass reaches. Raises ConfigError for more than the model has."""
    if setting.tuning == "inference":
        return 0
    count = shape.layers if setting.train_top_layers is None else setting.train_top_layers
    if count > shape.layers:
        raise ConfigError(f"train_top_layers is {count}; {shape.name} has {shape.layers} layers")
    return count


def linear_roles(shape: ModelShape) -> frozenset[str]:
    """Roles of the prunable Linears of one block."""
    return HEAD_ROLES | CHANNEL_ROLES[shape.gated]


def lora_roles(shape: ModelShape, setting: StepSetting) -> frozenset[str]:
    """Roles that carry LoRA. Raises ConfigError for one that the model does not have (a gate, in encoders)."""
    allowed = linear_roles(shape)
    if setting.lora_roles is None:
        return allowed
    for role in sorted(setting.lora_roles - allowed):
        raise ConfigError(f"lora_roles: {shape.name} has no '{role}' (allowed: {', '.join(sorted(allowed))})")
    return setting.lora_roles


def _embeddings_trained(shape: ModelShape, setting: StepSetting) -> bool:
    return setting.tuning == "full" and trained_layers(shape, setting) == shape.layers


def kept_sums(shape: ModelShape, setting: StepSetting, heads: ArrayLike, channels: ArrayLike) -> KeptSums:
    """Sum kept fractions (last axis: layers, or length 1 for all layers alike) over the layers that matter."""
    top = trained_layers(shape, setting)

    def all_and_top(fraction: ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
        kept = np.asarray(fraction, dtype=np.float64)
        if kept.ndim == 0 or kept.shape[-1] not in (1, shape.layers):
            raise ValueError(f"fractions of shape {kept.shape} need a last axis of 1 or {shape.layers} layers")
        if kept.shape[-1] == 1 and shape.layers != 1:
            one = kept[..., 0]
            return shape.layers * one, top * one, one
        # A slice by a positive start: `[-0:]` would be everything.
        first = shape.layers - top
        return kept.sum(axis=-1), kept[..., first:].sum(axis=-1), kept[..., min(first, shape.layers - 1)]

    heads_all, heads_top, heads_low = all_and_top(heads)
    channels_all, channels_top, _ = all_and_top(channels)
    return KeptSums(heads_all, channels_all, heads_top, channels_top, heads_low, top, lora_roles(shape, setting))


def _attention_weights(shape: ModelShape) -> int:
    return shape.head_groups * shape.weights_per_head_group


def _ffn_weights(shape: ModelShape) -> int:
    return shape.ffn * shape.weights_per_channel


def _query_width(shape: ModelShape) -> int:
    return shape.heads * shape.head_dim


def _key_width(shape: ModelShape) -> int:
    return shape.kv_heads * shape.head_dim


def _linear_widths(
    shape: ModelShape, roles: frozenset[str], layers: int, heads: FloatArray, channels: FloatArray
) -> FloatArray:
    """Sum over layers and Linears of `roles` of kept (d_in + d_out), given summed fractions."""
    query_wide = len(roles & {"query", "attention_out"}) * _query_width(shape)
    key_wide = len(roles & {"key", "value"}) * _key_width(shape)
    # One side of every Linear is as wide as the hidden state, whatever is pruned.
    fixed = len(roles) * shape.hidden
    return layers * fixed + heads * (query_wide + key_wide) + channels * len(roles - HEAD_ROLES) * shape.ffn


def _lora_widths(shape: ModelShape, kept: KeptSums) -> FloatArray:
    """Sum of kept (d_in + d_out) over the Linears that carry LoRA."""
    return _linear_widths(shape, kept.lora_roles, kept.trained_layers, kept.heads_trained, kept.channels_trained)


def block_weights(shape: ModelShape, heads_sum: FloatArray, channels_sum: FloatArray) -> FloatArray:
    """Kept prunable weights, given kept fractions summed over layers."""
    return heads_sum * _attention_weights(shape) + channels_sum * _ffn_weights(shape)


def lora_weights(shape: ModelShape, kept: KeptSums, rank: ArrayLike) -> FloatArray:
    """Trained LoRA weights on the targeted Linears of the trained layers, over kept rows and columns."""
    return np.asarray(rank, dtype=np.float64) * _lora_widths(shape, kept)


def tuned_weights(shape: ModelShape, setting: StepSetting, kept: KeptSums) -> FloatArray:
    """Weights that full tuning trains, the classification head apart: kept blocks of the trained layers, embeddings.

    With the embeddings goes a language model's output over its vocabulary, where that has weights of its own.
    """
    blocks = block_weights(shape, kept.heads_trained, kept.channels_trained)
    return blocks + (shape.embedding_weights + own_output_weights(shape) if _embeddings_trained(shape, setting) else 0)


def _elementwise_values(
    shape: ModelShape, setting: StepSetting, layers: int, heads: FloatArray, channels: FloatArray
) -> FloatArray:
    """Values that norms, activations, head copies and scores move in a forward of `layers` layers."""
    tokens = setting.tokens
    copies = HEAD_COPY_PASSES * 2 * (_query_width(shape) + _key_width(shape))
    scores = SCORE_PASSES * shape.heads * setting.seq_len
    return tokens * (
        layers * HIDDEN_PASSES * shape.hidden
        + heads * (copies + scores)
        + channels * ACTIVATION_PASSES[shape.gated] * shape.ffn
    )


def _saved_values(shape: ModelShape, setting: StepSetting, kept: KeptSums) -> FloatArray:
    """Values kept for the backward pass: Linear inputs, query, key, value, context, softmax, FFN tensors."""
    heads_wide = 2 * (_query_width(shape) + _key_width(shape)) + shape.heads * setting.seq_len
    ffn_wide = (3 if shape.gated else 2) * shape.ffn
    return setting.tokens * (
        kept.trained_layers * SAVED_HIDDEN * shape.hidden
        + kept.heads_trained * heads_wide
        + kept.channels_trained * ffn_wide
    )


def step_work(
    shape: ModelShape,
    head_fraction: ArrayLike,
    channel_fraction: ArrayLike,
    rank: ArrayLike,
    setting: StepSetting,
) -> StepWork:
    """One step of training or inference.

    Args:
        head_fraction, channel_fraction: kept share of head groups and FFN channels, in (0, 1], shape
            ``(..., layers)``, or ``(..., 1)`` when every layer keeps as much.
        rank: LoRA rank, broadcasting over the leading axes; unused but in LoRA tuning.
    Returns:
        Arrays of the broadcast leading shape.
    """
    work = work_of_sums(shape, kept_sums(shape, setting, head_fraction, channel_fraction), rank, setting)
    return StepWork(
        *np.broadcast_arrays(work.flops, work.memory_bytes, work.launches, work.peak_memory_bytes, np.asarray(rank))[:4]
    )


def work_of_sums(shape: ModelShape, kept: KeptSums, rank: ArrayLike, setting: StepSetting) -> StepWork:
    """`step_work` for fractions already summed, whose arrays only broadcast to the common shape (fast on grids)."""
    lora = setting.tuning == "lora"
    full = setting.tuning == "full"
    size, top, tokens = BYTES_PER_VALUE[setting.precision], kept.trained_layers, setting.tokens
    embeddings = _embeddings_trained(shape, setting)

    weights_all = block_weights(shape, kept.heads_all, kept.channels_all)
    weights_top = block_weights(shape, kept.heads_trained, kept.channels_trained)
    linear_flops = 2.0 * tokens * weights_top
    score_flops = 4.0 * tokens * setting.seq_len * _query_width(shape)
    head_flops = 2.0 * setting.batch_size * shape.head_weights
    # Backward goes through the frozen output once; full tuning of all layers trains it like the embeddings.
    backward_products = 0 if not top else 2 if embeddings else 1
    output_flops, output_bytes = output_work(shape, tokens, size, backward_products)
    flops = 2.0 * tokens * weights_all + score_flops * kept.heads_all + head_flops + output_flops
    roles = linear_roles(shape)
    widths_all = _linear_widths(shape, roles, shape.layers, kept.heads_all, kept.channels_all)
    elementwise = _elementwise_values(shape, setting, shape.layers, kept.heads_all, kept.channels_all)
    # Embedding rows are read, added and normalised: 6 hidden-wide passes.
    moved = size * (weights_all + tokens * (widths_all + 6.0 * shape.hidden) + elementwise) + output_bytes
    launches = float(MODEL_LAUNCHES + shape.layers * FORWARD_LAUNCHES[shape.gated])

    if setting.tuning != "inference":
        widths_top = _linear_widths(shape, roles, top, kept.heads_trained, kept.channels_trained)
        elementwise_top = _elementwise_values(shape, setting, top, kept.heads_trained, kept.channels_trained)
        flops = flops + 2.0 * score_flops * kept.heads_trained + linear_flops + 2.0 * head_flops
        moved = moved + size * (weights_top + tokens * widths_top + BACKWARD_PASS_FACTOR * elementwise_top)
        if top and not embeddings:
            entry = shape.hidden * (_query_width(shape) + 2 * _key_width(shape))
            flops = flops - 2.0 * tokens * entry * kept.heads_lowest
        launches += OPTIMIZER_LAUNCHES + BACKWARD_LAUNCH_FACTOR * (MODEL_LAUNCHES + top * FORWARD_LAUNCHES[shape.gated])
        trained: FloatArray = np.asarray(float(shape.head_weights))
        if lora:
            adapter = lora_weights(shape, kept, rank)
            trained = trained + adapter
            flops = flops + 3.0 * 2.0 * tokens * adapter
            moved = moved + size * LORA_PASSES * tokens * _lora_widths(shape, kept)
            launches += top * len(kept.lora_roles) * (LORA_LAUNCHES_FORWARD + LORA_LAUNCHES_BACKWARD)
        if full:
            trained = trained + tuned_weights(shape, setting, kept)
            flops = flops + linear_flops
            moved = moved + size * (weights_top + tokens * widths_top)
            if embeddings:
                moved = moved + 2.0 * size * shape.embedding_weights
        moved = moved + ADAMW_PASSES * TRAINED_BYTES * trained

    settled, growing = memory_parts(shape, kept, rank, setting)
    peak = FRAMEWORK_BYTES + settled + MEMORY_GROWTH * growing
    return StepWork(flops, moved, np.asarray(launches), peak)


def memory_parts(
    shape: ModelShape, kept: KeptSums, rank: ArrayLike, setting: StepSetting
) -> tuple[FloatArray, FloatArray]:
    """Memory of a step in bytes, framework apart: (weights and workspace, what `MEMORY_GROWTH` applies to)."""
    size = BYTES_PER_VALUE[setting.precision]
    weights = block_weights(shape, kept.heads_all, kept.channels_all)
    frozen = shape.embedding_weights + own_output_weights(shape) + shape.head_weights
    settled = size * (weights + frozen + _small_weights(shape, kept))
    settled = settled + size * setting.tokens * (2.0 * shape.ffn + shape.heads * setting.seq_len)
    if setting.tuning == "inference":
        return settled + size * logits(shape, setting.tokens), np.zeros_like(settled)
    trained: FloatArray = np.asarray(float(shape.head_weights))
    if setting.tuning == "lora":
        adapter = lora_weights(shape, kept, rank)
        trained = trained + adapter
        settled = settled + TRAINED_BYTES * adapter
    else:
        trained = trained + tuned_weights(shape, setting, kept)
        if size < TRAINED_BYTES:
            settled = settled + TRAINED_BYTES * trained  # fp32 masters of what is tuned
    # Saved activations and logits, gradients, two moments.
    saved = size * _saved_values(shape, setting, kept) + saved_logit_bytes(shape, setting.tokens, size)
    return settled, saved + 3.0 * TRAINED_BYTES * trained


def _small_weights(shape: ModelShape, kept: KeptSums) -> FloatArray:
    """Norms and, in encoders, biases."""
    if shape.gated:
        return np.asarray(float((2 * shape.layers + 1) * shape.hidden))
    per_layer = (4 + 2) * shape.hidden
    return (
        shape.layers * per_layer
        + kept.heads_all * (_query_width(shape) + 2 * _key_width(shape))
        + kept.channels_all * shape.ffn
    )


def importance_work(shape: ModelShape, kept: KeptSums, rank: ArrayLike) -> StepWork:
    """One estimate of every group's importance (LoRA-guided: LoRAPrune, arXiv 2305.18403).

    Four products of a ``rank``-thin pair per Linear, then elementwise work on weight-sized arrays. Its peak is what it
    needs beyond a step: three temporaries of the largest Linear, one Linear after another.
    """
    weights = block_weights(shape, kept.heads_all, kept.channels_all)
    rank = np.asarray(rank, dtype=np.float64)
    flops = weights * (8.0 * rank + IMPORTANCE_ELEMENTWISE_FLOPS)
    moved = IMPORTANCE_PASSES * TRAINED_BYTES * weights
    launches = float(shape.layers * len(linear_roles(shape)) * IMPORTANCE_LAUNCHES)
    peak = 3.0 * TRAINED_BYTES * shape.hidden * max(shape.ffn, _query_width(shape))
    return StepWork(flops, moved, np.asarray(launches), np.asarray(peak))


def slicing_work(shape: ModelShape, kept_weights: FloatArray, precision: Precision) -> StepWork:
    """Changing the structure once: every kept weight is read and written. Storage is counted as memory (ours)."""
    moved = 2.0 * BYTES_PER_VALUE[precision] * np.asarray(kept_weights, dtype=np.float64)
    launches = float(shape.layers * len(linear_roles(shape)) * SLICE_LAUNCHES)
    return StepWork(np.asarray(0.0), moved, np.asarray(launches), np.asarray(0.0))
