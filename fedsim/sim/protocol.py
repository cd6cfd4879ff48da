"""The server's side of the clock: what a protocol decides, when a run is over, what a resumed run must know.

A protocol is a rule over flights: who is sent off, when updates are merged and how many, who is given up. `sync` is
`fedsim.sim.sync.Sync`; others are files of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedsim.contracts.common import IntArray
from fedsim.contracts.flights import Arrivals, Learned
from fedsim.control.client_history import ClientHistory
from fedsim.control.client_selection import SELECTIONS, SelectionContext, choose_clients
from fedsim.errors import ConfigError
from fedsim.rng import Stream, uniforms
from fedsim.settings import ServerSettings
from fedsim.sim.trace import START_HASH, TraceBlock

OnMerge = Callable[[Arrivals, Learned, TraceBlock, Callable[[], dict[str, np.ndarray]]], None]
"""Called after each merge: what arrived, what was learned, the trace since the last merge, and a function that gives
the flights still under way as arrays, for a checkpoint."""


class ServerView(Protocol):
    """What a protocol sees of the clock. Nothing in it may be changed."""

    @property
    def now_s(self) -> float:
        """The simulated clock."""

    @property
    def version(self) -> int:
        """Merges so far."""

    @property
    def opened_s(self) -> float:
        """The clock at the last merge (0 before the first)."""

    @property
    def flying(self) -> int:
        """Flights at work."""

    @property
    def waiting(self) -> int:
        """Updates that have arrived and wait to be merged."""

    @property
    def stopped(self) -> int:
        """Flights that ended without an update to merge: their job did not fit in memory, or they are too old. The next
        merge tells of them."""

    @property
    def timer_over(self) -> bool:
        """Whether the clock has come to `ServerProtocol.timer_s`."""

    @property
    def idle(self) -> NDArray[np.bool_]:
        """Mask (clients,) of those that may be sent off."""

    @property
    def sent(self) -> int:
        """Clients sent off since the last merge."""

    @property
    def history(self) -> ClientHistory | None:
        """What is known of clients; None where the rule of ``server.selection`` has no use for it."""

    @property
    def first_left_s(self) -> float | None:
        """When the flight at work left that left first; None where nobody is at work."""

    def at_work_for(self, seconds: float | None) -> IntArray:
        """Clients whose flights have been at work for so long, ascending; none for None."""


class ServerProtocol(Protocol):
    """When clients are sent off, and when their updates are merged.

    Attributes:
        held: whether a client waits at the server's side, its time and energy counted, until its update is merged. It
            is sent off again after that in any case.
    """

    held: bool

    def start(self, view: ServerView) -> IntArray:
        """Clients to send off now, ascending; none is often the answer. Asked whenever the server looks."""

    def patience(self, view: ServerView) -> int:
        """After how many more arrivals the server looks again, at least 1."""

    def timer_s(self, view: ServerView) -> float | None:
        """When the server looks again whatever arrives; None: never for the time's sake."""

    def due(self, view: ServerView) -> int | None:
        """How many of the waiting updates are merged now, the earliest first; None: not yet."""

    def abandon(self, view: ServerView) -> IntArray | None:
        """Clients at work that are given up with the merge that is due; None: all of them."""


@dataclass(frozen=True)
class SimState:
    """Where the simulation stands between two merges: all that a resumed run needs beside the flights under way.

    Attributes:
        next_round: merges so far, and so the number of the next.
        now_s: the simulated clock, exactly.
        trace_hash: digest of all trace records so far.
        target_met: whether `server.target_accuracy` was reached, so that no round follows.
    """

    next_round: int = 0
    now_s: float = 0.0
    trace_hash: str = START_HASH
    target_met: bool = False


def state_after(settings: ServerSettings, arrivals: Arrivals, learned: Learned, block: TraceBlock) -> SimState:
    """The state after a merge, from what `OnMerge` is given."""
    target, accuracy = settings.target_accuracy, learned.accuracy
    met = target is not None and accuracy is not None and accuracy >= target
    return SimState(arrivals.merge_index + 1, arrivals.end_s, block.digest, met)


def finished(settings: ServerSettings, state: SimState) -> bool:
    """Whether no merge follows: all played, the time budget passed, or the target accuracy reached."""
    out_of_time = settings.time_budget_s is not None and state.now_s >= settings.time_budget_s
    return state.next_round >= settings.rounds or out_of_time or state.target_met


