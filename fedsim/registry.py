"""Things that a configuration names: those of the package, and a user's own, in one catalogue for each key.

An entry is a small frozen record: a name, what makes the thing, and the facts that other parts must know of it. They
read facts, and never compare names, so that a user's own entry is treated as those of the package are.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any, Protocol, TypeVar

from fedsim.errors import ConfigError, unknown


class Entry(Protocol):
    """What has a name."""

    @property
    def name(self) -> str:
        """As the configuration gives it."""


E = TypeVar("E", bound=Entry)


class Catalogue(dict[str, E]):
    """Entries by name; it is read when a run starts.

    Attributes:
        key: the configuration key that takes these names.
        built_in: names of the package's own.
    """

    def __init__(self, key: str, entries: Iterable[E]) -> None:
        super().__init__({entry.name: entry for entry in entries})
        self.key = key
        self.built_in = frozenset(self)

    def named(self, name: str) -> E:
        """The entry called `name`.

        Raises:
            ConfigError: there is none.
        """
        if name not in self:
            raise ConfigError(unknown(self.key, name, self))
        return self[name]

    def check_free(self, name: str) -> None:
        """Refuse a name that a user's own entry cannot have.

        Raises:
            ConfigError: it is no name, or taken.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{self.key}: {name!r} is no name to register under (give a text)")
        if name in self:
            raise ConfigError(f"{self.key} '{name}' exists already; register yours under another name")

    def add(self, entry: E) -> None:
        """Take a user's own entry.

        Raises:
            ConfigError: its name is no name, or taken.
        """
        self.check_free(entry.name)
        self[entry.name] = entry


def checked_function(what: str, function: Any) -> Any:
    """`function`, where it is one, or the place of one, ``"module:name"``.

    Raises:
        ConfigError: it is neither.
    """
    if callable(function) or (isinstance(function, str) and ":" in function):
        return function
    raise ConfigError(f"{what} needs a function (or the place of one, 'module:name'), not {function!r}")


def loaded(function: Any) -> Any:
    """The function itself; one that is given by its place, ``"module:name"``, is imported now."""
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)
