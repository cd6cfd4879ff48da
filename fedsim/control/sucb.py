"""S-UCB: one discounted tree bandit per device over (pruning ratio, LoRA rank), vectorised over devices.

FedSpine (arXiv 2501.02438) names the agent and its parameters lambda (``control.discount``), s
(``control.exploration``) and delta (``control.split``), not its steps. What follows is a reconstruction [ours] from
D-UCB (Garivier and Moulines, arXiv 0805.3415) and the splitting agent of FedMP (ICDE 2022):

* A device's arm space is the unit square, cut into boxes (leaves). Axis 0 is the pruning ratio, absolute or as an
  offset from the schedule (`fedsim.control.armspace`). Axis 1 is log2 of the rank.
* Select, among the leaves that meet the feasible set (closed boxes), the largest
  U = S/N + s sqrt(max(0, ln n)/N), n the sum of N over those leaves; N below `NEVER_PLAYED` gives +inf; ties are drawn.
  With ``smooth``, only leaves that touch the one last played (corners count), or where none of these is feasible the
  nearest ones, take part; n is their sum.
* Play a uniform point of leaf and feasible set; the rank is rounded to the nearest on offer, the lower one if halfway.
* When the whole round has reported: every N and S of a device *that played* times lambda, whether its update arrived
  or not; where it arrived, N += 1 and S += reward in the played leaf. Devices that were not sampled keep their
  statistics: their clock counts their own plays.
* The played leaf, where rewarded, is then cut once if its longest side exceeds delta (the first axis where equal):
  in the middle, or at the played point (in the middle too where that would leave less than 1% of the side).
  Both children inherit N and S. The leaf *played* keeps its credit, though re-centring may have moved the ratio.
"""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray, State
from fedsim.contracts.control import Arms, Feedback, RoundContext
from fedsim.control.armspace import BLOCK as _BLOCK
from fedsim.control.armspace import (
    LEAST_CHILD_SHARE,
    NEVER_PLAYED,
    OFFSET_SPAN,
    best_bound,
    cut_point,
    doubled,
    feasible_interval,
    ratio_at,
)
from fedsim.rng import Stream, uniforms
from fedsim.settings import ControlSettings
from fedsim.state import take

__all__ = ["LEAST_CHILD_SHARE", "NEVER_PLAYED", "OFFSET_SPAN", "SUcb"]

_FIRST_LEAVES = 4


