"""Models of physically small shapes, for `AutoConfig`, `AutoModel` and its variants with a classifier or an output.

A configuration of the library cannot say that a layer has fewer heads or channels than another. The classes here, made
for each family from the library's (``SlicedBertConfig``, ``SlicedBertModel``), add two lists to it, and make the plain
model with its prunable Linears at those widths: the modules, their names and the forward pass are those of the library
(its attention takes the number of heads from the width of the query, see `fedsim.learn.model.slicing`). Importing this
module (or `fedsim.learn.export.exported`) registers them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from fedsim.families.config_json import read_shape
from fedsim.families.family import Family
from fedsim.families.family_catalogue import family_names, find_family
from fedsim.learn.model.head_bias import keep_heads
from fedsim.learn.model.linears import kept_columns, kept_rows, prunable_linears
from fedsim.structure import ModelShape, Structure

PREFIX = "Sliced"


@dataclass(frozen=True)
class SlicedClasses:
    """A family's classes: configuration, base model, and its classifier or its causal language model."""

    config: type[Any]
    base: type[Any]
    whole: type[Any] | None


_MADE: dict[str, SlicedClasses] = {}


def sliced_classes(family: Family) -> SlicedClasses:
    """The classes of a family, made once and registered with the library's `Auto` classes."""
    if family.name not in _MADE:
        _MADE[family.name] = _made(family)
    return _MADE[family.name]


def _made(family: Family) -> SlicedClasses:
    title, config = family.title, _config_class(family)
    base = _model_class(family, config, f"{title}Model")
    whole = None
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, base, exist_ok=True)
    if family.causal:
        whole = _model_class(family, config, f"{title}ForCausalLM")
        AutoModelForCausalLM.register(config, whole, exist_ok=True)
    elif family.classifier is not None:
        whole = _model_class(family, config, f"{title}ForSequenceClassification")
        AutoModelForSequenceClassification.register(config, whole, exist_ok=True)
    return SlicedClasses(config, base, whole)


def _config_class(family: Family) -> type[Any]:
    """Layer i keeps ``kept_heads[i]`` head groups and ``kept_channels[i]`` channels; all where null.

    Where attention has a bias by head, ``kept_head_places`` says which heads: their columns of its table are read.
    """
    lists = {"kept_heads": "list[int] | None", "kept_channels": "list[int] | None"}
    if family.head_bias is not None:
        lists["kept_head_places"] = "list[list[int]] | None"
    content = {
        "__module__": __name__,
        "__doc__": f"A {family.title} whose layers keep fewer heads and channels.",
        "__annotations__": lists,
        "model_type": f"fedsim-sliced-{family.name}",
        **dict.fromkeys(lists),
    }
    return type(f"{PREFIX}{family.title}Config", (getattr(transformers, f"{family.title}Config"),), content)


def _model_class(family: Family, config_class: type[Any], name: str) -> type[Any]:
    plain: Any = getattr(transformers, name)

    def make(self: Any, config: Any, **options: Any) -> None:
        plain.__init__(self, config, **options)
        _shrink(self.base_model, config, family)

    content = {
        "__module__": __name__,
        "__doc__": f"`{name}` with small Linears.",
        "config_class": config_class,
        "__init__": make,
    }
    return type(f"{PREFIX}{name}", (plain,), content)


def __getattr__(name: str) -> Any:
    """The classes by name, as ``config.json`` and pickles call them."""
    for family in filter(None, map(find_family, family_names())):
        if name.startswith(f"{PREFIX}{family.title}"):
            classes = sliced_classes(family)
            for one in (classes.config, classes.base, classes.whole):
                if one is not None and one.__name__ == name:
                    return one
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def sliced_config(config: Any, family: Family, structure: Structure) -> Any:
    """The configuration of a plain model, with the kept counts of `structure`."""
    values = {
        key: value for key, value in config.to_dict().items() if key not in ("model_type", "transformers_version")
    }
    if family.head_bias is not None:
        values["kept_head_places"] = [np.flatnonzero(mask).tolist() for mask in structure.head_mask]
    return sliced_classes(family).config(
        **values, kept_heads=structure.heads_kept.tolist(), kept_channels=structure.channels_kept.tolist()
    )


def shape_of(config: Any, family: Family) -> ModelShape:
    """Unpruned widths, of a plain or a sliced configuration of that family."""
    return read_shape(family, config.to_dict(), config.model_type, f"model '{config.model_type}'")


def _shrink(base: nn.Module, config: Any, family: Family) -> None:
    """Put small Linears in place of those that the configuration cuts. The weights are loaded afterwards."""
    shape = shape_of(config, family)
    structure = Structure(
        _first(config.kept_heads, shape.layers, shape.head_groups, "kept_heads"),
        _first(config.kept_channels, shape.layers, shape.ffn, "kept_channels"),
    )
    places = getattr(config, "kept_head_places", None)
    if places is not None:
        structure.head_mask[:] = [np.isin(np.arange(shape.head_groups), kept) for kept in places]
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
    keep_heads(base, shape, structure)


def _first(kept: list[int] | None, layers: int, groups: int, name: str) -> Any:
    """A mask ``(layers, groups)`` of the right counts: which groups they are does not matter for the widths."""
    counts = [groups] * layers if kept is None else kept
    if len(counts) != layers or not all(1 <= count <= groups for count in counts):
        raise ValueError(f"{name} is {counts}: {layers} counts from 1 to {groups} are needed")
    return np.arange(groups) < np.array(counts)[:, None]


def register_all() -> None:
    """Register the classes of every family known by now; those of a later one come with `sliced_classes`."""
    for family in filter(None, map(find_family, family_names())):
        sliced_classes(family)


register_all()
