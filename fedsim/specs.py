"""Records and Protocols by which the layers meet. Nothing here computes.

`sim` (when) and `learn` (what is learned) do not know each other. A `Strategy` stands between them: the server process
asks it for a `RoundPlan`, plays the plan on the simulated clock, and hands back a `RoundReport`.

Arrays over the participants of one round have shape ``(P,)`` in the order of ``RoundPlan.clients``, which ascends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
KeptCounts = tuple[IntArray, IntArray]
State = Mapping[str, np.ndarray]
"""What a part writes into a checkpoint: named arrays, no objects."""


class Outcome(IntEnum):
    """How a dispatched client's round ended: a code in arrays, a `label` in the records. Only add."""

    OK = 0
    LATE = 1
    DROPPED = 2
    OUT_OF_MEMORY = 3
    NON_FINITE = 4

    @property
    def label(self) -> str:
        """Its name in the records."""
        return self.name.lower()


OUTCOME_LABELS = tuple(outcome.label for outcome in Outcome)
"""Labels by code."""


@dataclass(frozen=True, eq=False)
class Labels:
    """Texts of which there are few kinds, in columns: codes of shape (P,) into `names`."""

    codes: IntArray
    names: NDArray[np.str_]

    @property
    def texts(self) -> NDArray[np.str_]:
        """The texts themselves, shape (P,)."""
        texts: NDArray[np.str_] = self.names[self.codes]
        return texts


@dataclass(frozen=True, eq=False)
class Work:
    """What one local job asks of any device: no seconds, no device. Scalars or arrays of one common shape.

    Attributes:
        flops: floating-point operations of all local steps (1 multiply-accumulate = 2).
        memory_bytes: bytes moved to and from device memory by all local steps.
        launches: kernel launches of all local steps.
        peak_memory_bytes: highest memory use at any moment of the job.
        download_bytes, upload_bytes: traffic before and after.
    """

    flops: FloatArray
    memory_bytes: FloatArray
    launches: FloatArray
    peak_memory_bytes: FloatArray
    download_bytes: FloatArray
    upload_bytes: FloatArray


class Ask(Protocol):
    """What each arm asks, from shapes alone: known to every policy, and says nothing of any device."""

    @property
    def ranks(self) -> IntArray:
        """The LoRA ranks on offer, ascending."""

    def work(self, ratio_before: ArrayLike, ratio: ArrayLike, rank: ArrayLike) -> Work:
        """Work of a job that starts at pruning ratio `ratio_before` and ends at `ratio`; arguments broadcast."""

    def work_of_counts(
        self,
        heads_start: ArrayLike,
        channels_start: ArrayLike,
        heads_end: ArrayLike,
        channels_end: ArrayLike,
        rank: ArrayLike,
    ) -> Work:
        """Work of jobs whose layers keep unequal counts, shape (P, layers) each: ``global`` selection."""


class ExpectedTime(Protocol):
    """The true time of a round without its jitter: for the `oracle` policy only."""

    def __call__(self, round_index: int, clients: IntArray, work: Work) -> FloatArray:
        """Seconds from dispatch to the end of upload. `work` may have more trailing axes than `clients`."""


@dataclass(frozen=True, eq=False)
class RoundContext:
    """What a policy knows when it chooses.

    Attributes:
        round_index: 0-based.
        clients: participants, shape (P,).
        ratio_before: each one's cumulative pruning ratio, as last asked.
        ratio_low, ratio_high: feasible cumulative ratios of this round (irreversibility, step limit, floor, cap).
        schedule_ratio: where the fleet mean should be after this round.
        ratio_max: the highest ratio any device may ever reach (the cap of the arm space).
        step_max: the largest rise of a device's ratio in one participation.
    """

    round_index: int
    clients: IntArray
    ratio_before: FloatArray
    ratio_low: FloatArray
    ratio_high: FloatArray
    schedule_ratio: float
    ratio_max: float
    step_max: float


@dataclass(frozen=True, eq=False)
class Arms:
    """A policy's choice: cumulative pruning ratio to reach and LoRA rank, shape (P,)."""

    ratio: FloatArray
    rank: IntArray


