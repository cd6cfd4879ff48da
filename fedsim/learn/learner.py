"""The learning side of a run: the global adapter, and what stands around it.

Implements `fedsim.contracts.learning.Learner`. Jobs wait in a queue (`fedsim.learn.job_queue`); what a client keeps and
may get back is the plan's (`fedsim.learn.structures_plan`); how updates are merged is a rule's (`fedsim.learn.merge`).
Whatever grows with clients is held only for clients that have taken part, and the adapter of an older version only as
long as a job or an update that started from it.

Unspecified in the paper; we chose: the fleet's averaged importance is the mean over clients seen so far of each one's
latest average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray, State
from fedsim.contracts.learning import Cohorts, Evaluation, LocalRequest, LocalRequests, LocalResults
from fedsim.contracts.program import Objective
from fedsim.contracts.server_optimizer import ServerOptimizer
from fedsim.learn.adapter_arrays import adapter_from, adapter_state
from fedsim.learn.engine import Engine
from fedsim.learn.export.peft_folder import write_peft_folder
from fedsim.learn.faults import device_faults
from fedsim.learn.job_queue import JobQueue
from fedsim.learn.local_results import contributions_of, results_of, usable_updates
from fedsim.learn.merge.differences import Step
from fedsim.learn.merge.rules import merge
from fedsim.learn.model.adapter import Adapter, folded
from fedsim.learn.model.backbone import Backbone
from fedsim.learn.objective_memory import ObjectiveMemory
from fedsim.learn.structures_plan import StructuresPlan
from fedsim.learn.train.importance import Criterion
from fedsim.learn.train.jobs import Job, Update
from fedsim.learn.train.objective import resized
from fedsim.settings import Config
from fedsim.structure import Structure


def no_objective(version: int) -> Objective | None:
    """Jobs minimise their losses alone."""
    return None


@dataclass(frozen=True, eq=False)
class LearnerParts:
    """What a learner is made of.

    Attributes:
        server: what is made of the mean difference of a merge; None: updates are merged as the rule says.
        texts_cut: training and test samples that are longer than ``train.max_length``.
        objective_at: what jobs minimise that were sent off with a version, for those that a checkpoint brings back.
        clients: of the whole fleet.
    """

    config: Config
    backbone: Backbone
    engine: Engine
    criterion: Criterion
    server: ServerOptimizer | None = None
    texts_cut: tuple[int, int] = (0, 0)
    objective_at: Callable[[int], Objective | None] = no_objective
    clients: int = 1


class LoraLearner:
    """Federated LoRA with structured pruning, behind the joint of submit and result."""

    def __init__(self, parts: LearnerParts, adapter: Adapter) -> None:
        self._parts = parts
        self._adapter = adapter
        self._plan = StructuresPlan(parts.config, parts.backbone, parts.criterion)
        self._memory = ObjectiveMemory(adapter, parts.clients)
        self._queue = JobQueue(self._train)

    @property
    def weights_sha256(self) -> str:
        """Hash of the backbone's weights."""
        return self._parts.backbone.weights_sha256

    @property
    def texts_cut(self) -> tuple[int, int]:
        """Training and test samples that were cut at ``train.max_length``."""
        return self._parts.texts_cut

    @property
    def facts(self) -> dict[str, object]:
        """What the manifest says of the training side: engine, precision, clients at a time, device."""
        engine = self._parts.engine
        return {
            "engine": engine.name,
            "precision": engine.precision,
            "chunk_clients": 1 if engine.plan is None else engine.plan.limit,
            "torch_device": str(self._parts.backbone.device),
        }

    # -- local jobs -------------------------------------------------------------------------------------------------

    def submit(self, requests: LocalRequests) -> IntArray:
        """Freeze the jobs against the present adapter, structures and scores."""
        return self._queue.add([self._freeze(request) for request in requests.singles()])

    def peek(self, tickets: IntArray) -> LocalResults:
        """As `result`, and the tickets stay good."""
        return results_of(self._queue.read(tickets), self._parts.backbone.shape)

    def result(self, tickets: IntArray) -> LocalResults:
        """Train everything pending as one cohort, and return the results of `tickets`."""
        return results_of(self._queue.take(tickets), self._parts.backbone.shape)

    def discard(self, tickets: IntArray) -> None:
        """Forget jobs; those that have not been trained yet never are."""
        self._queue.discard(tickets)

    def _freeze(self, request: LocalRequest) -> Job:
        plan, client = self._plan, request.client
        start, mask = plan.structure(client), None
        if request.program.cuts:
            start, mask = plan.dispatched(client, request.ratio_asked)
        carried = self._memory.carried(request, start.ratio(self._parts.backbone.shape) == 0.0)
        return Job(request, self._adapter, start, plan.scores(client), plan.guide(client), mask, carried)

    def _train(self, jobs: Sequence[Job]) -> list[Update]:
        config, backbone, plan = self._parts.config, self._parts.backbone, self._parts.engine.plan
        before = 0 if plan is None else plan.chunks
        with device_faults(backbone.device):
            updates = self._parts.engine.trainer.train(jobs)
        was = self._queue.cohorts
        chunks = len(jobs) if plan is None else plan.chunks - before
        self._queue.cohorts = replace(was, count=was.count + 1, chunks=was.chunks + chunks, jobs=was.jobs + len(jobs))
        return [resized(job, update, config.seed, backbone.shape) for job, update in zip(jobs, updates, strict=True)]

    # -- the server's side ------------------------------------------------------------------------------------------

    def aggregate(self, results: LocalResults, mix: float = 1.0, weights: FloatArray | None = None) -> None:
        """Merge the updates (`fedsim.learn.merge.rules.merge`); keep each client's new structure and scores."""
        updates = usable_updates(results)
        if not updates:
            return
        self._plan.merged(
            (client, update.structure, update.scores)
            for client, update in zip(results.clients.tolist(), updates, strict=True)
        )
        self._memory.merge(results.clients.tolist(), updates)
        config = self._parts.config
        self._adapter = merge(
            self._adapter,
            contributions_of(updates, weights),
            self._parts.backbone.shape,
            self._adapter.rank,  # the largest on offer, or the one rank where all use it
            config.model.lora_alpha_over_rank,
            config.aggregate,
            self._step(float(mix)),
        )

    def _step(self, mix: float) -> Step:
        server = self._parts.server
        return mix if server is None else lambda name, difference: mix * server(name, difference)

    def cut(self, clients: IntArray, ratios: FloatArray) -> FloatArray:
        """Prune clients at once, without training; one that may grow back does so where its ratio falls."""
        return self._plan.cut(clients, ratios)

    # -- the global model -------------------------------------------------------------------------------------------

    def evaluate(self, panel: IntArray, consensus_ratio: float) -> Evaluation:
        """Panel mean of accuracy and loss, and the consensus model's accuracy."""
        structures = [self._plan.structure(int(client)) for client in panel]
        with device_faults(self._parts.backbone.device):
            results = self._parts.engine.tester.measure(self._adapter, [*structures, self.consensus(consensus_ratio)])
        panel_results = np.array(results[:-1])
        accuracy, loss = panel_results.mean(axis=0)
        return Evaluation(float(accuracy), float(loss), results[-1][0])

    def export(self, folder: Path) -> None:
        """Write the global adapter as a PEFT folder, with what was merged into the base folded in."""
        model = self._parts.config.model
        adapter = folded(self._adapter, model.lora_alpha_over_rank)
        write_peft_folder(folder, self._parts.backbone, adapter, model)

    def cohorts(self) -> Cohorts:
        """How full the cohorts were so far."""
        return self._queue.cohorts

    @property
    def adapter(self) -> Adapter:
        """The global adapter, at full widths."""
        return self._adapter

    def structure(self, client: int) -> Structure:
        """The groups that a client keeps; all of them if it never took part."""
        return self._plan.structure(client)

    def consensus(self, ratio: float) -> Structure:
        """One structure for all: cut to `ratio` by the averaged importance."""
        return self._plan.consensus(ratio)

    # -- checkpoint -------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """Adapter, structures, scores, the size of chunks, jobs in flight and the server's own, as arrays."""
        arrays: dict[str, np.ndarray] = {}
        plan = self._parts.engine.plan
        if plan is not None:
            # It may have shrunk: a resumed run must add up in the same order.
            arrays["chunk_clients"] = np.array([plan.limit])
        arrays.update(adapter_state(self._adapter))
        arrays.update(self._plan.state())
        arrays.update(self._memory.state())
        arrays.update(self._queue.state(self._adapter, self._parts.backbone.shape))
        if self._parts.server is not None:
            arrays.update({f"server.{name}": array for name, array in self._parts.server.state().items()})
        return arrays

    def restore(self, state: State) -> None:
        """Take what `state` gave."""
        self._adapter = adapter_from(state, self._adapter)
        if self._parts.engine.plan is not None and "chunk_clients" in state:
            self._parts.engine.plan.limit = int(state["chunk_clients"][0])
        self._plan.restore(state)
        self._memory.restore(state)
        parts = self._parts
        self._queue.restore(state, self._adapter, parts.backbone.shape, self._plan.guide, parts.objective_at)
        if self._parts.server is not None:
            own = {name: array for name, array in state.items() if name.startswith("server.")}
            self._parts.server.restore({name.removeprefix("server."): array for name, array in own.items()})
