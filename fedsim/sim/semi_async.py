"""Buffered asynchronous merges (FedBuff, arXiv 2106.06639): ``server.concurrency`` clients are at work at any time, and
the server merges whenever ``server.buffer`` updates have arrived.

A client that arrives is replaced at once, by whoever is idle, with the version of that moment; flights go on through
merges, and may arrive several versions later.

Unspecified in the source; we chose: an update that waits in the buffer keeps its client from being sent off again, as
its next job starts from what the server has merged of it; a merge also comes, with less than a full buffer, when nobody
is at work any more. With ``server.deadline_s`` a flight that is not back within that time is given up with a merge of
what is there, and so a run ends even where nobody ever comes back.
"""

from __future__ import annotations

from fedsim.contracts.common import IntArray
from fedsim.settings import ServerSettings
from fedsim.sim.protocol import ServerView, buffer_size, flights_at_once, idle_clients


class SemiAsync:
    """Implements `fedsim.sim.protocol.ServerProtocol`.

    Args:
        seed: the run's root seed, for who is sent off.
        buffer: updates that make a merge; None: ``server.buffer``.
    """

    held = False

    def __init__(self, settings: ServerSettings, clients: int, seed: int, buffer: int | None = None) -> None:
        self._seed, self._rule, self._deadline_s = seed, settings.selection, settings.deadline_s
        self._concurrency = flights_at_once(settings, clients)
        self._buffer = buffer_size(settings, clients) if buffer is None else buffer

    def start(self, view: ServerView) -> IntArray:
        """Somebody idle for each client that has come back."""
        return idle_clients(view, self._concurrency - view.flying, self._seed, self._rule)

    def patience(self, view: ServerView) -> int:
        """Every arrival is looked at: its client is replaced."""
        return 1

    def timer_s(self, view: ServerView) -> float | None:
        """When the flight that left first is over its time."""
        left_s = view.first_left_s
        return None if self._deadline_s is None or left_s is None else left_s + self._deadline_s

    def due(self, view: ServerView) -> int | None:
        """A full buffer; less when a flight is over its time or nobody is at work."""
        if view.waiting >= self._buffer:
            return self._buffer
        ended = view.waiting + view.stopped
        return view.waiting if view.timer_over or (ended and not view.flying) else None

    def abandon(self, view: ServerView) -> IntArray:
        """Those who are over their time."""
        return view.at_work_for(self._deadline_s)
