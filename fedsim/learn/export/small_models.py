"""Models of physically small shapes, for `AutoConfig`, `AutoModel` and its variants with a classifier or an output.

A BERT, RoBERTa or LLaMA configuration cannot say that a layer has fewer heads or channels than another. The classes
here add two lists to it, and make the plain model with its prunable Linears at those widths: the modules, their names
and the forward pass are those of the library (its attention takes the number of heads from the width of the query, see
`fedsim.learn.model.slicing`). Importing this module (or `fedsim.learn.export.exported`) registers them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

from fedsim.learn.model.linears import kept_columns, kept_rows, prunable_linears
from fedsim.structure import Architecture, ModelShape, Structure


class SlicedBertConfig(BertConfig):
    """A BERT whose layer i keeps ``kept_heads[i]`` heads and ``kept_channels[i]`` channels; all where null."""

    model_type = "fedsim-sliced-bert"
    kept_heads: list[int] | None = None
    kept_channels: list[int] | None = None


class SlicedRobertaConfig(RobertaConfig):
    """A RoBERTa whose layer i keeps ``kept_heads[i]`` heads and ``kept_channels[i]`` channels; all where null."""

    model_type = "fedsim-sliced-roberta"
    kept_heads: list[int] | None = None
    kept_channels: list[int] | None = None


class SlicedLlamaConfig(LlamaConfig):
    """A LLaMA whose layer i keeps ``kept_heads[i]`` key-value heads, each with the query heads that read it, and
    ``kept_channels[i]`` channels; all where null.
    """

    model_type = "fedsim-sliced-llama"
    kept_heads: list[int] | None = None
    kept_channels: list[int] | None = None


class SlicedBertModel(BertModel):
    """`BertModel` with small Linears."""

    config_class = SlicedBertConfig

    def __init__(self, config: SlicedBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        _shrink(self, config, "bert")


class SlicedBertForSequenceClassification(BertForSequenceClassification):
    """`BertForSequenceClassification` with small Linears."""

    config_class = SlicedBertConfig

    def __init__(self, config: SlicedBertConfig) -> None:
        super().__init__(config)
        _shrink(self.bert, config, "bert")


class SlicedRobertaModel(RobertaModel):
    """`RobertaModel` with small Linears."""

    config_class = SlicedRobertaConfig

    def __init__(self, config: SlicedRobertaConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        _shrink(self, config, "roberta")


class SlicedRobertaForSequenceClassification(RobertaForSequenceClassification):
    """`RobertaForSequenceClassification` with small Linears."""

    config_class = SlicedRobertaConfig

    def __init__(self, config: SlicedRobertaConfig) -> None:
        super().__init__(config)
        _shrink(self.roberta, config, "roberta")


class SlicedLlamaModel(LlamaModel):
    """`LlamaModel` with small Linears."""

    config_class = SlicedLlamaConfig

    def __init__(self, config: SlicedLlamaConfig) -> None:
        super().__init__(config)
        _shrink(self, config, "llama")


class SlicedLlamaForCausalLM(LlamaForCausalLM):
    """`LlamaForCausalLM` with small Linears."""

    config_class = SlicedLlamaConfig

    def __init__(self, config: SlicedLlamaConfig) -> None:
        super().__init__(config)
        _shrink(self.model, config, "llama")


SLICED_CONFIGS: dict[Architecture, type[Any]] = {
    "bert": SlicedBertConfig,
    "roberta": SlicedRobertaConfig,
    "llama": SlicedLlamaConfig,
}
_BASES: dict[Any, Any] = {
    SlicedBertConfig: SlicedBertModel,
    SlicedRobertaConfig: SlicedRobertaModel,
    SlicedLlamaConfig: SlicedLlamaModel,
}
_CLASSIFIERS: dict[Any, Any] = {
    SlicedBertConfig: SlicedBertForSequenceClassification,
    SlicedRobertaConfig: SlicedRobertaForSequenceClassification,
}


def sliced_config(config: Any, architecture: Architecture, structure: Structure) -> Any:
    """The configuration of a plain model, with the kept counts of `structure`."""
    values = {
        key: value for key, value in config.to_dict().items() if key not in ("model_type", "transformers_version")
    }
    return SLICED_CONFIGS[architecture](
        **values, kept_heads=structure.heads_kept.tolist(), kept_channels=structure.channels_kept.tolist()
    )


def shape_of(config: Any, architecture: Architecture) -> ModelShape:
    """Unpruned widths of the blocks; embeddings and classifier are left out (0 rows, 2 labels)."""
    heads = config.num_attention_heads
    return ModelShape(
        name=config.model_type,
        architecture=architecture,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn=config.intermediate_size,
        vocab=0,
        positions=0,
    )


def _shrink(base: nn.Module, config: Any, architecture: Architecture) -> None:
    """Put small Linears in place of those that the configuration cuts. The weights are loaded afterwards."""
    shape = shape_of(config, architecture)
    structure = Structure(
        _first(config.kept_heads, shape.layers, shape.head_groups, "kept_heads"),
        _first(config.kept_channels, shape.layers, shape.ffn, "kept_channels"),
    )
    for linear in prunable_linears(shape):
        rows, columns = kept_rows(linear, structure, shape), kept_columns(linear, structure, shape)
        if rows is None and columns is None:
            continue
        path, leaf = linear.name.rsplit(".", 1)
        old = base.get_submodule(linear.name)
        small = nn.Linear(
            linear.d_in if columns is None else len(columns),
            linear.d_out if rows is None else len(rows),
            bias=old.bias is not None,
            device=old.weight.device,  # type: ignore[arg-type]
            dtype=old.weight.dtype,  # type: ignore[arg-type]
        )
        setattr(base.get_submodule(path), leaf, small)


def _first(kept: list[int] | None, layers: int, groups: int, name: str) -> Any:
    """A mask ``(layers, groups)`` of the right counts: which groups they are does not matter for the widths."""
    counts = [groups] * layers if kept is None else kept
    if len(counts) != layers or not all(1 <= count <= groups for count in counts):
        raise ValueError(f"{name} is {counts}: {layers} counts from 1 to {groups} are needed")
    return np.arange(groups) < np.array(counts)[:, None]


for _config, _model in _BASES.items():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
for _config, _classifier in _CLASSIFIERS.items():
    AutoModelForSequenceClassification.register(_config, _classifier, exist_ok=True)
AutoModelForCausalLM.register(SlicedLlamaConfig, SlicedLlamaForCausalLM, exist_ok=True)
