"""The families that fedsim knows, by their ``model_type``; a user's own can be added."""

from __future__ import annotations

from fedsim.families.bert import BERT
from fedsim.families.distilbert import DISTILBERT
from fedsim.families.family import Family
from fedsim.families.llama import LLAMA
from fedsim.families.mpnet import MPNET
from fedsim.families.qwen2 import QWEN2
from fedsim.families.roberta import ROBERTA
from fedsim.structure import ModelShape

_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known: its checkpoints can be trained and exported, and its shapes carry the clock.

    Raises:
        ValueError: the name, or a shape's name, is taken by another family.
    """
    if _FAMILIES.get(family.name, family) != family:
        raise ValueError(f"there is a family '{family.name}' already")
    others = {shape.name for one in _FAMILIES.values() if one.name != family.name for shape in one.shapes}
    for shape in family.shapes:
        if shape.name in others:
            raise ValueError(f"family '{family.name}': there is a shape '{shape.name}' already")
        if (shape.architecture, shape.gated) != (family.name, family.gated):
            raise ValueError(f"family '{family.name}': shape '{shape.name}' is of another family")
    _FAMILIES[family.name] = family


def find_family(name: object) -> Family | None:
    """The family of a ``model_type``; None where there is none."""
    return _FAMILIES.get(name) if isinstance(name, str) else None


def family_of(shape: ModelShape) -> Family:
    """The family of a shape.

    Raises:
        KeyError: the shape is of no known family.
    """
    return _FAMILIES[shape.architecture]


def family_names(causal: bool | None = None) -> tuple[str, ...]:
    """All names, or those of the families that can (or cannot) predict the next token."""
    return tuple(name for name, family in _FAMILIES.items() if causal is None or family.causal == causal)


def family_shapes() -> dict[str, ModelShape]:
    """The published shapes of all families, by name."""
    return {shape.name: shape for family in _FAMILIES.values() for shape in family.shapes}


for _family in (BERT, ROBERTA, DISTILBERT, MPNET, LLAMA, QWEN2):
    register_family(_family)
