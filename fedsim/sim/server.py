"""The server: sends flights off, looks when its protocol wants to, merges, and goes on until the run is over.

It works with one protocol (when), one strategy (what is learned) and one player (the clock). An update whose upload
ends at the very moment of a merge has arrived. Server computation takes no simulated time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedsim.contracts.common import IntArray, Outcome
from fedsim.contracts.flights import Strategy
from fedsim.control.client_history import ClientHistory
from fedsim.control.client_selection import SELECTIONS
from fedsim.errors import RunError
from fedsim.fleet.dynamics import check_arrays
from fedsim.fleet.fleet import Fleet
from fedsim.settings import ServerSettings
from fedsim.sim.arrays import ArrayPlayer
from fedsim.sim.event_log import log_merge, log_mode_changes, log_modes, log_moves, log_open
from fedsim.sim.processes import ProcessPlayer
from fedsim.sim.protocol import OnMerge, ServerProtocol, SimState, finished, sample_clients, state_after
from fedsim.sim.protocol_names import PROTOCOLS
from fedsim.sim.trace import Trace
from fedsim.sim.trips import Player, arrivals_of, trips_of

__all__ = [
    "OnMerge",
    "Server",
    "SimState",
    "finished",
    "make_player",
    "make_protocol",
    "sample_clients",
    "simulate",
    "state_after",
]

_MOST_IN_VAIN = 100_000
"""Flights that may be sent off without a merge, beside a hundred for each client of the fleet. [ours]"""


_HISTORY = "history."
"""Prefix of the arrays of what is known of clients, beside those of the flights under way."""


def make_protocol(settings: ServerSettings, clients: int, seed: int) -> ServerProtocol:
    """The protocol that ``server.mode`` names."""
    return PROTOCOLS.named(settings.mode).make(settings, clients, seed)


def make_player(name: str, fleet: Fleet, now_s: float) -> Player:
    """The player called ``processes`` or ``arrays``.

    Raises:
        ConfigError: arrays for clients that meet, drop or change.
    """
    if name != "arrays":
        return ProcessPlayer(fleet.clients, now_s, fleet=fleet)
    if fleet.dynamics is not None:
        check_arrays(fleet.dynamics)
    return ArrayPlayer(fleet.clients, now_s)


class Server:
    """Implements `fedsim.sim.protocol.ServerView` over a player.

    Args:
        on_merge: called after each merge; `state_after` gives the state to store.
        start: where to go on.
        history: what is known of clients, where the rule that chooses them goes by it.
    """

    def __init__(
        self,
        fleet: Fleet,
        strategy: Strategy,
        protocol: ServerProtocol,
        player: Player,
        settings: ServerSettings,
        on_merge: OnMerge,
        start: SimState,
        history: ClientHistory | None = None,
    ) -> None:
        self._fleet, self._strategy, self._protocol, self._player = fleet, strategy, protocol, player
        self._settings, self._on_merge, self._state = settings, on_merge, start
        self._trace = Trace(start.trace_hash)
        self._presence = None if fleet.dynamics is None else fleet.dynamics.presence
        self._timer_s: float | None = None
        self._sent = 0  # flights sent off since the last merge
        self._history = history

    # -- what the protocol sees ---------------------------------------------------------------------------------------

    @property
    def now_s(self) -> float:
        """The simulated clock."""
        return self._player.now_s

    @property
    def version(self) -> int:
        """Merges so far."""
        return self._state.next_round

    @property
    def opened_s(self) -> float:
        """The clock at the last merge."""
        return self._state.now_s

    @property
    def flying(self) -> int:
        """Flights at work."""
        return self._player.flying

    @property
    def waiting(self) -> int:
        """Updates that wait to be merged."""
        return self._player.waiting

    @property
    def stopped(self) -> int:
        """Flights that ended without an update since the last merge."""
        return self._player.stopped

    @property
    def timer_over(self) -> bool:
        """Whether the protocol's timer is over."""
        timer_s = self._timer_s
        return self._player.timer_over and timer_s is not None and self.now_s >= timer_s

    @property
    def idle(self) -> NDArray[np.bool_]:
        """Clients that may be sent off."""
        idle = self._player.idle
        return idle if self._presence is None else idle & self._presence.on(self.now_s)

    @property
    def sent(self) -> int:
        """Clients sent off since the last merge."""
        return self._sent

    @property
    def history(self) -> ClientHistory | None:
        """What is known of clients."""
        return self._history

    @property
    def first_left_s(self) -> float | None:
        """When the flight at work left that left first."""
        return self._player.first_left_s

    def at_work_for(self, seconds: float | None) -> IntArray:
        """Clients at work for so long; none for None."""
        return np.empty(0, dtype=np.int64) if seconds is None else self._player.at_work_for(seconds)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> SimState:
        """Play until `finished`; the state after the last merge."""
        protocol, player = self._protocol, self._player
        while not finished(self._settings, self._state):
            log_modes(self._trace, self._fleet, self.version, self.now_s)
            self._set_aside()
            # What is due is merged before anybody is sent off: who flies now takes all that has arrived along.
            while (merged := protocol.due(self)) is None:
                self._send_off()
                if not player.advance(protocol.patience(self), self._look_s()):
                    raise RunError(
                        f"nothing can happen any more at {self.now_s:g} simulated s: no client is at work, and the "
                        f"server's protocol sends nobody off (merge {self.version} of {self._settings.rounds})"
                    )
                self._set_aside()
            self._merge(merged)
        return self._state

    def _look_s(self) -> float | None:
        """When the server looks at the latest: the protocol's time, or when a client comes back that it may want.

        Raises:
            RunError: nobody is at work or there, and nobody comes back.
        """
        self._timer_s = timer_s = self._protocol.timer_s(self)
        presence = self._presence
        if presence is None:
            return timer_s
        next_s, alone = presence.next_arrival_s(self.now_s), not (self.flying or self.waiting or self.stopped)
        if alone and math.isinf(next_s) and not presence.on(self.now_s).any():
            raise RunError(
                f"no client is there any more at {self.now_s:g} simulated s, and none comes back (merge {self.version} "
                f"of {self._settings.rounds}): see availability, join_s and leave_s in the fleet file"
            )
        if timer_s is not None and alone and timer_s <= self.now_s:
            timer_s = None  # it is over, and there is nobody whom it could end
        wants = getattr(self._protocol, "wants_more", None)
        looks = alone or (not self._protocol.held if wants is None else wants(self))
        if not looks or math.isinf(next_s):
            return timer_s
        return next_s if timer_s is None else min(next_s, timer_s)

    def _set_aside(self) -> None:
        """Take updates that are too old out of those that wait to be merged."""
        most = self._settings.max_staleness
        if most is not None and self._player.waiting:
            self._player.set_aside(self.version - most)

    def _send_off(self) -> None:
        clients = self._protocol.start(self)
        if not len(clients):
            return
        flights = self._strategy.dispatch(clients, self.version, self.now_s)
        if not np.array_equal(flights.clients, clients) or (flights.version != self.version).any():
            raise ValueError(f"the strategy's flights are not those of version {self.version} and its clients")
        self._sent += len(clients)
        if self._sent > _MOST_IN_VAIN + 100 * self._fleet.clients:
            raise RunError(
                f"{self._sent} flights were sent off since merge {self.version} (simulated {self.opened_s:g} to "
                f"{self.now_s:g} s), and too few came back for the next: the clients drop out or go off before they "
                f"can finish (the last sent off: client {clients[-1]})"
            )
        log_open(self._trace, self.now_s, self.version, len(clients))
        self._player.launch(trips_of(self._fleet, flights, self.version))

    def _merge(self, merged: int) -> None:
        index, now_s = self.version, self.now_s
        landed = self._player.land(merged, self._protocol.abandon(self))
        if self._fleet.dynamics is not None and self._fleet.dynamics.mode_period_s is not None:
            log_mode_changes(self._trace, self._fleet, index, self.opened_s, now_s)
        log_moves(self._trace, index, now_s, landed.moves)
        log_merge(self._trace, now_s, index, merged)
        self._sent = 0
        arrivals = arrivals_of(
            self._fleet,
            landed,
            index,
            self.opened_s,
            now_s,
            held=self._protocol.held,
            max_staleness=self._settings.max_staleness,
        )
        block = self._trace.take_block()
        learned = self._strategy.merge(arrivals)
        self._state = state_after(self._settings, arrivals, learned, block)
        if self._history is not None:
            good = learned.outcome == Outcome.OK
            time_s = arrivals.upload_end_s - arrivals.flights.dispatch_s
            self._history.merged(arrivals.clients[good], learned.loss_before[good], time_s[good], index)
        self._on_merge(arrivals, learned, block, self._under_way)

    def _under_way(self) -> dict[str, np.ndarray]:
        known = {} if self._history is None else self._history.state()
        return {**self._player.state(), **{f"{_HISTORY}{name}": column for name, column in known.items()}}


