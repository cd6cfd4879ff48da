"""The methods by name. A new one is a file with a ``METHOD`` and a line here, or a call of `register_method`."""

from __future__ import annotations

from fedsim.errors import ConfigError, unknown
from fedsim.methods import (
    fedapt,
    fedlora,
    fedmp,
    fedspine,
    fedspine_balanced,
    fedspine_uniform,
    flexlora,
    flora,
    hetlora,
    prune_then_tune,
    tune_then_prune,
)
from fedsim.methods.base import Method

METHODS: dict[str, Method] = {
    "fedspine": fedspine.METHOD,
    "fedspine_uniform": fedspine_uniform.METHOD,
    "fedspine_balanced": fedspine_balanced.METHOD,
    "fedlora": fedlora.METHOD,
    "hetlora": hetlora.METHOD,
    "flexlora": flexlora.METHOD,
    "flora": flora.METHOD,
    "prune_then_tune": prune_then_tune.METHOD,
    "tune_then_prune": tune_then_prune.METHOD,
    "fedapt": fedapt.METHOD,
    "fedmp": fedmp.METHOD,
}


def method_named(name: str) -> Method:
    """The method called `name`.

    Raises:
        ConfigError: there is none.
    """
    if name not in METHODS:
        raise ConfigError(unknown("method", name, METHODS))
    return METHODS[name]


def register_method(name: str, method: Method) -> None:
    """Make a user's own method usable by name, without editing the package.

    Raises:
        ConfigError: the name is taken, or `method` is no `Method` of that name.
    """
    if name in METHODS:
        raise ConfigError(f"method '{name}' exists already; register yours under another name")
    if not isinstance(method, Method) or method.name != name:
        raise ConfigError(f"register_method: '{name}' needs a fedsim.Method whose name is '{name}', not {method!r}")
    METHODS[name] = method
