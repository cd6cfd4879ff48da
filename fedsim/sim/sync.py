"""The synchronous protocol: a round is one dispatch and one merge.

It closes with the last arrival that it waits for, at its deadline, or when nobody is left at work; what is then still
under way is given up. Clients are held until the close.
"""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import IntArray
from fedsim.settings import ServerSettings
from fedsim.sim.protocol import ServerView, sample_clients

_NOBODY = np.empty(0, dtype=np.int64)


def _is_open(view: ServerView) -> bool:
    """Whether a round is under way."""
    return view.flying + view.waiting + view.stopped > 0


class Sync:
    """Implements `fedsim.sim.protocol.ServerProtocol`.

    Args:
        seed: the run's root seed, for who takes part.
    """

    held = True

    def __init__(self, settings: ServerSettings, clients: int, seed: int) -> None:
        self._settings, self._clients, self._seed = settings, clients, seed
        self._sent_s = 0.0
        self._quota = clients if settings.clients_per_round == "all" else settings.clients_per_round

    def start(self, view: ServerView) -> IntArray:
        """A round's participants, when no round is under way."""
        if _is_open(view):
            return _NOBODY
        self._sent_s = view.now_s
        idle = view.idle
        there = None if idle.all() else idle
        return sample_clients(self._clients, self._settings, self._seed, view.version, there, view.history)[0]

    def patience(self, view: ServerView) -> int:
        """All that the round still waits for."""
        return max(1, self._quota - view.waiting)

    def timer_s(self, view: ServerView) -> float | None:
        """The deadline."""
        return None if self._settings.deadline_s is None else self._sent_s + self._settings.deadline_s

    def due(self, view: ServerView) -> int | None:
        """All that have arrived, once enough have, the deadline is over or nobody is at work."""
        closed = view.waiting >= self._quota or not view.flying or view.timer_over
        return view.waiting if _is_open(view) and closed else None

    def abandon(self, view: ServerView) -> IntArray | None:
        """Everybody who is still at work."""
        return None
