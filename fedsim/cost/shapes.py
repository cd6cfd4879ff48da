"""Model shapes by name: built in, from a local folder's ``config.json``, or from a hub name's. No weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsim.cost.foreign_shapes import FOREIGN_SHAPES
from fedsim.errors import ModelError, nearest
from fedsim.files import parse_json
from fedsim.places import user_path
from fedsim.resources import MODELS, asset_folder
from fedsim.structure import Architecture, ModelShape

_BERT = (30522, 512)
_ROBERTA = (50265, 514)
"""Rows of the word and of the position embeddings."""


def _encoder(
    name: str, architecture: Architecture, layers: int, hidden: int, heads: int, embeddings: tuple[int, int]
) -> ModelShape:
    """An encoder with the usual proportions: FFN four times the hidden width."""
    return ModelShape(
        name,
        architecture,
        layers,
        hidden,
        heads,
        heads,
        hidden // heads,
        4 * hidden,
        *embeddings,
        pooler_width=hidden if architecture == "roberta" else 0,
    )


_BUILT_IN = {
    shape.name: shape
    for shape in (
        _encoder("bert-base", "bert", 12, 768, 12, _BERT),
        _encoder("bert-large", "bert", 24, 1024, 16, _BERT),
        _encoder("roberta-base", "roberta", 12, 768, 12, _ROBERTA),
        _encoder("roberta-large", "roberta", 24, 1024, 16, _ROBERTA),
        _encoder("minilm-l6", "bert", 6, 384, 12, _BERT),
        _encoder("minilm", "bert", 6, 384, 12, _BERT),  # the optional package's checkpoint of that shape
        ModelShape("tinyllama-1.1b", "llama", 22, 2048, 32, 4, 64, 5632, vocab=32000, positions=0),
        ModelShape("llama-7b", "llama", 32, 4096, 32, 32, 128, 11008, vocab=32000, positions=0),
    )
}


def built_in_shapes() -> tuple[str, ...]:
    """Names of the shapes that need no file."""
    return tuple(_BUILT_IN)


def load_shape(name: str, labels: int = 2) -> ModelShape:
    """The widths of a model. The built-in LLaMA shapes have output weights of their own (untied), as published.

    Args:
        name: a built-in shape; ``tiny`` or ``tiny-decoder`` (they travel with the package); a local folder with a
            ``config.json`` of ``model_type`` bert, roberta or llama; or else a hub name.
        labels: outputs of the classifier; 0: none, the model predicts tokens (LLaMA type only).
    Raises:
        ModelError: no such model, a configuration that is not one of the three types, or an encoder asked for tokens.
    """
    if labels < 0:
        raise ModelError(f"labels is {labels}; it must be at least 0 (0: a language model)")
    shape = _find_shape(name, labels)
    if shape.is_language_model and shape.architecture != "llama":
        raise ModelError(
            f"model '{name}' is of type '{shape.architecture}', an encoder, and cannot predict the next token "
            "(data.task causal_lm needs a decoder of LLaMA type)"
        )
    return shape


def _find_shape(name: str, labels: int) -> ModelShape:
    if name in _BUILT_IN:
        return replace(_BUILT_IN[name], labels=labels)
    if name in FOREIGN_SHAPES:
        return replace(FOREIGN_SHAPES[name], labels=labels)
    if name in MODELS:
        return _read_shape(asset_folder(name) / "config.json", name, labels)
    if user_path(name).is_dir():
        return _read_shape(user_path(name) / "config.json", name, labels)
    return _read_shape(_hub_config(name), name, labels)


def _hub_config(name: str) -> Path:
    options = (*_BUILT_IN, *MODELS)
    advice = f"allowed: a built-in shape ({', '.join(options)}), a local folder with a config.json, or a hub name"
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or not name.strip():
        raise ModelError(f"model '{name}' is not a folder ({advice})")
    try:
        # Imported here because only a hub name needs it, and it would slow every start.
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # the hub client raises many kinds (network, missing, gated, offline)
        raise ModelError(
            f"model '{name}' is neither built in nor a folder, and its config.json could not be had from the hub "
            f"({type(error).__name__}){nearest(name, options)} ({advice})"
        ) from error


def _read_shape(path: Path, name: str, labels: int) -> ModelShape:
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"model '{name}' has no config.json in {path.parent}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"model '{name}': {path} cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"model '{name}': {path} must hold a JSON object")
    kind = config.get("model_type")
    if kind not in ("bert", "roberta", "llama"):
        raise ModelError(f"model '{name}' has model_type '{kind}'; allowed are bert, roberta and llama")
    return _shape_of(config, kind, name, labels)


def _shape_of(config: Mapping[str, Any], architecture: Architecture, name: str, labels: int) -> ModelShape:
    def width(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"model '{name}': config.json has {key} = {value!r}; it must be a positive integer")
        return value

    hidden, heads = width("hidden_size"), width("num_attention_heads")
    llama = architecture == "llama"
    kv_heads = width("num_key_value_heads", heads) if llama else heads
    if "head_dim" not in config and hidden % heads:
        raise ModelError(f"model '{name}': hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    if heads % kv_heads:
        raise ModelError(
            f"model '{name}': num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    return ModelShape(
        name=name,
        architecture=architecture,
        layers=width("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width("head_dim", hidden // heads) if llama else hidden // heads,
        ffn=width("intermediate_size"),
        vocab=width("vocab_size"),
        positions=0 if llama else width("max_position_embeddings"),
        labels=labels,
        pooler_width=hidden if architecture == "roberta" else 0,
        tied=llama and bool(config.get("tie_word_embeddings", False)),
    )