def simulate(
    fleet: Fleet,
    strategy: Strategy,
    settings: ServerSettings,
    seed: int,
    on_merge: OnMerge,
    start: SimState | None = None,
    *,
    player: str = "processes",
    under_way: Mapping[str, np.ndarray] | None = None,
    protocol: ServerProtocol | None = None,
) -> SimState:
    """Play a run until `finished`.

    Args:
        seed: the run's root seed (client sampling here; the fleet carries its own copy for jitter).
        on_merge: called after each merge; `state_after` gives the state to store.
        start: where to go on; the beginning when None.
        player: ``processes`` (SimPy), or ``arrays`` where flights do not meet, with the same results.
        under_way: flights under way at `start`, from the checkpoint.
        protocol: a protocol in the place of the one that ``server.mode`` names.
    Returns:
        The state after the last merge.
    Raises:
        ConfigError: more clients per round than the fleet has.
        ProfileError: a compute or transfer time that is not positive and finite.
        RunError: nothing can happen any more.
        Exception: whatever the strategy or `on_merge` raise, unchanged.
    """
    state = SimState() if start is None else start
    rule = make_protocol(settings, fleet.clients, seed) if protocol is None else protocol
    clock = make_player(player, fleet, state.now_s)
    kept = dict(under_way or {})
    known = {name.removeprefix(_HISTORY): kept.pop(name) for name in list(kept) if name.startswith(_HISTORY)}
    clock.restore(kept)
    history = ClientHistory(fleet.clients) if SELECTIONS.named(settings.selection).needs_history else None
    if history is not None and known:
        history.restore(known)
    return Server(fleet, strategy, rule, clock, settings, on_merge, state, history).run()
