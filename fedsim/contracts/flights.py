"""The joint between time and learning. Nothing here computes.

`sim` (when) and `learn` (what is learned) do not know each other. Between them stands a `Strategy`, and what passes is
*flights*: one client sent off once with one version of the global state. A round, a buffer or an asynchronous merge is
a rule over flights (`fedsim.sim.protocol.ServerProtocol`).

Arrays over flights have shape ``(F,)``. A client has at most one flight under way, and may have another that waits to
be merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedsim.contracts.common import FloatArray, IntArray, Labels
from fedsim.contracts.control import Rewards, Work

Places = IntArray | NDArray[np.bool_]
"""Which of some flights: their places, or a mask."""


@dataclass(frozen=True, eq=False)
class Flights:
    """Clients sent off, in columns of shape (F,).

    Attributes:
        flight: how many times the client had been sent off before: the key of all random draws of this flight.
        version: merges before the dispatch: the version of the global state that the client downloads.
        dispatch_s: the simulated clock at dispatch.
        ratio_before, ratio_asked: cumulative pruning ratio as last asked, and to be reached now.
        rank: LoRA rank of the job.
        steps: local steps of the job.
        work: what each job asks of a device, fields of shape (F,).
        ticket: the strategy's own number of the job, opaque to the clock.
    """

    flight: IntArray
    clients: IntArray
    version: IntArray
    dispatch_s: FloatArray
    ratio_before: FloatArray
    ratio_asked: FloatArray
    rank: IntArray
    steps: IntArray
    work: Work
    ticket: IntArray

    def __len__(self) -> int:
        return len(self.clients)

    def take(self, places: Places) -> Flights:
        """Some of them, in the order of `places`."""
        columns = {one.name: getattr(self, one.name)[places] for one in fields(self) if one.name != "work"}
        work = Work(**{one.name: getattr(self.work, one.name)[places] for one in fields(self.work)})
        return Flights(**columns, work=work)

    @staticmethod
    def joined(parts: Sequence[Flights]) -> Flights:
        """Several, one behind the other; at least one."""
        if len(parts) == 1:
            return parts[0]
        names = [one.name for one in fields(Flights) if one.name != "work"]
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        works = {one.name: np.concatenate([getattr(part.work, one.name) for part in parts]) for one in fields(Work)}
        return Flights(**columns, work=Work(**works))


@dataclass(frozen=True, eq=False)
class Arrivals:
    """The flights that a merge ends, and what happened to each on the simulated clock, shape (F,) but for the first
    three. Ordered by client, then flight.

    Each phase has its own timestamps (seconds of simulated time; what was given up is cut at that moment):
    ``dispatch_s <= download_start_s <= download_end_s <= compute_end_s <= upload_end_s <= released_s <= end_s``.
    Bytes and energy are those really spent, also by work that was cut short.

    Attributes:
        merge_index: number of this merge, from 0; it makes version ``merge_index + 1``.
        start_s, end_s: the clock at the merge before (0 for the first), and now.
        released_s: when the client was free again: a synchronous server holds it until the merge.
        outcome: codes of `fedsim.contracts.common.Outcome`.
    """

    merge_index: int
    start_s: float
    end_s: float
    flights: Flights
    device: Labels
    mode: Labels
    download_start_s: FloatArray
    download_end_s: FloatArray
    compute_end_s: FloatArray
    upload_end_s: FloatArray
    released_s: FloatArray
    bytes_down: FloatArray
    bytes_up: FloatArray
    energy_joules: FloatArray
    outcome: IntArray

    def __len__(self) -> int:
        return len(self.flights)

    @property
    def clients(self) -> IntArray:
        """Whose flights these are, shape (F,)."""
        return self.flights.clients

    @property
    def staleness(self) -> IntArray:
        """Merges between a flight's dispatch and this merge, shape (F,)."""
        return self.merge_index - self.flights.version


@dataclass(frozen=True, eq=False)
class Learned:
    """What a merge taught. Per-flight arrays of shape (F,), NaN where there is nothing to say.

    Attributes:
        ratio: achieved cumulative pruning ratio.
        lora_importance: mean of |B * grad B| over each client's LoRA.
        rewards: the bandit's reward and its terms.
        outcome: codes of `Outcome`: the arrivals', with ``NON_FINITE`` where training failed.
        accuracy, loss, accuracy_consensus: of the new global model; None in merges without evaluation.
    """

    ratio: FloatArray
    loss_before: FloatArray
    loss_after: FloatArray
    lora_importance: FloatArray
    rewards: Rewards
    outcome: IntArray
    accuracy: float | None
    loss: float | None
    accuracy_consensus: float | None


class Strategy(Protocol):
    """What a method puts behind the server."""

    def dispatch(self, clients: IntArray, version: int, now_s: float) -> Flights:
        """Choose arms, freeze and submit the local jobs. `clients` ascends."""

    def merge(self, arrivals: Arrivals) -> Learned:
        """Train what arrived, aggregate, teach the policy, evaluate."""
