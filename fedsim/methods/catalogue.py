"""The methods by name. A new one is a file with a ``METHOD`` and a line here, or a call of `register_method`."""

from __future__ import annotations

from fedsim.errors import ConfigError
from fedsim.methods import (
    fedadam,
    fedapt,
    fedlora,
    fedmp,
    fedprox,
    fedspine,
    fedspine_balanced,
    fedspine_uniform,
    fedspine_warm,
    flexlora,
    flora,
    hetlora,
    prune_then_tune,
    scaffold,
    tune_then_prune,
)
from fedsim.methods.base import Method
from fedsim.places import check_name
from fedsim.registry import Catalogue

METHODS: Catalogue[Method] = Catalogue(
    "method",
    (
        fedspine.METHOD,
        fedspine_uniform.METHOD,
        fedspine_balanced.METHOD,
        fedlora.METHOD,
        hetlora.METHOD,
        flexlora.METHOD,
        flora.METHOD,
        prune_then_tune.METHOD,
        tune_then_prune.METHOD,
        fedapt.METHOD,
        fedmp.METHOD,
        fedprox.METHOD,
        fedadam.METHOD,
        scaffold.METHOD,
        fedspine_warm.METHOD,
    ),
)


def method_named(name: str) -> Method:
    """The method called `name`.

    Raises:
        ConfigError: there is none.
    """
    return METHODS.named(name)


def preferred_baselines() -> list[str]:
    """Methods that others are compared with where the user names none, the first choice first."""
    places = {name: method.baseline for name, method in METHODS.items() if method.baseline is not None}
    return sorted(places, key=lambda name: places[name])


def register_method(name: str, method: Method) -> None:
    """Make a method of your own usable by name, without editing the package.

    Raises:
        ConfigError: the name is taken, or `method` is no `Method` of that name.
    """
    METHODS.check_free(name)
    if not isinstance(method, Method) or method.name != name:
        raise ConfigError(f"register_method: '{name}' needs a fedsim.Method whose name is '{name}', not {method!r}")
    check_name("method", name)
    METHODS.add(method)
