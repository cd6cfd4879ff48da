"""Where the files that travel with the package are: from a wheel, or from a source checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource_folder(name: str) -> Path:
    """Folder of packaged data called `name` (``device_profiles``, ``experiments``).

    A wheel carries these folders inside the package; a source checkout keeps them beside it.
    """
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


MODELS = ("tiny", "tiny-decoder")
"""Models that travel with the package, by the name of their folder: an encoder and a language model."""


def asset_folder(name: str) -> Path:
    """Folder ``fedsim/assets/<name>``."""
    return _PACKAGE / "assets" / name
