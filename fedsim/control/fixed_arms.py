"""Policies without a controller: the schedule alone, and chance."""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import State
from fedsim.contracts.control import Arms, Ask, Feedback, RoundContext
from fedsim.control.recentre import recentred
from fedsim.rng import Stream, uniforms


class _Stateless:
    """What policies that learn nothing share."""

    def update(self, feedback: Feedback) -> None:
        """Nothing to learn."""

    def state(self) -> State:
        """No state."""
        return {}

    def restore(self, state: State) -> None:
        """No state."""


class Uniform(_Stateless):
    """One schedule and one rank for all: the controller's absence."""

    def __init__(self, fixed_rank: int) -> None:
        self._rank = fixed_rank

    def select(self, context: RoundContext) -> Arms:
        """The schedule's ratio, within each client's bounds, and the fixed rank."""
        ratio = np.clip(context.schedule_ratio, context.ratio_low, context.ratio_high)
        return Arms(ratio=ratio, rank=np.full(context.clients.shape, self._rank, dtype=np.int64))


class Random(_Stateless):
    """Uniform ratio within the bounds and uniform rank on offer, then re-centred: chance at equal mean ratio."""

    def __init__(self, ask: Ask, seed: int) -> None:
        self._ask = ask
        self._seed = seed

    def select(self, context: RoundContext) -> Arms:
        """Draw arms, and shift the ratios so that the participants' mean is on the schedule."""
        low, high = context.ratio_low, context.ratio_high
        draw = uniforms(self._seed, Stream.POLICY, context.clients, context.round_index)
        ratio = recentred(low + draw * (high - low), context)
        ranks = np.asarray(self._ask.ranks)
        place = uniforms(self._seed, Stream.POLICY_RANK, context.clients, context.round_index) * ranks.size
        return Arms(ratio=ratio, rank=ranks[place.astype(np.int64)])