def sample_clients(
    fleet_clients: int,
    settings: ServerSettings,
    seed: int,
    round_index: int,
    there: NDArray[np.bool_] | None = None,
    history: ClientHistory | None = None,
) -> tuple[IntArray, int]:
    """A round's participants, by the rule of ``server.selection``.

    Args:
        there: mask (clients,) of those that can be drawn; None: all. Where they are fewer than asked, all of them.
    Returns:
        The participants, ascending, shape (P,), over-selection included; and how many updates the round waits for.
    Raises:
        ConfigError: more clients per round than the fleet has, or a rule that does not choose so many.
    """
    everyone = np.arange(fleet_clients, dtype=np.int64)
    if there is not None:
        everyone = everyone[there]
    if settings.clients_per_round == "all" or not len(everyone):
        return everyone, len(everyone)
    quota = settings.clients_per_round
    if quota > fleet_clients:
        raise ConfigError(
            f"server.clients_per_round is {quota}, but the fleet has {fleet_clients} clients "
            f"(allowed: 1 to {fleet_clients}, or 'all')"
        )
    # The small allowance keeps 10 * 1.1 from becoming 12 through rounding.
    dispatched = min(len(everyone), math.ceil(quota * (1.0 + settings.over_selection) - 1e-9))
    context = SelectionContext(seed, round_index, history=history)
    return choose_clients(settings.selection, everyone, dispatched, context), min(quota, dispatched)


def flights_at_once(settings: ServerSettings, clients: int) -> int:
    """Clients that a server that does not wait keeps at work, over-selection included.

    Raises:
        ConfigError: more than the fleet has.
    """
    asked = settings.clients_per_round if settings.concurrency is None else settings.concurrency
    if asked == "all":
        return clients
    if asked > clients:
        key = "clients_per_round" if settings.concurrency is None else "concurrency"
        raise ConfigError(
            f"server.{key}: value {asked} is not allowed (the fleet has {clients} clients: 1 to {clients})"
        )
    return min(clients, math.ceil(asked * (1.0 + settings.over_selection) - 1e-9))


BUFFER = 10
"""Updates that a merge of ``semi_async`` takes where ``server.buffer`` is null: K of FedBuff's experiments."""


def buffer_size(settings: ServerSettings, clients: int) -> int:
    """Updates that make a merge of ``semi_async``.

    Raises:
        ConfigError: more than are ever at work.
    """
    most = flights_at_once(settings, clients)
    if settings.buffer is None:
        return min(BUFFER, most)
    if settings.buffer > most:
        raise ConfigError(
            f"server.buffer: value {settings.buffer} is not allowed (at most the {most} clients at work at a time: "
            "server.concurrency, or server.clients_per_round where that is null)"
        )
    return settings.buffer


def updates_per_merge(settings: ServerSettings, clients: int) -> int:
    """Updates that a merge waits for; under a protocol of the user's own, ``server.clients_per_round``.

    Raises:
        ConfigError: more clients than the fleet has, or a buffer that is never full.
    """
    if settings.mode == "semi_async":
        return buffer_size(settings, clients)
    if settings.mode == "async":
        return min(1, flights_at_once(settings, clients))
    asked = settings.clients_per_round
    return clients if asked == "all" else asked


def idle_clients(view: ServerView, count: int, seed: int, rule: str) -> IntArray:
    """So many idle clients by the rule of ``server.selection``, ascending; fewer where fewer are idle.

    By chance: numbers are drawn until enough idle ones were met, which does not cost more in a larger fleet; where most
    are at work the few others are looked for instead.
    """
    if count <= 0:
        return np.empty(0, dtype=np.int64)
    is_idle = view.idle
    clients = len(is_idle)
    if not SELECTIONS.named(rule).by_chance:
        at_hand = np.flatnonzero(is_idle)
        if len(at_hand) <= count:
            return at_hand
        return choose_clients(rule, at_hand, count, SelectionContext(seed, view.version, view.sent, view.history))
    tries = np.arange(min(_TRIES * count, clients))
    drawn = (uniforms(seed, Stream.IDLE_CHOICE, tries, view.version, view.sent) * clients).astype(np.int64)
    drawn = drawn[is_idle[drawn]]
    first = np.sort(np.unique(drawn, return_index=True)[1])[:count]
    if len(first) == count:
        return np.sort(drawn[first])
    idle = np.flatnonzero(is_idle)
    if len(idle) <= count:
        return idle
    draws = uniforms(seed, Stream.IDLE_CHOICE, idle, view.version, view.sent)
    return np.sort(idle[np.argsort(draws, kind="stable")[:count]])


_TRIES = 8
"""Numbers drawn for each client wanted, before all are looked through."""
