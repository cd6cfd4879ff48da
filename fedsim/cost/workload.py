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
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fedsim.contracts.common import FloatArray
from fedsim.cost.bottleneck import bottleneck_work
from fedsim.cost.memory import FRAMEWORK_BYTES, memory_parts, peak_memory_bytes
from fedsim.cost.setting import (
    BYTES_PER_VALUE,
    CHANNEL_ROLES,
    HEAD_ROLES,
    TRAINED_BYTES,
    KeptSums,
    Optimizer,
    Precision,
    StepSetting,
    Tuning,
    embeddings_run,
    embeddings_trained,
    kept_sums,
    linear_roles,
    lora_roles,
    trained_layers,
)
from fedsim.cost.vocabulary import output_work
from fedsim.cost.widths import (
    block_weights,
    key_width,
    linear_widths,
    lora_weights,
    lora_widths,
    query_width,
    trained_tensors,
    trained_weights,
    tuned_weights,
)
from fedsim.families.family_catalogue import family_of
from fedsim.structure import ModelShape

__all__ = [
    "BYTES_PER_VALUE",
    "CHANNEL_ROLES",
    "FRAMEWORK_BYTES",
    "HEAD_ROLES",
    "TRAINED_BYTES",
    "KeptSums",
    "Optimizer",
    "Precision",
    "StepSetting",
    "StepWork",
    "Tuning",
    "block_weights",
    "importance_work",
    "kept_sums",
    "linear_roles",
    "lora_roles",
    "lora_weights",
    "memory_parts",
    "slicing_work",
    "step_work",
    "trained_layers",
    "tuned_weights",
    "work_of_sums",
]

# Passes over memory, counted kernel by kernel for an unfused forward (status: derived from what each operation does).
HIDDEN_PASSES = 10
"""Hidden-wide reads and writes per layer: two residual additions (3 each) and two norms (2 each)."""
HEAD_COPY_PASSES = 2
"""Reads and writes that re-order query, key, value and context by heads."""
SCORE_PASSES = 6
"""Score-sized reads and writes: product out, mask in and out, softmax in and out, value product in."""
HEAD_BIAS_PASSES = 3
"""Score-sized reads and writes of a bias by head (MPNet): scores in and out, bias in."""
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
# apart: 19 and 35 per encoder layer, 42 and 76 per layer of a LLaMA; each one's cost is an upper bound).
FORWARD_LAUNCHES = {False: 19, True: 42}
"""Per layer, encoder / gated decoder with rotary positions."""
HEAD_BIAS_LAUNCHES = 1
"""Per layer, where there is a bias by head: its addition (status: derived)."""
BACKWARD_LAUNCH_FACTOR = 1.8
LORA_LAUNCHES_FORWARD = 4
"""Per LoRA'd Linear: down, up, scale, add."""
LORA_LAUNCHES_BACKWARD = 4
"""Per LoRA'd Linear, net of the weight gradient that its frozen weight does without."""
MODEL_LAUNCHES = 20
"""Per step: embeddings, their norm, mask, classifier, loss."""
OPTIMIZER_LAUNCHES = 40
PER_TENSOR_PASSES = 20
"""AdamW as a loop of in-place operations over one tensor after another (status: derived, by counting them): decay (2),
first moment (2 + 3), second moment (2 + 3), root (2), epsilon (2), update (4)."""
PER_TENSOR_LAUNCHES = 10
"""Per tensor of that loop."""
ACCUMULATION_PASSES = 3
"""Over the gradients, for each further batch of a step."""

IMPORTANCE_PASSES = 12
"""Weight-sized passes of one importance estimate: low-rank products, |G * (W + c B A)|, sums per group."""
IMPORTANCE_ELEMENTWISE_FLOPS = 6
IMPORTANCE_LAUNCHES = 12
SLICE_LAUNCHES = 4
"""Per prunable Linear and change of structure: gather weight, bias and the two LoRA factors."""


