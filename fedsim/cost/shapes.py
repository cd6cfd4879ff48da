"""Model shapes by name: built in, from a local folder's ``config.json``, or from a hub name's. No weights are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedsim.cost.foreign_shapes import FOREIGN_SHAPES
from fedsim.errors import ModelError, nearest
from fedsim.families.config_json import family_in, read_shape, require_tokens
from fedsim.families.family_catalogue import family_of, family_shapes
from fedsim.files import parse_json
from fedsim.places import user_path
from fedsim.resources import MODELS, asset_folder
from fedsim.structure import ModelShape


def built_in_shapes() -> tuple[str, ...]:
    """Names of the shapes that need no file."""
    return tuple(family_shapes())


def load_shape(name: str, labels: int = 2) -> ModelShape:
    """The widths of a model. A built-in language model has output weights of its own, or not (tied), as published.

    Args:
        name: a built-in shape; ``tiny`` or ``tiny-decoder`` (they travel with the package); a local folder with a
            ``config.json`` of a known family; or else a hub name.
        labels: outputs of the classifier; 0: none, the model predicts tokens (decoders only).
    Raises:
        ModelError: no such model, a configuration of no known family, or an encoder asked for tokens.
    """
    if labels < 0:
        raise ModelError(f"labels is {labels}; it must be at least 0 (0: a language model)")
    built_in = {**FOREIGN_SHAPES, **family_shapes()}.get(name)
    if built_in is not None:
        require_tokens(family_of(built_in), labels, f"model '{name}'")
        return replace(built_in, labels=labels)
    if name in MODELS:
        return _read_shape(asset_folder(name) / "config.json", name, labels)
    if user_path(name).is_dir():
        return _read_shape(user_path(name) / "config.json", name, labels)
    return _read_shape(_hub_config(name), name, labels)


def _hub_config(name: str) -> Path:
    options = (*family_shapes(), *MODELS)
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
    subject = f"model '{name}'"
    return read_shape(family_in(config, subject), config, name, subject, labels)
