"""The server: opens rounds, has them played on the simulated clock, closes them (synchronous protocol).

A round closes when the updates it waits for have arrived, at its deadline, or when nobody is left at work. An update
whose upload ends at the very moment of the close has arrived. Server computation takes no simulated time.
"""

from __future__ import annotations

import numpy as np

from fedsim.contracts.flights import Strategy
from fedsim.fleet.fleet import Fleet
from fedsim.settings import ServerSettings
from fedsim.sim.client import ClientProcesses
from fedsim.sim.protocol import OnRound, SimState, finished, sample_clients, state_after
from fedsim.sim.rounds import ArrayRounds
from fedsim.sim.timeline import PHASES, Player, report_of, trips_of
from fedsim.sim.trace import SERVER, Event, Trace

__all__ = ["OnRound", "SimState", "finished", "sample_clients", "simulate", "state_after"]


def simulate(
    fleet: Fleet,
    strategy: Strategy,
    settings: ServerSettings,
    seed: int,
    on_round: OnRound,
    start: SimState | None = None,
    *,
    client_processes: bool = False,
) -> SimState:
    """Run rounds until `finished`.

    Args:
        seed: the run's root seed (client sampling here; the fleet carries its own copy for jitter).
        on_round: called after each closed round; `state_after` gives the state to store.
        start: where to go on; the beginning when None.
        client_processes: play rounds with a SimPy process per client instead of arrays: slow, with the same results.
    Returns:
        The state after the last round.
    Raises:
        ConfigError: more clients per round than the fleet has.
        ProfileError: a compute or transfer time that is not positive and finite.
        Exception: whatever the strategy or `on_round` raise, unchanged.
    """
    state = SimState() if start is None else start
    trace = Trace(state.trace_hash)
    player: Player = ClientProcesses(state.now_s) if client_processes else ArrayRounds()
    while not finished(settings, state):
        round_index, start_s = state.next_round, state.now_s
        clients, quota = sample_clients(fleet.clients, settings, seed, round_index)
        plan = strategy.open_round(round_index, clients)
        if plan.round_index != round_index or not np.array_equal(plan.clients, clients):
            raise ValueError(f"the strategy's plan is not for round {round_index} and its participants")
        trips = trips_of(fleet, plan)
        _record(trace, start_s, round_index, Event.ROUND_OPEN, len(clients))
        _record_modes(fleet, round_index, start_s, trace)
        timeline = player.play(trips, start_s, quota, settings.deadline_s, trace)
        arrived = int(np.count_nonzero(timeline.phases_done == PHASES))
        _record(trace, timeline.end_s, round_index, Event.ROUND_CLOSE, arrived)
        report = report_of(fleet, trips, timeline)
        block = trace.take_block()
        learning = strategy.close_round(report)
        state = state_after(settings, report, learning, block)
        on_round(plan, report, learning, block)
    return state


def _record(trace: Trace, now_s: float, round_index: int, event: Event, value: int) -> None:
    """The server's own records, as columns of one."""
    trace.add_many(np.array([now_s]), round_index, np.array([SERVER]), event, np.array([float(value)]))


def _record_modes(fleet: Fleet, round_index: int, now_s: float, trace: Trace) -> None:
    """Record each client's power mode at the start, and again when a re-draw changes it."""
    changed = fleet.mode_changes(round_index)
    modes = fleet.modes(round_index, changed).astype(np.float64)
    trace.add_many(np.full(len(changed), now_s), round_index, changed, Event.MODE, modes)