@dataclass(frozen=True, eq=False)
class StepWork:
    """What one step (or another piece of work) asks; arrays of one shape. See `fedsim.contracts.control.Work`."""

    flops: FloatArray
    memory_bytes: FloatArray
    launches: FloatArray
    peak_memory_bytes: FloatArray


def _elementwise_values(
    shape: ModelShape, setting: StepSetting, layers: int, heads: FloatArray, channels: FloatArray
) -> FloatArray:
    """Values that norms, activations, head copies and scores move in a forward of `layers` layers."""
    tokens = setting.tokens
    copies = HEAD_COPY_PASSES * 2 * (query_width(shape) + key_width(shape))
    passes = SCORE_PASSES + (0 if family_of(shape).head_bias is None else HEAD_BIAS_PASSES)
    scores = passes * shape.heads * setting.seq_len
    return tokens * (
        layers * HIDDEN_PASSES * shape.hidden
        + heads * (copies + scores)
        + channels * ACTIVATION_PASSES[shape.gated] * shape.ffn
    )


def _layer_launches(shape: ModelShape) -> int:
    """Of a layer's forward."""
    return FORWARD_LAUNCHES[shape.gated] + (0 if family_of(shape).head_bias is None else HEAD_BIAS_LAUNCHES)


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
    work = _with_forward(shape, kept, setting)
    if setting.tuning != "inference":
        work = _with_backward(work, shape, kept, rank, setting)
        work = _with_optimizer(work, shape, kept, rank, setting)
    return StepWork(work.flops, work.moved, np.asarray(work.launches), peak_memory_bytes(shape, kept, rank, setting))


class _Counts(NamedTuple):
    """Operations, bytes and launches counted so far."""

    flops: FloatArray
    moved: FloatArray
    launches: float


def _head_flops(shape: ModelShape, setting: StepSetting) -> float:
    return 2.0 * setting.batch_size * shape.head_weights


def _score_flops(shape: ModelShape, setting: StepSetting) -> float:
    return 4.0 * setting.tokens * setting.seq_len * query_width(shape)


def _with_forward(shape: ModelShape, kept: KeptSums, setting: StepSetting) -> _Counts:
    """One batch forward, and a language model's output with what its backward pass takes."""
    size, tokens = BYTES_PER_VALUE[setting.precision], setting.tokens
    weights = block_weights(shape, kept.heads_all, kept.channels_all)
    # Backward goes through the frozen output once; full tuning of all layers trains it like the embeddings.
    backward_products = 0 if not kept.trained_layers else 2 if embeddings_trained(shape, setting) else 1
    output_flops, output_bytes = output_work(shape, tokens, size, backward_products)
    flops = (
        2.0 * tokens * weights
        + _score_flops(shape, setting) * kept.heads_all
        + _head_flops(shape, setting)
        + output_flops
    )
    widths = linear_widths(shape, linear_roles(shape), kept.layers, kept.heads_all, kept.channels_all)
    elementwise = _elementwise_values(shape, setting, kept.layers, kept.heads_all, kept.channels_all)
    # Embedding rows are read, added and normalised: 6 hidden-wide passes. Cached activations are read once.
    entry_passes = 6.0 if embeddings_run(shape, setting) else 1.0
    moved = size * (weights + tokens * (widths + entry_passes * shape.hidden) + elementwise) + output_bytes
    return _Counts(flops, moved, float(MODEL_LAUNCHES + kept.layers * _layer_launches(shape)))


