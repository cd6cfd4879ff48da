"""Asynchronous merges (FedAsync, arXiv 1903.03934): every update is merged as it arrives, and its client is replaced.

``server.concurrency`` clients are at work at any time. Updates that arrive at the very same moment are merged one after
the other, by client number, each into the version that the one before it made; then those that replace them leave, with
the newest version.

Not as in the source: it mixes the arrived model itself into the global one, ``(1 - a) x + a x_new``. Here an update is
what its client changed since the version that it was sent, and ``mix`` of that is added, weighted by its staleness: as
in FedBuff, and two clients that left together both count. Where nothing was merged in between the two are the same.
"""

from __future__ import annotations

from fedsim.contracts.common import IntArray
from fedsim.settings import ServerSettings
from fedsim.sim.protocol import ServerView, flights_at_once, idle_clients


class Asynchronous:
    """Implements `fedsim.sim.protocol.ServerProtocol`.

    Args:
        seed: the run's root seed, for who is sent off.
    """

    held = False

    def __init__(self, settings: ServerSettings, clients: int, seed: int) -> None:
        self._seed, self._rule, self._deadline_s = seed, settings.selection, settings.deadline_s
        self._concurrency = flights_at_once(settings, clients)

    def start(self, view: ServerView) -> IntArray:
        """Somebody idle for each client that has come back."""
        return idle_clients(view, self._concurrency - view.flying, self._seed, self._rule)

    def patience(self, view: ServerView) -> int:
        """Every arrival."""
        return 1

    def timer_s(self, view: ServerView) -> float | None:
        """When the flight that left first is over its time."""
        left_s = view.first_left_s
        return None if self._deadline_s is None or left_s is None else left_s + self._deadline_s

    def due(self, view: ServerView) -> int | None:
        """One update; none when a flight is over its time or nobody is at work, so that lost flights are settled."""
        if view.waiting:
            return 1
        return 0 if view.timer_over or (view.stopped and not view.flying) else None

    def abandon(self, view: ServerView) -> IntArray:
        """Those who are over their time."""
        return view.at_work_for(self._deadline_s)
