"""Ranks that grow where the adapter matters most: APT's adaptive tuning (arXiv 2401.12200), device by device.

APT raises the ranks of the more salient half of a model's adapters as its budget of tuned parameters grows. Here every
Linear of a device has one rank (`fedsim.learn.model.adapter`), so it is the devices that are compared: among those with
a salience in the upper half of the participants', the most salient go up one rank on offer, as far as the budget
allows.

Unspecified in the source; we chose: the salience is the reward's importance term, mean |B * grad B| over the round's
largest (the method sets ``reward.weights`` so that it is all of the reward); the budget is the participants' mean place
on the ladder of ranks, and rises with the pruning schedule from the first rank's place to half way to the highest.
"""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray, State
from fedsim.contracts.control import Arms, Feedback, RoundContext
from fedsim.state import take

FINAL_SHARE = 0.5
"""How far up the ladder the mean goes."""


class RankGrowth:
    """Ratio by the fleet's schedule, rank by salience.

    Args:
        ranks: on offer, ascending.
        first_rank: of every device; the highest on offer that does not exceed it.
        clients: size of the fleet.
    """

    def __init__(self, ranks: IntArray, first_rank: int, clients: int) -> None:
        self._ranks = ranks
        self._first = max(0, int(np.searchsorted(ranks, first_rank, side="right")) - 1)
        self._place = np.full(clients, self._first, dtype=np.int64)
        self._salience = np.full(clients, np.nan)

    def select(self, context: RoundContext) -> Arms:
        """The schedule's ratio, within each client's bounds; ranks that the budget lets grow have grown."""
        clients = context.clients
        done = min(1.0, context.schedule_ratio / context.ratio_max) if context.ratio_max > 0.0 else 0.0
        top = len(self._ranks) - 1
        budget = len(clients) * (self._first + FINAL_SHARE * done * (top - self._first))
        steps = int(budget + 1e-9) - int(self._place[clients].sum())
        grown = clients[_most_salient(self._salience[clients], self._place[clients] < top)[: max(0, steps)]]
        self._place[grown] += 1
        ratio = np.clip(context.schedule_ratio, context.ratio_low, context.ratio_high)
        return Arms(ratio=ratio, rank=self._ranks[self._place[clients]])

    def update(self, feedback: Feedback) -> None:
        """Remember the salience of those that arrived."""
        heard = np.isfinite(feedback.reward)
        self._salience[feedback.clients[heard]] = feedback.reward[heard]

    def state(self) -> State:
        """Arrays for the checkpoint."""
        return {"place": self._place.copy(), "salience": self._salience.copy()}

    def restore(self, state: State) -> None:
        """Take the arrays of a checkpoint. Raises RunError where they do not fit."""
        self._place = take(state, "place", self._place)
        self._salience = take(state, "salience", self._salience)


def _most_salient(salience: FloatArray, can_grow: np.ndarray) -> IntArray:
    """Places of the upper half by salience that can grow, the most salient first; of equals the first."""
    known = np.isfinite(salience)
    if not known.any():
        return np.empty(0, dtype=np.int64)
    middle = float(np.median(salience[known]))
    candidates = np.flatnonzero(known & can_grow & (np.where(known, salience, -np.inf) >= middle))
    return candidates[np.argsort(-salience[candidates], kind="stable")].astype(np.int64)