class SUcb:
    """The S-UCB policy. All state is arrays whose last axis is the client.

    Boxes are ``(2 axes, leaves, clients)``, statistics ``(leaves, clients)``; the room for leaves doubles when some
    client needs it. A leaf that a client does not have yet is a box that meets nothing.
    """

    def __init__(self, settings: ControlSettings, *, clients: int, ranks: IntArray, seed: int) -> None:
        self._settings = settings
        self._ranks = np.asarray(ranks, dtype=np.int64)
        self._seed = seed
        logs = np.log2(self._ranks.astype(np.float64))
        # With one rank on offer the square shrinks to a line, whose second side is never cut.
        self._rank_positions = (logs - logs[0]) / (logs[-1] - logs[0]) if logs[-1] > logs[0] else np.zeros(logs.size)
        self._lower = np.full((2, _FIRST_LEAVES, clients), np.inf)
        self._upper = np.full((2, _FIRST_LEAVES, clients), -np.inf)
        self._lower[:, 0] = 0.0
        self._upper[:, 0] = [[1.0], [self._rank_positions[-1]]]
        self._count = np.zeros((_FIRST_LEAVES, clients))
        self._reward = np.zeros((_FIRST_LEAVES, clients))
        self._leaves = np.ones(clients, dtype=np.int64)
        self._played = np.zeros(clients, dtype=np.int64)
        self._point = np.zeros((2, clients))

    def select(self, context: RoundContext) -> Arms:
        """Choose an arm for every participant; see the module's text."""
        ids, index = context.clients, context.round_index
        floor, ceiling = self._feasible_box(context)
        leaf = np.empty(ids.size, dtype=np.int64)
        for first in range(0, ids.size, _BLOCK):
            part = slice(first, first + _BLOCK)
            playable = self._playable(ids[part], floor[:, part], ceiling[:, part])
            leaf[part] = self._best_leaf(ids[part], playable, index)
        start = np.maximum(self._lower[:, leaf, ids], floor)
        end = np.minimum(self._upper[:, leaf, ids], ceiling)
        draws = [uniforms(self._seed, Stream.POLICY, ids, index, axis) for axis in range(2)]
        point = start + np.stack(draws) * (end - start)
        self._played[ids] = leaf
        self._point[:, ids] = point
        nearest = np.abs(point[1] - self._rank_positions[:, None]).argmin(axis=0)
        return Arms(ratio=ratio_at(context, self._settings, point[0]), rank=self._ranks[nearest])

    def _feasible_box(self, context: RoundContext) -> tuple[FloatArray, FloatArray]:
        """Lower and upper corner of the feasible set in arm space, shape (2, P) each."""
        low, high = feasible_interval(context, self._settings)
        return np.stack([low, np.zeros_like(low)]), np.stack([high, np.full_like(high, self._rank_positions[-1])])

    def _playable(self, ids: IntArray, floor: FloatArray, ceiling: FloatArray) -> np.ndarray:
        """Which leaves may be played, boolean (leaves, P); at least one per client, as the leaves fill the square."""
        lower, upper = self._lower.take(ids, axis=2), self._upper.take(ids, axis=2)
        touches = (lower <= ceiling[:, None]) & (upper >= floor[:, None])
        meets = touches[0] & touches[1]
        if not self._settings.smooth:
            return meets
        last = self._played[ids]
        last_lower, last_upper = self._lower[:, last, ids], self._upper[:, last, ids]
        gap = np.maximum(lower - last_upper[:, None], last_lower[:, None] - upper).max(axis=0)
        gap = np.where(meets, np.maximum(gap, 0.0), np.inf)
        return meets & (gap <= gap.min(axis=0))

    def _best_leaf(self, ids: IntArray, playable: np.ndarray, round_index: int) -> IntArray:
        """The playable leaf with the largest bound U of each client, (P,); a seeded one of those that tie."""
        draws = uniforms(self._seed, Stream.POLICY_TIES, ids, round_index)
        count, reward = self._count.take(ids, axis=1), self._reward.take(ids, axis=1)
        return best_bound(count, reward, playable, self._settings.exploration, draws)

    def update(self, feedback: Feedback) -> None:
        """Discount all who played, credit those who arrived, cut their leaves."""
        ids = feedback.clients
        for of_leaf in (*self._count, *self._reward):
            of_leaf[ids] *= self._settings.discount
        rewarded = feedback.arrived & np.isfinite(feedback.reward)
        ids = ids[rewarded]
        leaf = self._played[ids]
        self._count[leaf, ids] += 1.0
        self._reward[leaf, ids] += feedback.reward[rewarded]
        self._split(ids)

    def _split(self, ids: IntArray) -> None:
        """Cut the played leaf of each client in two where its longest side exceeds delta."""
        leaf = self._played[ids]
        sides = self._upper[:, leaf, ids] - self._lower[:, leaf, ids]
        axis = sides.argmax(axis=0)
        long = sides.max(axis=0) > self._settings.split
        ids, leaf, axis = ids[long], leaf[long], axis[long]
        if ids.size == 0:
            return
        if int(self._leaves[ids].max()) == self._count.shape[0]:
            self._grow()
        start, end = self._lower[axis, leaf, ids], self._upper[axis, leaf, ids]
        point = self._point[axis, ids]
        at = cut_point(start, end, point, self._settings)
        new = self._leaves[ids]
        self._lower[:, new, ids] = self._lower[:, leaf, ids]
        self._upper[:, new, ids] = self._upper[:, leaf, ids]
        self._upper[axis, leaf, ids] = at
        self._lower[axis, new, ids] = at
        self._count[new, ids] = self._count[leaf, ids]
        self._reward[new, ids] = self._reward[leaf, ids]
        self._leaves[ids] += 1
        self._played[ids] = np.where(point >= at, new, leaf)

    def _grow(self) -> None:
        """Double the room for leaves."""
        self._lower, self._upper = doubled(self._lower, np.inf), doubled(self._upper, -np.inf)
        self._count, self._reward = doubled(self._count, 0.0), doubled(self._reward, 0.0)

    def state(self) -> State:
        """Arrays for the checkpoint."""
        return {
            "lower": self._lower.copy(),
            "upper": self._upper.copy(),
            "count": self._count.copy(),
            "reward": self._reward.copy(),
            "leaves": self._leaves.copy(),
            "played": self._played.copy(),
            "point": self._point.copy(),
        }

    def restore(self, state: State) -> None:
        """Take the arrays of a checkpoint. Raises RunError where they do not fit."""
        self._count = take(state, "count", self._count, free_axes=(0,))
        self._reward = take(state, "reward", self._count)
        boxes = np.broadcast_to(self._count, (2, *self._count.shape))
        self._lower = take(state, "lower", boxes)
        self._upper = take(state, "upper", boxes)
        self._leaves = take(state, "leaves", self._leaves)
        self._played = take(state, "played", self._played)
        self._point = take(state, "point", self._point)
