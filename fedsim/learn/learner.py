"""The learning side of a run: the global adapter, every client's structure and scores, and the trainer behind them.

Implements `fedsim.contracts.learning.Learner`. Whatever grows with clients is held only for clients that have taken
part.

Unspecified in the paper; we chose: the fleet's averaged importance is the mean over clients seen so far of each one's
latest average; a device that may grow back takes its best-scored missing groups at dispatch, when it receives the LoRA
rows that go with them; with one common structure a device's mask follows from its ratio alone (the best groups by the
fleet's averaged importance), nested over ratios, and over rounds where groups cannot come back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from fedsim.contracts.common import FloatArray, IntArray, KeptCounts, Outcome, State
from fedsim.contracts.learning import Evaluation, LocalRequest, LocalRequests, LocalResults
from fedsim.learn.engine import Engine
from fedsim.learn.export.peft_folder import write_peft_folder
from fedsim.learn.faults import device_faults
from fedsim.learn.merge.rules import Contribution, merge
from fedsim.learn.model.adapter import Adapter, folded
from fedsim.learn.model.backbone import Backbone
from fedsim.learn.store import ClientStore
from fedsim.learn.train.importance import Criterion, GroupScores
from fedsim.learn.train.jobs import Job, Update
from fedsim.learn.train.selection import grow, select
from fedsim.learn.train.self_pruning import self_pruned
from fedsim.settings import Config
from fedsim.structure import Structure

EVALUATION_BATCH = 64
_STATIC_BYTES = 1 << 26
"""Room for a static criterion's scores of single clients."""


@dataclass(frozen=True, eq=False)
class LearnerParts:
    """What a learner is made of."""

    config: Config
    backbone: Backbone
    engine: Engine
    criterion: Criterion


