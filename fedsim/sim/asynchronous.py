"""Asynchronous merges (FedAsync, arXiv 1903.03934): every update is merged as it arrives, and its client is replaced.

``server.concurrency`` clients are at work at any time. Updates that arrive at the very same moment are merged one after
the other, by client number, each into the version that the one before it made; then those that replace them leave, with
the newest version.

Not as in the source: it mixes the arrived model itself into the global one, ``(1 - a) x + a x_new``. Here an update is
what its client changed since the version that it was sent, and ``mix`` of that is added, weighted by its staleness: as
in FedBuff, and two clients that left together both count. Where nothing was merged in between the two are the same.
"""

from __future__ import annotations

from fedsim.settings import ServerSettings
from fedsim.sim.semi_async import SemiAsync


def asynchronous(settings: ServerSettings, clients: int, seed: int) -> SemiAsync:
    """The protocol: a buffer of one update."""
    return SemiAsync(settings, clients, seed, buffer=1)
