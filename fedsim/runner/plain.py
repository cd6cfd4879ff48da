"""Values of Python as a configuration holds them: NumPy's numbers and paths become plain ones."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fedsim.errors import ConfigError
from fedsim.yaml_text import shown

_DEEPEST = 50


def plain(value: Any, depth: int = 0) -> Any:
    """A deep copy in mappings, lists, strings, numbers, booleans and None; anything else is left for the checks.

    Raises:
        ConfigError: nested too deeply, or a text that is not Unicode (half an emoji).
    """
    if depth > _DEEPEST:
        raise ConfigError(f"the configuration is nested more than {_DEEPEST} deep")
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):  # asked without loading the library
        value = value.tolist()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): plain(one, depth + 1) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one, depth + 1) for one in value]
    if isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value):
        raise ConfigError(f"value {shown(repr(value))} is not allowed (it holds half a character, which is no Unicode)")
    return value
