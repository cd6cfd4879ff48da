"""S-UCB: one discounted tree bandit per device over (pruning ratio, LoRA rank), vectorised over devices.

FedSpine (arXiv 2501.02438) names the agent and its parameters lambda (``control.discount``), s
(``control.exploration``) and delta (``control.split``), not its steps. What follows is a reconstruction [ours] from
D-UCB (Garivier and Moulines, arXiv 0805.3415) and the splitting agent of FedMP (ICDE 2022):

* A device's arm space is the unit square, cut into boxes (leaves). Axis 0 is the pruning ratio: with ``arms: absolute``
  p = x * ratio_max, with ``arms: offset`` p = schedule + (2 x - 1) * OFFSET_SPAN, after which the server shifts all
  participants so that their mean is on the schedule. Axis 1 is log2 of the rank.
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

from fedsim.control.checkpoint import take
from fedsim.control.recentre import recentre
from fedsim.rng import Stream, uniforms
from fedsim.settings import ControlSettings
from fedsim.specs import Arms, Feedback, FloatArray, IntArray, RoundContext, State

OFFSET_SPAN = 0.2
"""Largest deviation from the schedule that an offset arm asks for [ours]. At a fleet mean of 0.5 it levels devices
whose speeds differ by 2.3 times; twice as much made exploring devices set the length of every round. Re-centring may
carry a device further."""
NEVER_PLAYED = 1e-9
"""A discounted count below this counts as none."""
LEAST_CHILD_SHARE = 0.01
"""A cut at the played point leaves each child at least this share of the side, else it is made in the middle."""
_FIRST_LEAVES = 16


class SUcb:
    """The S-UCB policy. All state is arrays over clients; boxes are ``(clients, leaves, 2)``, grown when needed."""

    def __init__(self, settings: ControlSettings, *, clients: int, ranks: IntArray, seed: int) -> None:
        self._settings = settings
        self._ranks = np.asarray(ranks, dtype=np.int64)
        self._seed = seed
        logs = np.log2(self._ranks.astype(np.float64))
        # With one rank on offer the square shrinks to a line, whose second side is never cut.
        self._rank_positions = (logs - logs[0]) / (logs[-1] - logs[0]) if logs[-1] > logs[0] else np.zeros(logs.size)
        self._lower = np.zeros((clients, _FIRST_LEAVES, 2))
        self._upper = np.zeros((clients, _FIRST_LEAVES, 2))
        self._upper[:, 0] = [1.0, self._rank_positions[-1]]
        self._count = np.zeros((clients, _FIRST_LEAVES))
        self._reward = np.zeros((clients, _FIRST_LEAVES))
        self._leaves = np.ones(clients, dtype=np.int64)
        self._played = np.zeros(clients, dtype=np.int64)
        self._point = np.zeros((clients, 2))

    def select(self, context: RoundContext) -> Arms:
        """Choose an arm for every participant; see the module's text."""
        ids = context.clients
        rows = np.arange(ids.size)
        floor, ceiling = self._feasible_box(context)
        lower, upper = self._lower[ids], self._upper[ids]
        playable = self._playable(ids, lower, upper, floor, ceiling)
        leaf = self._best_leaf(ids, playable, context.round_index)
        start = np.maximum(lower[rows, leaf], floor)
        end = np.minimum(upper[rows, leaf], ceiling)
        draws = [uniforms(self._seed, Stream.POLICY, ids, context.round_index, axis) for axis in range(2)]
        point = start + np.stack(draws, axis=1) * (end - start)
        self._played[ids] = leaf
        self._point[ids] = point
        nearest = np.abs(point[:, 1, None] - self._rank_positions).argmin(axis=1)
        return Arms(ratio=self._ratio(context, point[:, 0]), rank=self._ranks[nearest])

    def _feasible_box(self, context: RoundContext) -> tuple[FloatArray, FloatArray]:
        """Lower and upper corner of the feasible set in arm space, shape (P, 2) each."""
        bounds = np.stack([context.ratio_low, context.ratio_high])
        if self._settings.arms == "offset":
            x = 0.5 * (1.0 + (bounds - context.schedule_ratio) / OFFSET_SPAN)
        else:
            x = bounds / context.ratio_max if context.ratio_max > 0 else np.zeros_like(bounds)
        # A feasible set beyond the square is met by its nearest edge; the ratio itself is clipped afterwards.
        x = np.clip(x, 0.0, 1.0)
        top = np.full(context.clients.size, self._rank_positions[-1])
        return np.stack([x[0], np.zeros_like(top)], axis=1), np.stack([x[1], top], axis=1)

    def _ratio(self, context: RoundContext, x: FloatArray) -> FloatArray:
        low, high = context.ratio_low, context.ratio_high
        if self._settings.arms == "absolute":
            return np.clip(x * context.ratio_max, low, high)
        wish = np.clip(context.schedule_ratio + (2.0 * x - 1.0) * OFFSET_SPAN, low, high)
        return recentre(wish, context.schedule_ratio, low, high)

    def _playable(
        self, ids: IntArray, lower: FloatArray, upper: FloatArray, floor: FloatArray, ceiling: FloatArray
    ) -> np.ndarray:
        """Which leaves may be played, boolean (P, leaves); at least one per client, as the leaves fill the square."""
        exists = np.arange(lower.shape[1]) < self._leaves[ids, None]
        meets = exists & ((lower <= ceiling[:, None]) & (upper >= floor[:, None])).all(axis=2)
        if not self._settings.smooth:
            return meets
        rows = np.arange(ids.size)
        last = self._played[ids]
        last_lower, last_upper = lower[rows, last][:, None], upper[rows, last][:, None]
        gap = np.maximum(0.0, np.maximum(lower - last_upper, last_lower - upper)).max(axis=2)
        gap = np.where(meets, gap, np.inf)
        return meets & (gap <= gap.min(axis=1, keepdims=True))

    def _best_leaf(self, ids: IntArray, playable: np.ndarray, round_index: int) -> IntArray:
        count = np.where(playable, self._count[ids], 0.0)
        # Added one by one, in leaf order: pairwise summation would round otherwise than the definition does.
        total = count.cumsum(axis=1)[:, -1:]
        bonus = np.log(np.maximum(total, 1.0))
        seen = count > NEVER_PLAYED
        safe = np.where(seen, count, 1.0)
        value = np.where(seen, self._reward[ids] / safe + self._settings.exploration * np.sqrt(bonus / safe), np.inf)
        value = np.where(playable, value, -np.inf)
        tied = playable & (value == value.max(axis=1, keepdims=True))
        draw = uniforms(self._seed, Stream.POLICY_TIES, ids, round_index)
        wanted = np.floor(draw * tied.sum(axis=1)).astype(np.int64)
        return (tied & (tied.cumsum(axis=1) - 1 == wanted[:, None])).argmax(axis=1)

    def update(self, feedback: Feedback) -> None:
        """Discount all who played, credit those who arrived, cut their leaves."""
        ids = feedback.clients
        self._count[ids] *= self._settings.discount
        self._reward[ids] *= self._settings.discount
        rewarded = feedback.arrived & np.isfinite(feedback.reward)
        ids = ids[rewarded]
        leaf = self._played[ids]
        self._count[ids, leaf] += 1.0
        self._reward[ids, leaf] += feedback.reward[rewarded]
        self._split(ids)

    def _split(self, ids: IntArray) -> None:
        """Cut the played leaf of each client in two where its longest side exceeds delta."""
        leaf = self._played[ids]
        sides = self._upper[ids, leaf] - self._lower[ids, leaf]
        axis = sides.argmax(axis=1)
        long = sides[np.arange(ids.size), axis] > self._settings.split
        ids, leaf, axis = ids[long], leaf[long], axis[long]
        if ids.size == 0:
            return
        if int(self._leaves[ids].max()) == self._count.shape[1]:
            self._grow()
        start, end = self._lower[ids, leaf, axis], self._upper[ids, leaf, axis]
        at = 0.5 * (start + end)
        point = self._point[ids, axis]
        if self._settings.cut == "played":
            margin = LEAST_CHILD_SHARE * (end - start)
            at = np.where((point - start >= margin) & (end - point >= margin), point, at)
        new = self._leaves[ids]
        self._lower[ids, new] = self._lower[ids, leaf]
        self._upper[ids, new] = self._upper[ids, leaf]
        self._upper[ids, leaf, axis] = at
        self._lower[ids, new, axis] = at
        self._count[ids, new] = self._count[ids, leaf]
        self._reward[ids, new] = self._reward[ids, leaf]
        self._leaves[ids] += 1
        self._played[ids] = np.where(point >= at, new, leaf)

    def _grow(self) -> None:
        """Double the room for leaves (only cuts at the played point can need it)."""
        for name in ("_lower", "_upper", "_count", "_reward"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, np.zeros_like(array)], axis=1))

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
        self._lower = take(state, "lower", self._lower, free_axes=(1,))
        self._upper = take(state, "upper", self._upper, free_axes=(1,))
        self._count = take(state, "count", self._count, free_axes=(1,))
        self._reward = take(state, "reward", self._reward, free_axes=(1,))
        self._leaves = take(state, "leaves", self._leaves)
        self._played = take(state, "played", self._played)
        self._point = take(state, "point", self._point)
