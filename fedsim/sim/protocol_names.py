"""Protocols by the name that ``server.mode`` takes: those of the package, and a user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedsim.registry import Catalogue, checked_function
from fedsim.settings import ServerSettings
from fedsim.sim.asynchronous import asynchronous
from fedsim.sim.protocol import ServerProtocol
from fedsim.sim.semi_async import SemiAsync
from fedsim.sim.sync import Sync

MakeProtocol = Callable[[ServerSettings, int, int], ServerProtocol]
"""Made from the settings, the number of clients and the run's root seed."""


@dataclass(frozen=True)
class ProtocolEntry:
    """A protocol by the name that ``server.mode`` takes."""

    name: str
    make: MakeProtocol


PROTOCOLS: Catalogue[ProtocolEntry] = Catalogue(
    "server.mode",
    (ProtocolEntry("sync", Sync), ProtocolEntry("semi_async", SemiAsync), ProtocolEntry("async", asynchronous)),
)
"""Protocols by the name that ``server.mode`` takes."""


def register_protocol(name: str, make: MakeProtocol) -> None:
    """Make a server protocol of your own usable as ``server.mode``, without editing the package.

    Args:
        make: ``make(settings, clients, seed)``: a `fedsim.sim.protocol.ServerProtocol`.
    Raises:
        ConfigError: the name is taken, or `make` is no function.
    """
    checked_function(f"register_protocol: '{name}'", make)
    PROTOCOLS.add(ProtocolEntry(name, make))
