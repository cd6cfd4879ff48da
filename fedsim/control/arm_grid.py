"""Bandits on a fixed grid of arms, ratio x rank, one per device, vectorised over devices; how an arm is taken differs.

[ours] The ratio's axis has points at most ``control.split`` apart, ends included (`fedsim.control.armspace`: absolute
or as offsets from the schedule); every rank on offer is a point of the other. ``control.smooth`` and ``control.cut``
have no meaning here. Playable are the arms less than one step from the feasible ratios, so that where pruning cannot be
undone a device can always stay (the arm below) or go on (the arm above); their ratio is clipped.
When the whole round has reported, every N and S of a device *that played* is multiplied by lambda, whether its update
arrived or not; where it arrived, N += 1 and S += reward in the played arm.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray, State
from fedsim.contracts.control import Arms, Feedback, RoundContext
from fedsim.control.armspace import BLOCK, feasible_interval, ratio_at
from fedsim.errors import ConfigError
from fedsim.settings import ControlSettings
from fedsim.state import take

LEAST_SPLIT = 0.01
"""The finest grid: 101 ratios for each rank. Memory is arms times clients."""

Choose = Callable[[FloatArray, FloatArray, np.ndarray, IntArray, int], IntArray]
"""Which arm: ``choose(count (arms, P), reward (arms, P), playable (arms, P), clients (P,), round_index) -> (P,)``."""


def ratio_points(split: float) -> FloatArray:
    """Points of the ratio's axis, from 0 to 1, at most `split` apart.

    Raises:
        ConfigError: `split` is below `LEAST_SPLIT`.
    """
    if split < LEAST_SPLIT:
        raise ConfigError(
            f"control.split: value {split} is not allowed with a policy on a grid of arms (at least {LEAST_SPLIT}; "
            "each device keeps statistics of every arm)"
        )
    return np.linspace(0.0, 1.0, int(np.ceil(1.0 / split - 1e-9)) + 1)


class GridBandit:
    """A policy on the grid. State is arrays ``(arms, clients)``, ranks varying fastest, and ``(clients,)``."""

    def __init__(self, settings: ControlSettings, *, clients: int, ranks: IntArray, choose: Choose) -> None:
        points = ratio_points(settings.split)
        self._settings = settings
        self._choose = choose
        self._step = float(points[1])
        self._x = np.repeat(points, len(ranks))
        self._rank = np.tile(np.asarray(ranks, dtype=np.int64), points.size)
        self._count = np.zeros((self._x.size, clients))
        self._reward = np.zeros((self._x.size, clients))
        self._played = np.zeros(clients, dtype=np.int64)

    def select(self, context: RoundContext) -> Arms:
        """Choose an arm for every participant; see the module's text."""
        ids = context.clients
        low, high = feasible_interval(context, self._settings)
        x = self._x[:, None]
        arm = np.empty(ids.size, dtype=np.int64)
        for first in range(0, ids.size, BLOCK):
            part = slice(first, first + BLOCK)
            here = ids[part]
            playable = np.maximum(low[part] - x, x - high[part]) < self._step * (1.0 - 1e-9)
            arm[part] = self._choose(self._count[:, here], self._reward[:, here], playable, here, context.round_index)
        self._played[ids] = arm
        return Arms(ratio=ratio_at(context, self._settings, self._x[arm]), rank=self._rank[arm])

    def update(self, feedback: Feedback) -> None:
        """Discount all who played, credit those who arrived."""
        ids = feedback.clients
        for of_arm in (*self._count, *self._reward):
            of_arm[ids] *= self._settings.discount
        rewarded = feedback.arrived & np.isfinite(feedback.reward)
        ids = ids[rewarded]
        self._count[self._played[ids], ids] += 1.0
        self._reward[self._played[ids], ids] += feedback.reward[rewarded]

    def state(self) -> State:
        """Arrays for the checkpoint."""
        return {"count": self._count.copy(), "reward": self._reward.copy(), "played": self._played.copy()}

    def restore(self, state: State) -> None:
        """Take the arrays of a checkpoint. Raises RunError where they do not fit."""
        self._count = take(state, "count", self._count)
        self._reward = take(state, "reward", self._reward)
        self._played = take(state, "played", self._played)
