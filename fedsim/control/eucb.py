"""E-UCB: FedMP's agent for the pruning ratio alone, one per device, vectorised over devices.

Source: FedMP (ICDE 2022, doi 10.1109/ICDE53745.2022.00062): the ratios are an interval, cut into regions as the agent
plays; it takes the region with the largest discounted upper confidence bound, plays a random ratio in it, and cuts the
region there while it is longer than a threshold (``control.split``). A region's statistics are those of the plays that
fell into it. The LoRA rank is fixed.

Unspecified there, or read through secondary notes; we chose:

* s (``control.exploration``) is sqrt 2 and the cut is at the played point unless the configuration says otherwise.
* ``control.arms`` may be ``offset`` too, as for S-UCB; ``control.smooth`` has no meaning here.
* Infeasible regions (pruning that cannot be undone) take no part; n in the bound is the sum of N over the feasible.
* A region is cut at its first rewarded play, so what it holds by then is the play at which it was cut off: that goes to
  the part in which it lies, and the new play to its own. A play within 1% of an end cuts in the
  middle, so that a region may hold several plays near that end: they go together, with the last of them. An untried
  region has an infinite bound; ties are drawn.
* Every N and S of a device *that played* is discounted, whether its update arrived or not; where none arrived nothing
  is credited or cut.
"""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import IntArray, State
from fedsim.contracts.control import Arms, Feedback, RoundContext
from fedsim.control.armspace import BLOCK, best_bound, cut_point, doubled, feasible_interval, ratio_at
from fedsim.rng import Stream, uniforms
from fedsim.settings import ControlSettings
from fedsim.state import take

_FIRST_REGIONS = 4


class EUcb:
    """The E-UCB policy. All state is arrays whose last axis is the client: ``(regions, clients)`` or ``(clients,)``.

    The room for regions doubles when some client needs it. A region that a client does not have yet is an interval
    that meets nothing.
    """

    def __init__(self, settings: ControlSettings, *, clients: int, fixed_rank: int, seed: int) -> None:
        self._settings = settings
        self._rank = fixed_rank
        self._seed = seed
        self._lower = np.full((_FIRST_REGIONS, clients), np.inf)
        self._upper = np.full((_FIRST_REGIONS, clients), -np.inf)
        self._lower[0], self._upper[0] = 0.0, 1.0
        self._count = np.zeros((_FIRST_REGIONS, clients))
        self._reward = np.zeros((_FIRST_REGIONS, clients))
        self._place = np.zeros((_FIRST_REGIONS, clients))  # of the play last credited
        self._regions = np.ones(clients, dtype=np.int64)
        self._played = np.zeros(clients, dtype=np.int64)
        self._point = np.zeros(clients)

    def select(self, context: RoundContext) -> Arms:
        """Choose a ratio for every participant, at the fixed rank; see the module's text."""
        ids, index = context.clients, context.round_index
        low, high = feasible_interval(context, self._settings)
        ties = uniforms(self._seed, Stream.POLICY_TIES, ids, index)
        region = np.empty(ids.size, dtype=np.int64)
        for first in range(0, ids.size, BLOCK):
            part = slice(first, first + BLOCK)
            here = ids[part]
            playable = (self._lower[:, here] <= high[part]) & (self._upper[:, here] >= low[part])
            region[part] = best_bound(
                self._count[:, here], self._reward[:, here], playable, self._settings.exploration, ties[part]
            )
        start = np.maximum(self._lower[region, ids], low)
        end = np.minimum(self._upper[region, ids], high)
        x = start + uniforms(self._seed, Stream.POLICY, ids, index) * (end - start)
        self._played[ids], self._point[ids] = region, x
        return Arms(ratio=ratio_at(context, self._settings, x), rank=np.full(ids.shape, self._rank, dtype=np.int64))

    def update(self, feedback: Feedback) -> None:
        """Discount all who played, cut the regions of those who arrived, credit the part in which the play lies."""
        ids = feedback.clients
        for of_region in (*self._count, *self._reward):
            of_region[ids] *= self._settings.discount
        rewarded = feedback.arrived & np.isfinite(feedback.reward)
        ids = ids[rewarded]
        region = self._cut(ids, self._played[ids])
        self._place[region, ids] = self._point[ids]
        self._count[region, ids] += 1.0
        self._reward[region, ids] += feedback.reward[rewarded]

    def _cut(self, ids: IntArray, region: IntArray) -> IntArray:
        """Cut played regions that are longer than the threshold; returns each client's region with the played point."""
        start, end = self._lower[region, ids], self._upper[region, ids]
        long = end - start > self._settings.split
        ids, cut = ids[long], region[long]
        if ids.size == 0:
            return region
        if int(self._regions[ids].max()) == self._count.shape[0]:
            self._grow()
        point, new = self._point[ids], self._regions[ids]
        at = cut_point(start[long], end[long], point, self._settings)
        self._lower[new, ids], self._upper[new, ids] = at, end[long]
        self._upper[cut, ids] = at
        self._place[new, ids] = self._place[cut, ids]
        moves = self._place[cut, ids] >= at
        for held in (self._count, self._reward):
            held[new, ids] = np.where(moves, held[cut, ids], 0.0)
            held[cut, ids] = np.where(moves, 0.0, held[cut, ids])
        self._regions[ids] += 1
        holds = region.copy()
        holds[long] = np.where(point >= at, new, cut)
        return holds

    def _grow(self) -> None:
        """Double the room for regions."""
        self._lower, self._upper = doubled(self._lower, np.inf), doubled(self._upper, -np.inf)
        self._count, self._reward = doubled(self._count, 0.0), doubled(self._reward, 0.0)
        self._place = doubled(self._place, 0.0)

    def state(self) -> State:
        """Arrays for the checkpoint."""
        return {
            "lower": self._lower.copy(),
            "upper": self._upper.copy(),
            "count": self._count.copy(),
            "reward": self._reward.copy(),
            "place": self._place.copy(),
            "regions": self._regions.copy(),
            "played": self._played.copy(),
            "point": self._point.copy(),
        }

    def restore(self, state: State) -> None:
        """Take the arrays of a checkpoint. Raises RunError where they do not fit."""
        self._count = take(state, "count", self._count, free_axes=(0,))
        self._lower = take(state, "lower", self._count)
        self._upper = take(state, "upper", self._count)
        self._reward = take(state, "reward", self._count)
        self._place = take(state, "place", self._count)
        self._regions = take(state, "regions", self._regions)
        self._played = take(state, "played", self._played)
        self._point = take(state, "point", self._point)