@dataclass(frozen=True, eq=False)
class Feedback:
    """What a policy learns when the whole round has reported, shape (P,).

    Attributes:
        work: what each job asked (no device).
        time_s: measured from dispatch to the end of upload, with the round's own jitter; NaN where not `arrived`.
        arrived: whether the client's update reached the server in time.
        reward: in [0, 1]; NaN where not `arrived`.
    """

    round_index: int
    clients: IntArray
    ratio_before: FloatArray
    ratio: FloatArray
    rank: IntArray
    work: Work
    time_s: FloatArray
    arrived: NDArray[np.bool_]
    reward: FloatArray


@runtime_checkable
class Policy(Protocol):
    """Chooses arms for the participants of a round; its state is arrays over all clients."""

    def select(self, context: RoundContext) -> Arms:
        """Choose; every ratio within the feasible bounds, every rank on offer."""

    def update(self, feedback: Feedback) -> None:
        """Learn from the whole round."""

    def state(self) -> State:
        """Arrays for the checkpoint."""

    def restore(self, state: State) -> None:
        """Take the arrays of a checkpoint."""


@dataclass(frozen=True, eq=False)
class RoundPlan:
    """What the server dispatches in one round, shape (P,)."""

    round_index: int
    clients: IntArray
    ratio_before: FloatArray
    ratio_target: FloatArray
    rank: IntArray
    work: Work


@dataclass(frozen=True, eq=False)
class RoundReport:
    """What happened on the simulated clock, shape (P,) but for the first three.

    Each phase has its own timestamps (seconds of simulated time, cut at `end_s`):
    ``start_s <= download_start_s <= download_end_s <= compute_end_s <= upload_end_s <= end_s``.
    Bytes and energy are those really spent, also by work that the close of the round cut short. `outcome` holds codes
    of `Outcome`.
    """

    round_index: int
    start_s: float
    end_s: float
    clients: IntArray
    device: Labels
    mode: Labels
    download_start_s: FloatArray
    download_end_s: FloatArray
    compute_end_s: FloatArray
    upload_end_s: FloatArray
    bytes_down: FloatArray
    bytes_up: FloatArray
    energy_joules: FloatArray
    outcome: IntArray


@dataclass(frozen=True, eq=False)
class RoundLearning:
    """What the round taught. Per-client arrays of shape (P,), NaN where there is nothing to say.

    Attributes:
        ratio: achieved cumulative pruning ratio.
        outcome: codes of `Outcome`: the report's, with ``NON_FINITE`` where training failed.
        accuracy, loss, accuracy_consensus: of the new global model; None in rounds without evaluation.
    """

    ratio: FloatArray
    loss_before: FloatArray
    loss_after: FloatArray
    reward: FloatArray
    outcome: IntArray
    accuracy: float | None
    loss: float | None
    accuracy_consensus: float | None


class Strategy(Protocol):
    """What a method puts behind the server process."""

    def open_round(self, round_index: int, clients: IntArray) -> RoundPlan:
        """Choose arms, freeze and submit the local jobs. `clients` ascends."""

    def close_round(self, report: RoundReport) -> RoundLearning:
        """Train what arrived, aggregate, teach the policy, evaluate."""


@dataclass(frozen=True)
class LocalRequest:
    """One client's local job, frozen at dispatch.

    Attributes:
        ratio_target: cumulative pruning ratio to reach after ``local_steps - recovery_steps`` steps.
        prune: whether the structure may change in this round at all (False during warm-up).
        estimate: whether importance is estimated in this round, where the run's method estimates any.
    """

    client: int
    round_index: int
    ratio_target: float
    prune: bool
    rank: int
    local_steps: int
    recovery_steps: int
    learning_rate: float
    estimate: bool = True


@dataclass(frozen=True, eq=False)
class LocalRequests:
    """The local jobs of one round's participants, in columns: `LocalRequest` of all of them.

    Attributes:
        clients, ratio_target, rank: shape (P,); the other fields are the same for all.
    """

    round_index: int
    clients: IntArray
    ratio_target: FloatArray
    rank: IntArray
    prune: bool
    local_steps: int
    recovery_steps: int
    learning_rate: float
    estimate: bool = True

    def singles(self) -> list[LocalRequest]:
        """One record per client, for a learner that goes client by client."""
        return [
            LocalRequest(
                client=client,
                round_index=self.round_index,
                ratio_target=ratio,
                prune=self.prune,
                rank=rank,
                local_steps=self.local_steps,
                recovery_steps=self.recovery_steps,
                learning_rate=self.learning_rate,
                estimate=self.estimate,
            )
            for client, ratio, rank in zip(
                self.clients.tolist(), self.ratio_target.tolist(), self.rank.tolist(), strict=True
            )
        ]


