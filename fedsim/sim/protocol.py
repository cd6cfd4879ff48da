"""The synchronous protocol: who takes part in a round, when the run is over, and what a resumed run must know."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedsim.contracts.common import IntArray
from fedsim.contracts.flights import RoundLearning, RoundPlan, RoundReport
from fedsim.errors import ConfigError
from fedsim.rng import Stream, uniforms
from fedsim.settings import ServerSettings
from fedsim.sim.trace import START_HASH, TraceBlock

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
    """The state after a round, from what `OnRound` is given."""
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
    # The highest draw that takes part, without sorting the fleet; equal draws go to the lower client numbers.
    highest = np.partition(draws, dispatched - 1)[dispatched - 1]
    below = np.flatnonzero(draws < highest)
    level = np.flatnonzero(draws == highest)[: dispatched - len(below)]
    return np.sort(np.concatenate([below, level])), quota
