"""A local folder with a model: what is wrong with its files before any library reads them, and what they are.

Weights have a hash of their own; here are the small files that decide what is made of them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedsim.errors import ModelError
from fedsim.places import user_path
from fedsim.resources import MODELS, asset_folder

_POINTER = b"version https://git-lfs.github.com/spec/"
_DECIDING = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_ADAPTER = "adapter_config.json"


def model_folder(name: str) -> Path | None:
    """The folder that ``model.name`` means, or None for a hub name or a built-in shape."""
    folder = asset_folder(name) if name in MODELS else user_path(name)
    return folder if folder.is_dir() else None


def check_model_folder(name: str, folder: Path) -> None:
    """Refuse a folder whose files are not what they seem.

    Raises:
        ModelError: a file that git-lfs has not fetched, or an adapter in the place of, or beside, the weights.
    """
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    for file in sorted([*weights, *(folder / one for one in _DECIDING)]):
        if is_lfs_pointer(file):
            raise ModelError(
                f"model.name '{name}': {file.name} is a git-lfs pointer, not the file itself: run git lfs pull in the "
                "folder, or download the model again"
            )
    if (folder / _ADAPTER).is_file():
        base = [file for file in weights if not file.name.startswith("adapter_model")]
        what = "beside the weights, and would be loaded with them" if base else "and no weights of a model"
        raise ModelError(
            f"model.name '{name}': the folder holds an adapter ({_ADAPTER}) {what}: give a folder with the model alone "
            "(move adapter_config.json and adapter_model.* away)"
        )


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is the short text that stands for a large one in a git repository."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def deciding_files(name: str) -> dict[str, str]:
    """SHA-256 of each small file of a local model that decides what is made of its weights, by its name."""
    folder = model_folder(name)
    if folder is None:
        return {}
    found = (folder / one for one in _DECIDING)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in found if file.is_file()}
