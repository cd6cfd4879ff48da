"""LoRA on a shared, sliced backbone: one PEFT model that takes every client's structure and factors in turn.

The update of a Linear is ``dW = c B A`` (LoRA, arXiv 2106.09685) with ``c = alpha / r`` constant, so that a rank only
says how many components there are. PEFT's layers do the forward pass; here their tensors are swapped in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from fedsim.learn.model.adapter import Adapter, Factors
from fedsim.learn.model.backbone import Backbone
from fedsim.learn.model.linears import COLUMN_PRUNED, Targets, kept_columns, kept_rows, prunable_linears, target_linears
from fedsim.learn.model.slicing import apply_structure, check_structure, take
from fedsim.learn.train.salience import watchable
from fedsim.structure import Structure

_ADAPTER = "default"


class HasInputs(Protocol):
    """A batch that knows the model's keyword arguments."""

    @property
    def inputs(self) -> Mapping[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and perhaps ``token_type_ids``, each ``(batch, tokens)``."""


@dataclass(frozen=True, eq=False)
class Replacement:
    """A factor that pruning made smaller: what replaces it, and which of its rows (axis 0) or columns (1) stay."""

    new: nn.Parameter
    axis: int
    indices: NDArray[np.int64]


class LoraModel:
    """The backbone with PEFT's LoRA layers; owns the backbone's present widths.

    Attributes:
        backbone: shared, changed in place.
        targets: the Linears that carry LoRA.
        alpha_over_rank: the scale c of ``dW = c B A``, the same at every rank.
        watched: inputs of the Linears that read heads and channels, by name, of the last pass under `watching`; after
            a backward pass they have gradients.
    """

    def __init__(self, backbone: Backbone, targets: Targets, alpha_over_rank: float) -> None:
        """Put LoRA layers into the backbone.

        Raises:
            ConfigError: an unknown target.
            ValueError: the backbone carries LoRA already.
        """
        self.backbone = backbone
        self.targets = target_linears(backbone.shape, targets)
        self.alpha_over_rank = alpha_over_rank
        self._structure = Structure.full(backbone.shape)
        self._merged: Mapping[str, torch.Tensor] = {}
        self.watched: dict[str, torch.Tensor] = {}
        if any(hasattr(module, "lora_A") for module in backbone.encoder.modules()):
            raise ValueError("this backbone carries LoRA already; one LoraModel serves all clients")
        apply_structure(backbone, self._structure)
        # Whole paths, because a suffix such as output.dense is ambiguous. PEFT draws from torch's global generator
        # for values that `load` replaces: the fork keeps that out of the run.
        config = LoraConfig(
            r=1, lora_alpha=1, lora_dropout=0.0, target_modules=[linear.name for linear in self.targets]
        )
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(config, backbone.encoder, adapter_name=_ADAPTER)
        self._layers = {linear.name: backbone.encoder.get_submodule(linear.name) for linear in self.targets}
        for layer in self._layers.values():
            layer.scaling[_ADAPTER] = alpha_over_rank  # type: ignore[index,operator]
        backbone.model.to(backbone.device).eval()

    @property
    def structure(self) -> Structure:
        """What the backbone keeps at present."""
        return self._structure

    def load(self, structure: Structure, adapter: Adapter) -> None:
        """Take a client's structure, factors (any rank), head and merged updates; the adapter's tensors are copied.

        Raises:
            ValueError: factors missing, or not of the structure's widths.
        """
        self._check(structure, adapter)
        apply_structure(self.backbone, structure, adapter.merged)
        self._structure, self._merged = structure, adapter.merged
        for linear in self.targets:
            a, b = adapter.factors[linear.name]
            self._set_factor(linear.name, "lora_A", self._fresh(a))
            self._set_factor(linear.name, "lora_B", self._fresh(b))
        for name in self.backbone.head_names:
            path, leaf = name.rsplit(".", 1)
            setattr(self.backbone.model.get_submodule(path), leaf, self._fresh(adapter.head[name]))

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The present factors ``(A, B)`` of one target."""
        layer = self._layers[name]
        return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight  # type: ignore[index,return-value,union-attr]

    def parameters_list(self) -> list[nn.Parameter]:
        """The trained parameters: A and B of each target in block order, then the head."""
        factors = [factor for linear in self.targets for factor in self.factors(linear.name)]
        return factors + [self.backbone.model.get_parameter(name) for name in self.backbone.head_names]

    def logits(self, batch: HasInputs | Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Class scores ``(batch, labels)``, with gradients unless switched off."""
        return self.backbone.model(**(batch if isinstance(batch, Mapping) else batch.inputs))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep in `watched` what the column-pruned Linears read in passes inside, so that it gets a gradient.

        An input that nothing trained leads to becomes a leaf: its gradient exists all the same.
        """
        self.watched = {}

        def keep(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
            def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
                x = watchable(inputs[0])
                self.watched[name] = x
                return (x, *inputs[1:])

            return hook

        handles = [
            self.backbone.encoder.get_submodule(linear.name).register_forward_pre_hook(keep(linear.name))
            for linear in prunable_linears(self.backbone.shape)
            if linear.role in COLUMN_PRUNED
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def read(self) -> Adapter:
        """The present factors and head, as detached copies at the present widths."""
        factors: dict[str, Factors] = {}
        for linear in self.targets:
            a, b = self.factors(linear.name)
            factors[linear.name] = (a.detach().clone(), b.detach().clone())
        parameters = {name: self.backbone.model.get_parameter(name) for name in self.backbone.head_names}
        return Adapter(factors, {name: parameter.detach().clone() for name, parameter in parameters.items()})

    def prune(self, structure: Structure) -> dict[nn.Parameter, Replacement]:
        """Shrink weights and factors to `structure`, which keeps a part of what is kept now.

        Returns:
            For every factor that was replaced, what replaced it. Factors that keep their widths stay the same object.
        Raises:
            ValueError: `structure` would bring a group back.
        """
        check_structure(self.backbone, structure)
        old = self._structure
        if (structure.head_mask & ~old.head_mask).any() or (structure.channel_mask & ~old.channel_mask).any():
            raise ValueError("pruning cannot bring a group back; load the grown structure instead")
        apply_structure(self.backbone, structure, self._merged)
        self._structure = structure
        replaced: dict[nn.Parameter, Replacement] = {}
        for linear in self.targets:
            a, b = self.factors(linear.name)
            rows = _within(
                kept_rows(linear, old, self.backbone.shape), kept_rows(linear, structure, self.backbone.shape)
            )
            columns = _within(
                kept_columns(linear, old, self.backbone.shape), kept_columns(linear, structure, self.backbone.shape)
            )
            if rows is not None and len(rows) < b.shape[0]:
                replaced[b] = Replacement(nn.Parameter(take(b.detach(), 0, rows)), 0, rows)
                self._set_factor(linear.name, "lora_B", replaced[b].new)
            if columns is not None and len(columns) < a.shape[1]:
                replaced[a] = Replacement(nn.Parameter(take(a.detach(), 1, columns)), 1, columns)
                self._set_factor(linear.name, "lora_A", replaced[a].new)
        return replaced

    def prune_with_optimizer(self, structure: Structure, optimizer: torch.optim.Optimizer) -> None:
        """`prune`, and slice the optimizer's state (Adam's moments) alike, so that kept entries go on undisturbed."""
        replaced = self.prune(structure)
        for group in optimizer.param_groups:
            group["params"] = [replaced[p].new if p in replaced else p for p in group["params"]]
        for old, replacement in replaced.items():
            state = optimizer.state.pop(old, None)
            if state is not None:
                optimizer.state[replacement.new] = {
                    key: take(value, replacement.axis, replacement.indices)
                    if isinstance(value, torch.Tensor) and value.shape == old.shape
                    else value
                    for key, value in state.items()
                }

    def _fresh(self, tensor: torch.Tensor) -> nn.Parameter:
        """A new leaf on the backbone's device and in its precision."""
        like = self.backbone.full_weights[self.targets[0].name][0]
        return nn.Parameter(tensor.detach().to(device=like.device, dtype=like.dtype, copy=True))

    def _set_factor(self, name: str, kind: Literal["lora_A", "lora_B"], value: nn.Parameter) -> None:
        linear = getattr(self._layers[name], kind)[_ADAPTER]
        linear.weight = value
        linear.out_features, linear.in_features = value.shape
        if kind == "lora_A":
            # The scale stays; PEFT's records of the rank are kept honest for whoever prints them.
            self._layers[name].r[_ADAPTER] = value.shape[0]  # type: ignore[index,operator]
            self._layers[name].lora_alpha[_ADAPTER] = self.alpha_over_rank * value.shape[0]  # type: ignore[index,operator]

    def _check(self, structure: Structure, adapter: Adapter) -> None:
        check_structure(self.backbone, structure)
        wanted = {linear.name for linear in self.targets}
        if set(adapter.factors) != wanted:
            raise ValueError(f"adapter has factors for {len(adapter.factors)} linears, the model for {len(wanted)}")
        if set(adapter.head) != set(self.backbone.head_names):
            raise ValueError(f"adapter has head parameters {sorted(adapter.head)}, not {self.backbone.head_names}")
        for linear in self.targets:
            a, b = adapter.factors[linear.name]
            rows = kept_rows(linear, structure, self.backbone.shape)
            columns = kept_columns(linear, structure, self.backbone.shape)
            d_out = linear.d_out if rows is None else len(rows)
            d_in = linear.d_in if columns is None else len(columns)
            if a.shape[1] != d_in or b.shape[0] != d_out or a.shape[0] != b.shape[1]:
                raise ValueError(
                    f"{linear.name}: factors of shape {tuple(a.shape)}, {tuple(b.shape)} do not fit {d_out} x {d_in}"
                )


def _within(old: NDArray[np.int64] | None, new: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
    """Places of the indices `new` among the indices `old` (None: all features)."""
    return new if old is None or new is None else np.searchsorted(old, new).astype(np.int64)