@dataclass(frozen=True, eq=False)
class LocalResults:
    """What local jobs brought, as far as the server's control may see it. Shape (P,), in the order of the tickets.

    Attributes:
        ratio: achieved cumulative pruning ratio.
        loss_before, loss_after: on the client's fixed probe batch, before and after the job.
        lora_importance: mean of |B * grad B| over the client's LoRA.
        outcome: codes of `Outcome`: ``OK`` or ``NON_FINITE``.
        kept_before, kept_after: kept head groups and channels per layer (two integer arrays of shape (P, layers)) at
            the job's start and end: what it really cost where layers lose unequal shares (``global`` selection).
        payload: the learner's own record of each update, opaque here; None where it has none.
        rank: LoRA rank of each update, where a client may give up components (rank self-pruning); one that did asks
            for no more from then on. None where ranks stay as asked.
    """

    clients: IntArray
    ratio: FloatArray
    loss_before: FloatArray
    loss_after: FloatArray
    lora_importance: FloatArray
    outcome: IntArray
    kept_before: KeptCounts
    kept_after: KeptCounts
    payload: Sequence[object] | None
    rank: IntArray | None = None

    def take(self, mask: NDArray[np.bool_]) -> LocalResults:
        """The results where `mask`, shape (P,), is true; itself where that is everywhere."""
        if mask.all():
            return self
        payload = self.payload
        return LocalResults(
            clients=self.clients[mask],
            ratio=self.ratio[mask],
            loss_before=self.loss_before[mask],
            loss_after=self.loss_after[mask],
            lora_importance=self.lora_importance[mask],
            outcome=self.outcome[mask],
            kept_before=(self.kept_before[0][mask], self.kept_before[1][mask]),
            kept_after=(self.kept_after[0][mask], self.kept_after[1][mask]),
            payload=None if payload is None else [payload[place] for place in np.flatnonzero(mask).tolist()],
            rank=None if self.rank is None else self.rank[mask],
        )


@dataclass(frozen=True)
class Evaluation:
    """Test metrics of the global model: panel mean accuracy and loss, and the consensus model's accuracy."""

    accuracy: float
    loss: float
    accuracy_consensus: float


class Learner(Protocol):
    """The learning side, as a strategy sees it. State (global adapter, each client's structure) stays inside.

    Jobs go in columns: a ticket is a positive integer, and tickets of any submissions may be read together, each once.
    """

    def submit(self, requests: LocalRequests) -> IntArray:
        """Freeze jobs against the present state; nothing is trained yet. Returns their tickets, shape (P,)."""

    def result(self, tickets: IntArray) -> LocalResults:
        """The jobs' results, in the order of `tickets`; everything pending may be trained now, as one cohort.

        Raises:
            KeyError: a ticket that was discarded, read already or never given.
        """

    def discard(self, tickets: IntArray) -> None:
        """Forget jobs whose results nobody will read: they are never trained.

        Raises:
            KeyError: as `result`.
        """

    def aggregate(self, results: LocalResults) -> None:
        """Merge updates into a new global state and keep each client's new structure. Empty: no change."""

    def cut(self, clients: IntArray, ratios: FloatArray) -> FloatArray:
        """Prune clients to the given ratios at once, without training; returns the achieved ratios."""

    def evaluate(self, panel: IntArray, consensus_ratio: float) -> Evaluation | None:
        """Test the global model restricted to each panel client's structure; None where nothing can be tested."""

    def export(self, folder: Path) -> None:
        """Write the global adapter as a PEFT folder; nothing where there is none."""

    def state(self) -> State:
        """Arrays for the checkpoint."""

    def restore(self, state: State) -> None:
        """Take the arrays of a checkpoint."""