class LoraLearner:
    """Federated LoRA with structured pruning, behind the joint of submit and result."""

    def __init__(self, parts: LearnerParts, adapter: Adapter) -> None:
        self._parts = parts
        self._adapter = adapter
        self._store = ClientStore(parts.backbone.shape)
        self._static = _static_scores(parts)
        self._common = Structure.full(parts.backbone.shape)  # what every device keeps so far (common structure)
        self._masks: dict[float, Structure] = {}  # common masks by ratio, till the next aggregation
        self._pending: dict[int, Job] = {}  # by ticket, in the order of dispatch
        self._trained: dict[int, tuple[Job, Update]] = {}
        self._next_ticket = 0

    @property
    def weights_sha256(self) -> str:
        """Hash of the backbone's weights."""
        return self._parts.backbone.weights_sha256

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

    # -- submit and result ------------------------------------------------------------------------------------------

    def submit(self, requests: LocalRequests) -> IntArray:
        """Freeze the jobs against the present adapter, structures and scores."""
        first = self._next_ticket + 1
        for request in requests.singles():
            self._next_ticket += 1
            self._pending[self._next_ticket] = self._freeze(request)
        return np.arange(first, self._next_ticket + 1, dtype=np.int64)

    def result(self, tickets: IntArray) -> LocalResults:
        """Train everything pending as one cohort, and return the results of `tickets`."""
        wanted = tickets.tolist()
        if any(ticket not in self._trained for ticket in wanted):
            waiting, jobs = list(self._pending), list(self._pending.values())
            self._pending.clear()
            with device_faults(self._parts.backbone.device):
                updates = self._parts.engine.trainer.train(jobs)
            config, shape = self._parts.config, self._parts.backbone.shape
            updates = [
                self_pruned(job, update, config.train.rank_decay, config.seed, shape)
                for job, update in zip(jobs, updates, strict=True)
            ]
            self._trained.update(zip(waiting, zip(jobs, updates, strict=True), strict=True))
        return self._as_results([self._trained.pop(ticket) for ticket in wanted])

    def discard(self, tickets: IntArray) -> None:
        """Forget jobs; those that have not been trained yet never are."""
        for ticket in tickets.tolist():
            if self._pending.pop(ticket, None) is None:
                del self._trained[ticket]

    def _freeze(self, request: LocalRequest) -> Job:
        client = request.client
        start, mask = self._store.structure(client), None
        if request.prune and self._is_common:
            mask = self._common_mask(request.ratio_target)
            if self._parts.config.prune.reversible:
                start = start.joined(mask)
        elif request.prune:
            start = self._dispatched(client, start, request.ratio_target)
        return Job(request, self._adapter, start, self._store.scores(client), self._guide(client), mask)

    def _as_results(self, done: Sequence[tuple[Job, Update]]) -> LocalResults:
        shape = self._parts.backbone.shape
        updates = [update for _, update in done]
        starts, ends = [job.start for job, _ in done], [update.structure for update in updates]

        def kept(structures: Sequence[Structure]) -> KeptCounts:
            counts = np.array([(one.heads_kept, one.channels_kept) for one in structures], dtype=np.int64)
            heads, channels = counts.reshape(len(structures), 2, shape.layers).swapaxes(0, 1)
            return heads, channels

        return LocalResults(
            clients=np.array([job.request.client for job, _ in done], dtype=np.int64),
            ratio=np.array([structure.ratio(shape) for structure in ends]),
            loss_before=np.array([update.loss_before for update in updates]),
            loss_after=np.array([update.loss_after for update in updates]),
            lora_importance=np.array([update.lora_importance for update in updates]),
            outcome=np.array([update.outcome for update in updates], dtype=np.int64),
            kept_before=kept(starts),
            kept_after=kept(ends),
            payload=updates,
            rank=np.array([update.adapter.rank for update in updates], dtype=np.int64),
        )

    # -- the server's side ------------------------------------------------------------------------------------------

    def aggregate(self, results: LocalResults) -> None:
        """Merge the updates; keep each client's new structure and scores."""
        contributions = []
        payload = results.payload or [None] * len(results.clients)
        for client, outcome, update in zip(results.clients.tolist(), results.outcome.tolist(), payload, strict=True):
            if not isinstance(update, Update) or outcome != Outcome.OK:
                raise ValueError(f"client {client} has no usable update to aggregate")
            self._store.put_structure(client, update.structure)
            self._common = self._common.within(update.structure)
            if update.scores is not None:
                self._store.put_scores(client, update.scores)
            contributions.append(Contribution(update.adapter, update.structure, update.samples, update.lora_importance))
        if contributions:
            self._masks.clear()
            model = self._parts.config.model
            self._adapter = merge(
                self._adapter,
                contributions,
                self._parts.backbone.shape,
                self._rank_max,
                model.lora_alpha_over_rank,
                self._parts.config.aggregate,
            )

    def cut(self, clients: IntArray, ratios: FloatArray) -> FloatArray:
        """Prune clients at once, without training; one that may grow back does so where its ratio falls."""
        cut_one = self._cut_common if self._is_common else self._cut_own
        # By ratio: clients that never took part are all alike, unless a static criterion tells them apart.
        newcomers: dict[float, Structure] = {}
        achieved = np.empty(len(clients))
        for place, (client, ratio) in enumerate(zip(clients.tolist(), ratios.tolist(), strict=True)):
            alike = self._static is None and client not in self._store
            structure = newcomers.get(ratio) if alike else None
            if structure is None:
                structure = cut_one(client, ratio)
            if alike:
                newcomers[ratio] = structure
            self._store.put_structure(client, structure)
            achieved[place] = structure.ratio(self._parts.backbone.shape)
        return achieved

    def _cut_common(self, client: int, ratio: float) -> Structure:
        mask = self._common_mask(ratio)
        return mask if self._parts.config.prune.reversible else mask.within(self._store.structure(client))

    def _cut_own(self, client: int, ratio: float) -> Structure:
        structure = self._grown(client, self._store.structure(client), ratio)
        shape, selection = self._parts.backbone.shape, self._parts.config.prune.selection
        return select(self._ranking(client), structure, shape, ratio, selection)

    def evaluate(self, panel: IntArray, consensus_ratio: float) -> Evaluation:
        """Panel mean of accuracy and loss, and the consensus model's accuracy."""
        structures = [self._store.structure(int(client)) for client in panel]
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

    @property
    def adapter(self) -> Adapter:
        """The global adapter, at full widths."""
        return self._adapter

    def structure(self, client: int) -> Structure:
        """The groups that a client keeps; all of them if it never took part."""
        return self._store.structure(client)

    def consensus(self, ratio: float) -> Structure:
        """One structure for all: cut to `ratio` by the averaged importance."""
        shape = self._parts.backbone.shape
        full = Structure.full(shape)
        scores = self._guide(0) if self._static is not None else self._store.fleet_scores()
        if ratio <= 0.0 or scores is None:
            return full
        return select(scores, full, shape, ratio, self._parts.config.prune.selection)

    # -- structures and scores --------------------------------------------------------------------------------------

    @property
    def _rank_max(self) -> int:
        """Rank of the global adapter: the largest on offer, or the one rank where all use it."""
        return self._adapter.rank

    @property
    def _is_common(self) -> bool:
        return self._parts.config.prune.structure == "common"

    def _common_mask(self, ratio: float) -> Structure:
        """The one structure of a pruning ratio. Masks of several ratios are nested.

        Where groups cannot come back it goes on from what all devices keep already, so that a device that was sampled
        late ends with the same mask as the others.
        """
        if ratio not in self._masks:
            prune, shape = self._parts.config.prune, self._parts.backbone.shape
            scores = self._ranking(0)
            base = Structure.full(shape) if prune.reversible else self._common
            if base.ratio(shape) > ratio and prune.selection == "layer_local":
                self._masks[ratio] = grow(scores, base, shape, ratio)
            else:
                self._masks[ratio] = select(scores, base, shape, ratio, prune.selection)
        return self._masks[ratio]

    def _dispatched(self, client: int, structure: Structure, ratio: float) -> Structure:
        """What a job starts with. Counts per layer say what comes back under ``layer_local`` only."""
        prune = self._parts.config.prune
        if prune.reversible and prune.selection == "layer_local":
            return grow(self._ranking(client), structure, self._parts.backbone.shape, ratio)
        return self._grown(client, structure, ratio)

    def _grown(self, client: int, structure: Structure, ratio: float) -> Structure:
        """With the groups back that `ratio` leaves room for, where groups may come back at all.

        Under ``global`` selection layers are not alike: the best-ranked structure of that ratio is added whole.
        """
        prune, shape = self._parts.config.prune, self._parts.backbone.shape
        if not prune.reversible or structure.ratio(shape) <= ratio:
            return structure
        if prune.selection == "layer_local":
            return grow(self._ranking(client), structure, shape, ratio)
        best = select(self._ranking(client), Structure.full(shape), shape, ratio, prune.selection)
        return structure.joined(best)

    def _guide(self, client: int) -> GroupScores | None:
        """Scores of a static criterion, which take the place of a client's own average; else None."""
        return None if self._static is None else self._static(client)

    def _ranking(self, client: int) -> GroupScores:
        """Scores by which a client's groups are ranked outside a job: its guide, its own, or the fleet's."""
        scores = self._guide(client)
        if scores is None and not self._is_common:
            scores = self._store.scores(client)
        if scores is None:
            scores = self._store.fleet_scores()
        return GroupScores.zeros(self._parts.backbone.shape) if scores is None else scores

    # -- checkpoint -------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """Adapter, structures, scores and the size of chunks as arrays."""
        arrays: dict[str, np.ndarray] = {}
        plan = self._parts.engine.plan
        if plan is not None:
            # It may have shrunk: a resumed run must add up in the same order.
            arrays["chunk_clients"] = np.array([plan.limit])
        for name, (a, b) in self._adapter.factors.items():
            arrays[f"A.{name}"], arrays[f"B.{name}"] = a.cpu().numpy(), b.cpu().numpy()
        for name, tensor in self._adapter.head.items():
            arrays[f"head.{name}"] = tensor.cpu().numpy()
        for name, tensor in self._adapter.merged.items():
            arrays[f"merged.{name}"] = tensor.cpu().numpy()
        arrays["common_heads"], arrays["common_channels"] = self._common.head_mask, self._common.channel_mask
        arrays.update(self._store.state())
        return arrays

    def restore(self, state: State) -> None:
        """Take what `state` gave."""
        device = self._parts.backbone.device
        self._adapter = Adapter(
            {
                name: (_tensor(state[f"A.{name}"], device), _tensor(state[f"B.{name}"], device))
                for name in self._adapter.factors
            },
            {name: _tensor(state[f"head.{name}"], device) for name in self._adapter.head},
            {
                name: _tensor(state[f"merged.{name}"], device)
                for name in self._adapter.factors
                if f"merged.{name}" in state
            },
        )
        if self._parts.engine.plan is not None and "chunk_clients" in state:
            self._parts.engine.plan.limit = int(state["chunk_clients"][0])
        self._common = Structure(state["common_heads"].astype(bool), state["common_channels"].astype(bool))
        self._store.restore(state)
        self._masks.clear()


def _static_scores(parts: LearnerParts) -> Callable[[int], GroupScores] | None:
    """Scores of a static criterion by client, or None where the criterion is not static.

    One result where it cannot depend on the client, or one mask serves all (client 0's draw). Else those last used are
    held, as many as fit a fixed room, and others are computed again.
    """
    static, config, shape = parts.criterion.static, parts.config, parts.backbone.shape
    if static is None:
        return None
    if config.prune.structure == "common" or parts.criterion.same_for_all:
        once = lru_cache(maxsize=1)(lambda: static(parts.backbone, config.seed, 0))
        return lambda client: once()
    row_bytes = 8 * shape.layers * (shape.head_groups + shape.ffn)
    return lru_cache(maxsize=max(1, _STATIC_BYTES // row_bytes))(
        lambda client: static(parts.backbone, config.seed, client)
    )


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).to(device)
