"""The bandit's reward, in [0, 1]. The terms are FedSpine's (arXiv 2501.02438), the formula is [ours].

``product``: R = [time_share + (1 - time_share) L] / (1 + kappa |T_i - T_mean| / T_mean), with L the weighted mean of
the learning terms in use:

* g: relative loss reduction on the client's probe batch, over the running 90th percentile, clipped to [0, 1];
* q: (ratio - ratio_before) / step_max, pruning progress, clipped to [0, 1]; out of use once the device stood at its
  target before the round;
* h: LoRA importance over the largest of the round.

A term is out of use for a client where it is not a number; with no term in use L and the bracket are 1. Where no client
has a loss at all (timing only) the bracket is 1: progress alone would teach the bandit to prune.

Where a merge is no round, the mean time and the largest importance are those of the last updates
(`fedsim.control.peers`).

``fedmp`` (FedMP, ICDE 2022): loss reduction / max(|T_i - T_mean|, 0.05 T_mean), over its running 90th percentile;
timing only counts every reduction as 1.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from fedsim.contracts.common import FloatArray, State
from fedsim.contracts.control import Rewards
from fedsim.control.peers import Peers
from fedsim.control.quantile import RunningQuantile
from fedsim.settings import RewardSettings

_QUANTILE = 0.9
_WINDOW_ROUNDS = 8
_LEAST_WINDOW = 256
_FEDMP_LEAST_GAP = 0.05
_AT_TARGET = 1e-9
_LEAST_LOSS = 1e-12


class RewardModel:
    """Rewards of one round after the other; remembers the last loss reductions to normalise by their 90th percentile.

    The window holds eight rounds of the whole fleet, at least 256 values [ours].
    """

    def __init__(self, settings: RewardSettings, clients: int, peers: int = 0) -> None:
        self._settings = settings
        self._peers = Peers(peers)
        self._percentile = RunningQuantile(_QUANTILE, max(_LEAST_WINDOW, _WINDOW_ROUNDS * clients))

    def compute(
        self,
        *,
        loss_before: ArrayLike,
        loss_after: ArrayLike,
        ratio_before: ArrayLike,
        ratio: ArrayLike,
        step_max: ArrayLike,
        target: ArrayLike,
        lora_importance: ArrayLike,
        time_s: ArrayLike,
        arrived: ArrayLike,
    ) -> Rewards:
        """Rewards of one round, in [0, 1], and their terms; all NaN where not `arrived`.

        The terms are those of ``product``; the value of ``fedmp`` has none.

        Args:
            loss_before, loss_after: on the client's probe batch, NaN where nothing was trained, shape (P,).
            ratio_before, ratio: cumulative pruning ratio before and after, (P,).
            step_max: largest rise in one participation, scalar or (P,); 0 takes the progress term out of use.
            target: ratio at which pruning is over, scalar or (P,).
            lora_importance: mean of |B * grad B|, (P,).
            time_s: dispatch to end of upload, (P,); read only where `arrived`.
            arrived: boolean (P,).
        """
        here = np.asarray(arrived, dtype=bool)
        before = np.where(here, np.asarray(loss_before, dtype=np.float64), np.nan)
        after = np.where(here, np.asarray(loss_after, dtype=np.float64), np.nan)
        if not here.any():
            return Rewards.none(here.size)
        time = np.asarray(time_s, dtype=np.float64)
        weight = np.where(here, np.asarray(lora_importance, dtype=np.float64), np.nan)
        times, weights = self._peers.with_those_before(time[here], weight[here])
        mean_time = float(times.mean())
        if not (np.isfinite(mean_time) and mean_time > 0):
            raise ValueError("reward: the times of arrived clients must be finite and positive")
        gap = np.where(here, np.abs(np.where(here, time, mean_time) - mean_time), 0.0)
        drop = before - after
        if self._settings.kind == "fedmp":
            drop = np.where(here, 1.0, np.nan) if np.isnan(drop).all() else drop
            value = self._normalised(drop / np.maximum(gap, _FEDMP_LEAST_GAP * mean_time))
            value = np.where(np.isfinite(value), value, 0.0)
            return replace(Rewards.none(here.size), reward=np.where(here, value, np.nan))
        relative = np.divide(drop, before, out=np.full(before.shape, np.nan), where=before > _LEAST_LOSS)
        progress = self._progress(ratio_before, ratio, step_max, target, here.shape)
        terms = self._terms(relative, progress, weight, weights)
        share, bracket = self._settings.time_share, 1.0 + self._settings.time_penalty * gap / mean_time
        value = (share + (1.0 - share) * self._learning(terms)) / bracket
        return Rewards(*(np.where(here, column, np.nan) for column in (value, *terms, 1.0 / bracket)))

    def _progress(
        self, ratio_before: ArrayLike, ratio: ArrayLike, step_max: ArrayLike, target: ArrayLike, shape: tuple[int, ...]
    ) -> FloatArray:
        before = np.asarray(ratio_before, dtype=np.float64)
        step = np.broadcast_to(np.asarray(step_max, dtype=np.float64), shape)
        in_use = (step > 0) & (before < np.asarray(target, dtype=np.float64) - _AT_TARGET)
        rise = np.asarray(ratio, dtype=np.float64) - before
        return np.clip(np.divide(rise, step, out=np.full(shape, np.nan), where=in_use), 0.0, 1.0)

    def _terms(
        self, relative: FloatArray, progress: FloatArray, importance: FloatArray, of_peers: FloatArray
    ) -> FloatArray:
        """The learning terms, (3, P); none of them is in use where no client has a loss."""
        if np.isnan(relative).all():
            return np.full((3, *relative.shape), np.nan)
        importance = np.where(np.isfinite(importance), importance, np.nan)
        largest = float(np.fmax.reduce(np.where(np.isfinite(of_peers), of_peers, np.nan)))
        share = importance / largest if largest > 0 else np.full(relative.shape, np.nan)
        return np.stack([self._normalised(relative), progress, np.clip(share, 0.0, 1.0)])

    def _learning(self, terms: FloatArray) -> FloatArray:
        """Weighted mean of the terms in use, per client; 1 where none is."""
        weights = np.asarray(self._settings.weights)[:, None] * ~np.isnan(terms)
        total = weights.sum(axis=0)
        weighted = (weights * np.nan_to_num(terms)).sum(axis=0)
        return np.divide(weighted, total, out=np.ones(total.shape), where=total > 0)

    def _normalised(self, values: FloatArray) -> FloatArray:
        """Values over the 90th percentile of the window, this round's included, clipped to [0, 1]; NaN stays."""
        finite = values[np.isfinite(values)]
        self._percentile.add(finite)
        scale = self._percentile.value(turnover=finite.size)
        clean = np.where(np.isfinite(values), values, np.nan)
        # No reduction to speak of: nobody earns anything for it.
        return np.clip(clean / scale, 0.0, 1.0) if scale > 0 else clean * 0.0

    def state(self) -> State:
        """Arrays for the checkpoint."""
        return {**self._percentile.state(), **self._peers.state()}

    def restore(self, state: State) -> None:
        """Take the arrays of a checkpoint. Raises RunError where they do not fit."""
        self._percentile.restore(state)
        self._peers.restore(state)
