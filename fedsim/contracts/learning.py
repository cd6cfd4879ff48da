"""The learning side, as a strategy sees it: local jobs in columns, their results, and the learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedsim.contracts.common import FloatArray, IntArray, KeptCounts, State
from fedsim.contracts.program import LocalProgram


@dataclass(frozen=True)
class LocalRequest:
    """One client's local job, frozen at dispatch.

    Attributes:
        flight: how many times the client was sent off before: with the client, the key of all its random draws.
        version: merges before the dispatch.
        ratio_asked: cumulative pruning ratio to reach, where the program cuts.
        program: what the device does; it never shrinks a structure where no phase cuts (warm-up).
    """

    client: int
    flight: int
    version: int
    ratio_asked: float
    rank: int
    program: LocalProgram


@dataclass(frozen=True, eq=False)
class LocalRequests:
    """The local jobs of clients sent off together, in columns: `LocalRequest` of all of them.

    Attributes:
        clients, flight, ratio_asked, rank: shape (P,); the other fields are the same for all.
    """

    clients: IntArray
    flight: IntArray
    version: int
    ratio_asked: FloatArray
    rank: IntArray
    program: LocalProgram

    def singles(self) -> list[LocalRequest]:
        """One record per client, for a learner that goes client by client."""
        return [
            LocalRequest(client, flight, self.version, ratio, rank, self.program)
            for client, flight, ratio, rank in zip(
                self.clients.tolist(), self.flight.tolist(), self.ratio_asked.tolist(), self.rank.tolist(), strict=True
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


@dataclass(frozen=True)
class Cohorts:
    """How full the cohorts were in which jobs were trained.

    Attributes:
        count: how often what waited was trained.
        chunks: stacks of clients that really went through training together: jobs of other steps or rates do not.
        jobs: jobs trained in them.
        in_vain: jobs of these that were discarded afterwards: what became of their flight was not known yet.
    """

    count: int = 0
    chunks: int = 0
    jobs: int = 0
    in_vain: int = 0

    def facts(self) -> dict[str, float]:
        """For the manifest."""
        mean = self.jobs / self.chunks if self.chunks else 0.0
        return {
            "count": self.count,
            "chunks": self.chunks,
            "jobs": self.jobs,
            "jobs_per_chunk": mean,
            "trained_in_vain": self.in_vain,
        }


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

    def peek(self, tickets: IntArray) -> LocalResults:
        """As `result`, but the tickets stay good: for what must be known before the results are merged."""

    def discard(self, tickets: IntArray) -> None:
        """Forget jobs whose results nobody will read: they are never trained.

        Raises:
            KeyError: as `result`.
        """

    def aggregate(self, results: LocalResults, mix: float = 1.0, weights: FloatArray | None = None) -> None:
        """Merge updates into a new global state and keep each client's new structure. Empty: no change.

        Updates that all started from the present state replace it by their mean. Else, or where `mix` or a weight is
        not 1, their differences from the states they started from are averaged, and the mean is added.

        Args:
            mix: share of the mean difference that is added.
            weights: share of each update's own difference that counts (staleness), shape (P,); None: all of it.
        """

    def cut(self, clients: IntArray, ratios: FloatArray) -> FloatArray:
        """Prune clients to the given ratios at once, without training; returns the achieved ratios."""

    def evaluate(self, panel: IntArray, consensus_ratio: float) -> Evaluation | None:
        """Test the global model restricted to each panel client's structure; None where nothing can be tested."""

    def export(self, folder: Path) -> None:
        """Write the global adapter as a PEFT folder; nothing where there is none."""

    def cohorts(self) -> Cohorts | None:
        """How full the cohorts were so far, earlier processes of the run included; None where nothing is trained."""

    def state(self) -> State:
        """Arrays for the checkpoint, jobs in flight among them: their tickets stay good after `restore`."""

    def restore(self, state: State) -> None:
        """Take the arrays of a checkpoint."""
