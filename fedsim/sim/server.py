"""The server process: opens rounds, plays them on the simulated clock, closes them (synchronous protocol).

A round closes when the updates it waits for have arrived, at its deadline, or when nobody is left at work. An update
whose upload ends at the very moment of the close has arrived. Server computation takes no simulated time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from fedsim.cost.device import Rates
from fedsim.errors import ConfigError, ProfileError
from fedsim.rng import Stream, uniforms
from fedsim.settings import ServerSettings
from fedsim.sim.client import PHASES, Itinerary, RoundBoard, client_process
from fedsim.sim.fleet import Fleet
from fedsim.sim.link import bytes_moved
from fedsim.sim.trace import SERVER, START_HASH, Event, Trace, TraceBlock
from fedsim.specs import FloatArray, IntArray, Outcome, RoundLearning, RoundPlan, RoundReport, Strategy

OnRound = Callable[[RoundPlan, RoundReport, RoundLearning, TraceBlock], None]


@dataclass(frozen=True)
class SimState:
    """Where the simulation stands between two rounds: all that a resumed run needs.

    Attributes:
        next_round: the round to open next.
        now_s: the simulated clock, exactly.
        trace_hash: digest of all trace records so far.
        target_met: whether `server.target_accuracy` was reached, so that no round follows.
    """

    next_round: int = 0
    now_s: float = 0.0
    trace_hash: str = START_HASH
    target_met: bool = False


def state_after(settings: ServerSettings, report: RoundReport, learning: RoundLearning, block: TraceBlock) -> SimState:
    """The state after a round, from what `on_round` is given."""
    target, accuracy = settings.target_accuracy, learning.accuracy
    met = target is not None and accuracy is not None and accuracy >= target
    return SimState(report.round_index + 1, report.end_s, block.digest, met)


def finished(settings: ServerSettings, state: SimState) -> bool:
    """Whether no round follows: all rounds played, the time budget passed, or the target accuracy reached."""
    out_of_time = settings.time_budget_s is not None and state.now_s >= settings.time_budget_s
    return state.next_round >= settings.rounds or out_of_time or state.target_met


def sample_clients(fleet_clients: int, settings: ServerSettings, seed: int, round_index: int) -> tuple[IntArray, int]:
    """Draw a round's participants uniformly without replacement: those with the smallest keyed random numbers.

    Returns:
        The participants, ascending, shape (P,), over-selection included; and how many updates the round waits for.
    Raises:
        ConfigError: more clients per round than the fleet has.
    """
    everyone = np.arange(fleet_clients, dtype=np.int64)
    if settings.clients_per_round == "all":
        return everyone, fleet_clients
    quota = settings.clients_per_round
    if quota > fleet_clients:
        raise ConfigError(
            f"server.clients_per_round is {quota}, but the fleet has {fleet_clients} clients "
            f"(allowed: 1 to {fleet_clients}, or 'all')"
        )
    # The small allowance keeps 10 * 1.1 from becoming 12 through rounding.
    dispatched = min(fleet_clients, math.ceil(quota * (1.0 + settings.over_selection) - 1e-9))
    draws = uniforms(seed, Stream.CLIENT_SAMPLING, everyone, round_index)
    return np.sort(np.argsort(draws, kind="stable")[:dispatched]), quota


def simulate(
    fleet: Fleet,
    strategy: Strategy,
    settings: ServerSettings,
    seed: int,
    on_round: OnRound,
    start: SimState | None = None,
) -> SimState:
    """Run rounds until `finished`.

    Energy of a participant in a round = busy power * compute seconds + (idle + radio power) * transfer seconds
    + idle power * the rest of the round [ours]. Energy, bytes and times of work that the close of the round cut short
    are counted up to the close.

    Args:
        seed: the run's root seed (client sampling here; the fleet carries its own copy for jitter).
        on_round: called after each closed round; `state_after` gives the state to store.
        start: where to go on; the beginning when None.
    Returns:
        The state after the last round.
    Raises:
        ConfigError: more clients per round than the fleet has.
        ProfileError: a compute or transfer time that is not positive and finite.
        Exception: whatever the strategy or `on_round` raise, unchanged.
    """
    state = SimState() if start is None else start
    env = simpy.Environment(initial_time=state.now_s)
    run = _Run(env, fleet, strategy, settings, seed, on_round, Trace(state.trace_hash))
    outcome: list[SimState | BaseException] = []

    def server_process() -> Generator[simpy.Event, Any, None]:
        # SimPy would rebuild an exception from its arguments, which not every exception survives: carry it out whole.
        try:
            outcome.append((yield from run.rounds(state)))
        except BaseException as error:
            outcome.append(error)

    env.run(until=env.process(server_process()))
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


@dataclass(frozen=True, eq=False)
class _Run:
    env: simpy.Environment
    fleet: Fleet
    strategy: Strategy
    settings: ServerSettings
    seed: int
    on_round: OnRound
    trace: Trace

    def rounds(self, state: SimState) -> Generator[simpy.Event, Any, SimState]:
        """The server process."""
        while not finished(self.settings, state):
            round_index = state.next_round
            clients, quota = sample_clients(self.fleet.clients, self.settings, self.seed, round_index)
            plan = self.strategy.open_round(round_index, clients)
            if plan.round_index != round_index or not np.array_equal(plan.clients, clients):
                raise ValueError(f"the strategy's plan is not for round {round_index} and its participants")
            report = yield from self._play(plan, quota)
            block = self.trace.take_block()
            learning = self.strategy.close_round(report)
            state = state_after(self.settings, report, learning, block)
            self.on_round(plan, report, learning, block)
        return state

    def _play(self, plan: RoundPlan, quota: int) -> Generator[simpy.Event, Any, RoundReport]:
        env, round_index, start_s = self.env, plan.round_index, float(self.env.now)
        trips = _itineraries(self.fleet, plan)
        board = RoundBoard(env, len(trips), quota)
        self.trace.add(start_s, round_index, SERVER, Event.ROUND_OPEN, len(trips))
        self._record_modes(round_index, start_s)
        processes = [
            env.process(client_process(env, slot, round_index, trip, board, self.trace))
            for slot, trip in enumerate(trips)
        ]
        if self.settings.deadline_s is None:
            yield board.enough
        else:
            yield board.enough | env.timeout(self.settings.deadline_s)
        # Let what else ends at this very moment end first, so that ties do not depend on the order of processes.
        yield env.timeout(0)
        end_s = float(env.now)
        for process, at_work in zip(processes, board.at_work, strict=True):
            if at_work:
                process.interrupt()
        board.closed.succeed()
        yield env.timeout(0)
        if any(released != end_s for released in board.released_s):
            raise RuntimeError(f"a client of round {round_index} was not released when the round closed")
        self.trace.add(end_s, round_index, SERVER, Event.ROUND_CLOSE, board.arrived)
        return _report(self.fleet, plan, trips, board, start_s, end_s)

    def _record_modes(self, round_index: int, now_s: float) -> None:
        """Record each client's power mode at the start, and again when a re-draw changes it."""
        changed = self.fleet.mode_changes(round_index)
        for client, mode in zip(changed.tolist(), self.fleet.modes(round_index, changed).tolist(), strict=True):
            self.trace.add(now_s, round_index, client, Event.MODE, mode)


