"""How a step is run, and which part of a model it reaches: what the counting rules are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from fedsim.contracts.common import FloatArray
from fedsim.errors import ConfigError, unknown
from fedsim.structure import ModelShape

Tuning = Literal["lora", "full", "adapter", "inference"]
Precision = Literal["fp32", "fp16"]
Optimizer = Literal["fused", "per_tensor", "none"]

BYTES_PER_VALUE = {"fp32": 4, "fp16": 2}
HEAD_ROLES = frozenset({"query", "key", "value", "attention_out"})
CHANNEL_ROLES = {False: frozenset({"up", "down"}), True: frozenset({"gate", "up", "down"})}
"""Prunable Linears of a layer that go with attention heads, and with FFN channels (encoder / gated)."""
TRAINED_BYTES = 4
"""LoRA, gradients, optimizer moments and traffic are fp32 whatever the backbone's precision."""


@dataclass(frozen=True)
class StepSetting:
    """How a step is run.

    Attributes:
        batch_size, seq_len: sequences per step and tokens per sequence, >= 1.
        precision: of weights and activations.
        tuning: ``lora``, ``full``, ``adapter`` (one bottleneck after the FFN of each trained layer), or ``inference``
            (forward only, LoRA merged).
        train_top_layers: how many of the last layers are trained; None: all, and in full tuning the embeddings too
            (so does a number equal to the model's layers). 0 trains the classifier alone.
        lora_roles: prunable Linears of each trained layer that carry LoRA, by role (`HEAD_ROLES`, `CHANNEL_ROLES`);
            None: all. Read in LoRA tuning only.
        micro_batches: how many batches of `batch_size` one optimizer step sums its gradients over.
        checkpointing: saves only the input of each trained layer and runs its forward again in the backward pass.
        cached_activations: the frozen layers below are neither held nor run: what they gave was kept on storage.
        adapter_width: of the bottleneck, in adapter tuning.
        optimizer: ``fused``, the least that AdamW can move; ``per_tensor``, a loop over tensors as PyTorch ran it
            before its foreach and fused versions; ``none``, gradients that change no weight.
        dropout: whether dropout is on, as in the published peaks; off, its masks and dropped copies are not kept.
    """

    batch_size: int
    seq_len: int
    precision: Precision = "fp32"
    tuning: Tuning = "lora"
    train_top_layers: int | None = None
    lora_roles: frozenset[str] | None = None
    micro_batches: int = 1
    checkpointing: bool = False
    cached_activations: bool = False
    adapter_width: int | None = None
    optimizer: Optimizer = "fused"
    dropout: bool = True

    def __post_init__(self) -> None:
        for field in ("batch_size", "seq_len", "micro_batches"):
            value = getattr(self, field)
            if value < 1:
                raise ConfigError(f"{field} is {value}; it must be at least 1")
        if self.precision not in BYTES_PER_VALUE:
            raise ConfigError(f"precision is '{self.precision}'; allowed are fp32 and fp16")
        if self.tuning not in get_args(Tuning):
            raise ConfigError(f"tuning is '{self.tuning}'; allowed are {', '.join(get_args(Tuning))}")
        if self.optimizer not in get_args(Optimizer):
            raise ConfigError(f"optimizer is '{self.optimizer}'; allowed are {', '.join(get_args(Optimizer))}")
        self._check_what_training_alone_knows()
        if self.train_top_layers is not None and self.train_top_layers < 0:
            raise ConfigError(f"train_top_layers is {self.train_top_layers}; it must be at least 0")
        if self.lora_roles is not None:
            known = HEAD_ROLES | CHANNEL_ROLES[True]
            if not self.lora_roles:
                raise ConfigError(f"lora_roles is empty; it must name at least one of {', '.join(sorted(known))}")
            for role in sorted(self.lora_roles - known):
                raise ConfigError(f"lora_roles: {unknown('role', role, known)}")

    def _check_what_training_alone_knows(self) -> None:
        if (self.adapter_width is not None) != (self.tuning == "adapter"):
            raise ConfigError(
                f"adapter_width is {self.adapter_width} with tuning '{self.tuning}'; adapter tuning needs it, and no "
                "other takes it"
            )
        if self.adapter_width is not None and self.adapter_width < 1:
            raise ConfigError(f"adapter_width is {self.adapter_width}; it must be at least 1")
        if self.cached_activations and (self.train_top_layers is None or self.tuning == "inference"):
            raise ConfigError(
                "cached_activations needs train_top_layers: it is the layers below those trained that are cached"
            )
        if self.tuning == "inference":
            if self.checkpointing:
                raise ConfigError("checkpointing is not allowed in inference, which keeps nothing for a backward pass")
            if self.micro_batches != 1:
                raise ConfigError(
                    f"micro_batches is {self.micro_batches}; it is not allowed in inference, which sums no gradients"
                )

    @property
    def tokens(self) -> int:
        """Tokens of one batch (of a step: `micro_batches` times as many)."""
        return self.batch_size * self.seq_len

    @property
    def samples(self) -> int:
        """Sequences of one step."""
        return self.batch_size * self.micro_batches


@dataclass(frozen=True, eq=False)
class KeptSums:
    """Kept fractions summed over layers: all that are run (none below the trained ones where their activations are
    cached), the trained ones, the lowest trained one. What of these carries LoRA."""

    heads_all: FloatArray
    channels_all: FloatArray
    heads_trained: FloatArray
    channels_trained: FloatArray
    heads_lowest: FloatArray
    trained_layers: int
    layers: int
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


def embeddings_trained(shape: ModelShape, setting: StepSetting) -> bool:
    return setting.tuning == "full" and trained_layers(shape, setting) == shape.layers


def embeddings_run(shape: ModelShape, setting: StepSetting) -> bool:
    """Whether the embeddings are held and looked up: not where the activations above them are cached."""
    return not setting.cached_activations or trained_layers(shape, setting) == shape.layers


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
    layers = shape.layers
    if setting.cached_activations:
        heads_all, channels_all, layers = heads_top, channels_top, top
    roles = lora_roles(shape, setting)
    return KeptSums(heads_all, channels_all, heads_top, channels_top, heads_low, top, layers, roles)
