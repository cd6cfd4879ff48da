"""The one reader of ``config.json``: the widths of a model, and the longest text that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsim.errors import ModelError
from fedsim.families.family import Family
from fedsim.families.family_catalogue import family_names, find_family
from fedsim.structure import ModelShape


def family_in(config: Mapping[str, Any], subject: str) -> Family:
    """The family that a configuration names.

    Args:
        subject: how errors call the model: ``model 'x'``.
    Raises:
        ModelError: none, or one that fedsim does not know.
    """
    family = find_family(config.get("model_type"))
    if family is None:
        kind, allowed = config.get("model_type"), ", ".join(family_names())
        raise ModelError(f"{subject} is of type '{kind}' (allowed types: {allowed})")
    if config.get("is_decoder") and not family.causal:
        raise ModelError(f"{subject}: {family.name} as a decoder is not supported")
    return family


def read_shape(
    family: Family, config: Mapping[str, Any], name: str, subject: str, labels: int = 2, pooling: str = "native"
) -> ModelShape:
    """The widths.

    Args:
        config: of ``config.json``, or the library's configuration as a mapping.
        name: of the shape.
        labels: outputs of the classifier; 0: none, the model predicts tokens.
        pooling: ``native`` or ``mean``, which has no dense layer before the classifier.
    Raises:
        ModelError: a width that is missing or cannot be, or a family that predicts no tokens asked for them.
    """
    require_tokens(family, labels, subject)
    keys = family.keys

    def width(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{subject}: config.json has {key} = {value!r}; it must be a positive integer")
        return value

    hidden, heads = width(keys.hidden), width(keys.heads)
    kv_heads = width(keys.kv_heads, heads) if family.causal else heads
    own_width = family.causal and config.get(keys.head_dim) is not None
    if not own_width and hidden % heads:
        raise ModelError(f"{subject}: {keys.hidden} {hidden} is not a multiple of {keys.heads} {heads}")
    if heads % kv_heads:
        raise ModelError(f"{subject}: {keys.heads} {heads} is not a multiple of {keys.kv_heads} {kv_heads}")
    return ModelShape(
        name=name,
        architecture=family.name,
        layers=width(keys.layers),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width(keys.head_dim) if own_width else hidden // heads,
        ffn=width(keys.ffn),
        vocab=width(keys.vocab),
        positions=0 if family.causal else width(keys.positions),
        labels=labels,
        pooler_width=hidden if family.dense is not None and pooling == "native" else 0,
        tied=family.causal and bool(config.get("tie_word_embeddings", False)),
        gated=family.gated,
    )


def require_tokens(family: Family, labels: int, subject: str) -> None:
    """Raise ModelError where the next token is asked for (no labels) of a family that cannot predict it."""
    if labels == 0 and not family.causal:
        raise ModelError(
            f"{subject} is of type '{family.name}', an encoder, and cannot predict the next token: data.task "
            f"'causal_lm' needs a decoder (allowed types: {', '.join(family_names(causal=True))})"
        )


def longest_input(family: Family, config: Mapping[str, Any]) -> int:
    """Tokens of the longest text that the positions allow, and a sliding window of attention, if any."""
    positions = int(config[family.keys.positions])
    if family.counts_from_padding:
        index = family.padding_index if family.padding_index is not None else config.get("pad_token_id") or 0
        positions -= index + 1
    # Within the window a text is seen whole, which is all that the cohort's attention knows.
    window = config.get(family.keys.window) if family.causal else None
    return positions if window is None else min(positions, int(window))