def _itineraries(fleet: Fleet, plan: RoundPlan) -> list[Itinerary]:
    """All durations of a round at once."""
    clients, round_index, work = plan.clients, plan.round_index, plan.work
    shape = clients.shape
    memory = np.broadcast_to(np.asarray(work.peak_memory_bytes, dtype=np.float64), shape)
    columns = (
        clients,
        _checked("download", fleet.download_seconds(round_index, clients, work.download_bytes), fleet, plan),
        _checked("compute", fleet.compute_seconds(round_index, clients, work), fleet, plan),
        _checked("upload", fleet.upload_seconds(round_index, clients, work.upload_bytes), fleet, plan),
        np.broadcast_to(np.asarray(work.download_bytes, dtype=np.float64), shape),
        np.broadcast_to(np.asarray(work.upload_bytes, dtype=np.float64), shape),
        memory,
        memory <= fleet.rates(round_index, clients).usable_memory_bytes,
    )
    return [Itinerary(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _checked(phase: str, seconds: FloatArray, fleet: Fleet, plan: RoundPlan) -> FloatArray:
    """Refuse a time that would let a run go on with a wrong clock: a job must take time, a transfer may take none."""
    bad = ~np.isfinite(seconds) | (seconds < 0) | ((phase == "compute") & (seconds == 0))
    if bad.any():
        slot = int(np.argmax(bad))
        client = int(plan.clients[slot])
        allowed = "above 0" if phase == "compute" else "at least 0"
        raise ProfileError(
            f"the {phase} time of client {client} ({fleet.device_of[client]}) in round {plan.round_index} is "
            f"{seconds[slot]} s (allowed: finite and {allowed})"
        )
    return seconds


def _report(
    fleet: Fleet, plan: RoundPlan, trips: list[Itinerary], board: RoundBoard, start_s: float, end_s: float
) -> RoundReport:
    clients, round_index = plan.clients, plan.round_index
    stamps = (board.download_start_s, board.download_end_s, board.compute_end_s, board.upload_end_s)
    download_start_s, download_end_s, compute_end_s, upload_end_s = (np.array(column) for column in stamps)
    phases_done = np.array(board.phases_done)
    fits_memory = np.array([trip.fits_memory for trip in trips])
    late = (phases_done < PHASES) & (fits_memory | (phases_done == 0))
    outcome = np.where(late, Outcome.LATE, np.where(fits_memory, Outcome.OK, Outcome.OUT_OF_MEMORY)).astype(np.int64)

    download_s, compute_s = download_end_s - download_start_s, compute_end_s - download_end_s
    upload_s = upload_end_s - compute_end_s
    latency_s = fleet.latency(clients)
    download_bytes, upload_bytes = (
        np.array([getattr(trip, name) for trip in trips]) for name in ("download_bytes", "upload_bytes")
    )
    planned_down_s, planned_up_s = (
        np.array([getattr(trip, name) for trip in trips]) for name in ("download_s", "upload_s")
    )
    cut_down = bytes_moved(download_bytes, download_s, planned_down_s, latency_s)
    cut_up = bytes_moved(upload_bytes, upload_s, planned_up_s, latency_s)
    rates = fleet.rates(round_index, clients)
    return RoundReport(
        round_index=round_index,
        start_s=start_s,
        end_s=end_s,
        clients=clients,
        device=fleet.device_of[clients],
        mode=fleet.mode_names(round_index, clients),
        download_start_s=download_start_s,
        download_end_s=download_end_s,
        compute_end_s=compute_end_s,
        upload_end_s=upload_end_s,
        bytes_down=np.where(phases_done >= 1, download_bytes, cut_down),
        bytes_up=np.where(phases_done == PHASES, upload_bytes, np.where(phases_done == 2, cut_up, 0.0)),
        energy_joules=_energy(rates, compute_s, download_s + upload_s, end_s - start_s),
        outcome=outcome,
    )


def _energy(rates: Rates, compute_s: FloatArray, transfer_s: FloatArray, duration_s: float) -> FloatArray:
    idle: FloatArray = rates.idle_power_watts * (duration_s - compute_s)
    return rates.busy_power_watts * compute_s + rates.radio_power_watts * transfer_s + idle