def _with_backward(work: _Counts, shape: ModelShape, kept: KeptSums, rank: ArrayLike, setting: StepSetting) -> _Counts:
    """The backward pass of one batch, and the forward passes that checkpointing repeats in it."""
    flops, moved, launches = work
    size, top, tokens = BYTES_PER_VALUE[setting.precision], kept.trained_layers, setting.tokens
    embeddings = embeddings_trained(shape, setting)
    weights = block_weights(shape, kept.heads_trained, kept.channels_trained)
    linear_flops = 2.0 * tokens * weights
    score_flops = _score_flops(shape, setting)
    widths = linear_widths(shape, linear_roles(shape), top, kept.heads_trained, kept.channels_trained)
    elementwise = _elementwise_values(shape, setting, top, kept.heads_trained, kept.channels_trained)
    flops = flops + 2.0 * score_flops * kept.heads_trained + linear_flops + 2.0 * _head_flops(shape, setting)
    moved = moved + size * (weights + tokens * widths + BACKWARD_PASS_FACTOR * elementwise)
    if top and not embeddings:
        entry = shape.hidden * (query_width(shape) + 2 * key_width(shape))
        flops = flops - 2.0 * tokens * entry * kept.heads_lowest
    launches += OPTIMIZER_LAUNCHES + BACKWARD_LAUNCH_FACTOR * (MODEL_LAUNCHES + top * _layer_launches(shape))
    if setting.tuning == "lora":
        flops = flops + 3.0 * 2.0 * tokens * lora_weights(shape, kept, rank)
        moved = moved + size * LORA_PASSES * tokens * lora_widths(shape, kept)
        launches += top * len(kept.lora_roles) * (LORA_LAUNCHES_FORWARD + LORA_LAUNCHES_BACKWARD)
    elif setting.tuning == "adapter":
        adapters = bottleneck_work(shape, setting, top)
        flops, moved = flops + adapters.flops, moved + size * adapters.moved_values
        launches += adapters.launches
    else:
        flops = flops + linear_flops
        moved = moved + size * (weights + tokens * widths)
        if embeddings:
            moved = moved + 2.0 * size * shape.embedding_weights
    if setting.checkpointing:
        # The trained layers' forward once more; low-rank branches and bottlenecks are too thin to count here.
        flops = flops + linear_flops + score_flops * kept.heads_trained
        moved = moved + size * (weights + tokens * widths + elementwise)
        launches += top * _layer_launches(shape)
    return _Counts(flops, moved, launches)


def _with_optimizer(work: _Counts, shape: ModelShape, kept: KeptSums, rank: ArrayLike, setting: StepSetting) -> _Counts:
    """All batches of a step, and the one update after them (whose fused launches a batch counts already)."""
    batches = setting.micro_batches
    trained = trained_weights(shape, setting, kept, rank)
    launches = batches * work.launches - (batches - 1) * OPTIMIZER_LAUNCHES
    passes = ADAMW_PASSES
    if setting.optimizer == "per_tensor":
        passes = PER_TENSOR_PASSES
        launches += PER_TENSOR_LAUNCHES * trained_tensors(shape, setting, kept) - OPTIMIZER_LAUNCHES
    elif setting.optimizer == "none":
        passes = 0
        launches -= OPTIMIZER_LAUNCHES
    # Every batch after the first adds to the gradients: two reads and a write.
    passes += (batches - 1) * ACCUMULATION_PASSES
    return _Counts(batches * work.flops, batches * work.moved + passes * TRAINED_BYTES * trained, launches)


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
    peak = 3.0 * TRAINED_BYTES * shape.hidden * max(shape.ffn, query_width(shape))
    return StepWork(flops, moved, np.asarray(launches), np.asarray(peak))


def slicing_work(shape: ModelShape, kept_weights: FloatArray, precision: Precision) -> StepWork:
    """Changing the structure once: every kept weight is read and written. Storage is counted as memory (ours)."""
    moved = 2.0 * BYTES_PER_VALUE[precision] * np.asarray(kept_weights, dtype=np.float64)
    launches = float(shape.layers * len(linear_roles(shape)) * SLICE_LAUNCHES)
    return StepWork(np.asarray(0.0), moved, np.asarray(launches), np.asarray(0.0))
