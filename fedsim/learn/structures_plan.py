"""Which groups a client starts a job with, shrinks to, gets back, and is tested on.

Unspecified in the paper; we chose: a device that may grow back takes its best-scored missing groups at dispatch, when
it receives the LoRA rows that go with them; with one common structure a device's mask follows from its ratio alone (the
best groups by the fleet's averaged importance), nested over ratios, and over merges where groups cannot come back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray, State
from fedsim.learn.model.backbone import Backbone
from fedsim.learn.store import ClientStore
from fedsim.learn.train.importance import Criterion, GroupScores
from fedsim.learn.train.selection import grow, select
from fedsim.settings import Config
from fedsim.structure import Structure

_STATIC_BYTES = 1 << 26
"""Room for a static criterion's scores of single clients."""


class StructuresPlan:
    """Every client's structure and scores, and what follows from them and a ratio."""

    def __init__(self, config: Config, backbone: Backbone, criterion: Criterion) -> None:
        self._prune, self._shape = config.prune, backbone.shape
        self._static = _static_scores(config, backbone, criterion)
        self._store = ClientStore(backbone.shape)
        self._common = Structure.full(backbone.shape)  # what every device keeps so far (common structure)
        self._masks: dict[float, Structure] = {}  # common masks by ratio, till the next merge

    def structure(self, client: int) -> Structure:
        """The groups that a client keeps; all of them if it never took part."""
        return self._store.structure(client)

    def scores(self, client: int) -> GroupScores | None:
        """The client's averaged scores; None before its first."""
        return self._store.scores(client)

    def guide(self, client: int) -> GroupScores | None:
        """Scores of a static criterion, which take the place of a client's own average; else None."""
        return None if self._static is None else self._static(client)

    def dispatched(self, client: int, ratio: float) -> tuple[Structure, Structure | None]:
        """What a job that cuts to `ratio` starts with, and the ready mask to shrink to (None: by scores)."""
        structure, prune = self._store.structure(client), self._prune
        if self._is_common:
            mask = self._common_mask(ratio)
            return structure.joined(mask) if prune.reversible else structure, mask
        # Counts per layer say what comes back under layer_local only.
        if prune.reversible and prune.selection == "layer_local":
            return grow(self._ranking(client), structure, self._shape, ratio), None
        return self._grown(client, structure, ratio), None

    def merged(self, updates: Iterable[tuple[int, Structure, GroupScores | None]]) -> None:
        """Keep new structures and scores (None: as before) of the clients whose updates are merged."""
        for client, structure, scores in updates:
            self._store.put_structure(client, structure)
            self._common = self._common.within(structure)
            if scores is not None:
                self._store.put_scores(client, scores)
            self._masks.clear()

    def cut(self, clients: IntArray, ratios: FloatArray) -> FloatArray:
        """Prune clients at once, without training; one that may grow back does so where its ratio falls.

        Returns:
            The achieved ratios.
        """
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
            achieved[place] = structure.ratio(self._shape)
        return achieved

    def consensus(self, ratio: float) -> Structure:
        """One structure for all: cut to `ratio` by the averaged importance."""
        full = Structure.full(self._shape)
        scores = self.guide(0) if self._static is not None else self._store.fleet_scores()
        if ratio <= 0.0 or scores is None:
            return full
        return select(scores, full, self._shape, ratio, self._prune.selection)

    def state(self) -> State:
        """Structures and scores as arrays."""
        common = {"common_heads": self._common.head_mask, "common_channels": self._common.channel_mask}
        return {**common, **self._store.state()}

    def restore(self, state: State) -> None:
        """Take what `state` gave."""
        self._common = Structure(state["common_heads"].astype(bool), state["common_channels"].astype(bool))
        self._store.restore(state)
        self._masks.clear()

    # ----------------------------------------------------------------------------------------------------------------

    @property
    def _is_common(self) -> bool:
        return self._prune.structure == "common"

    def _cut_common(self, client: int, ratio: float) -> Structure:
        mask = self._common_mask(ratio)
        return mask if self._prune.reversible else mask.within(self._store.structure(client))

    def _cut_own(self, client: int, ratio: float) -> Structure:
        structure = self._grown(client, self._store.structure(client), ratio)
        return select(self._ranking(client), structure, self._shape, ratio, self._prune.selection)

    def _common_mask(self, ratio: float) -> Structure:
        """The one structure of a pruning ratio. Masks of several ratios are nested.

        Where groups cannot come back it goes on from what all devices keep already, so that a device that was sampled
        late ends with the same mask as the others.
        """
        if ratio not in self._masks:
            prune, shape = self._prune, self._shape
            scores = self._ranking(0)
            base = Structure.full(shape) if prune.reversible else self._common
            if base.ratio(shape) > ratio and prune.selection == "layer_local":
                self._masks[ratio] = grow(scores, base, shape, ratio)
            else:
                self._masks[ratio] = select(scores, base, shape, ratio, prune.selection)
        return self._masks[ratio]

    def _grown(self, client: int, structure: Structure, ratio: float) -> Structure:
        """With the groups back that `ratio` leaves room for, where groups may come back at all.

        Under ``global`` selection layers are not alike: the best-ranked structure of that ratio is added whole.
        """
        prune, shape = self._prune, self._shape
        if not prune.reversible or structure.ratio(shape) <= ratio:
            return structure
        if prune.selection == "layer_local":
            return grow(self._ranking(client), structure, shape, ratio)
        best = select(self._ranking(client), Structure.full(shape), shape, ratio, prune.selection)
        return structure.joined(best)

    def _ranking(self, client: int) -> GroupScores:
        """Scores by which a client's groups are ranked outside a job: its guide, its own, or the fleet's."""
        scores = self.guide(client)
        if scores is None and not self._is_common:
            scores = self._store.scores(client)
        if scores is None:
            scores = self._store.fleet_scores()
        return GroupScores.zeros(self._shape) if scores is None else scores


def _static_scores(config: Config, backbone: Backbone, criterion: Criterion) -> Callable[[int], GroupScores] | None:
    """Scores of a static criterion by client, or None where the criterion is not static.

    One result where it cannot depend on the client, or one mask serves all (client 0's draw). Else those last used are
    held, as many as fit a fixed room, and others are computed again.
    """
    static, shape = criterion.static, backbone.shape
    if static is None:
        return None
    if config.prune.structure == "common" or criterion.same_for_all:
        once = lru_cache(maxsize=1)(lambda: static(backbone, config.seed, 0))
        return lambda client: once()
    row_bytes = 8 * shape.layers * (shape.head_groups + shape.ffn)
    return lru_cache(maxsize=max(1, _STATIC_BYTES // row_bytes))(lambda client: static(backbone, config.seed, client))
