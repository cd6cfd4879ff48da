"""Rules that choose clients by what is known of them. Each is a function of its arguments alone, without a loop over
clients; chance is keyed by seed, merge and client.

*Oort* (arXiv 2010.06081, section 4 and algorithm 1). A client's utility is statistical, ``|B| sqrt(mean loss^2)``, plus
a bonus for what has not been heard for long, ``sqrt(0.1 ln R / R_last)``, times ``(T / t)^alpha`` where it takes longer
than the preferred time T. A share of the places, 0.9 at first, times 0.98 each merge, at least 0.2, goes to clients
never heard of; the others are drawn, with chances as their utilities, from those within 95% of the utility that would
just be taken. Utilities beyond the 95th percentile count as that. Unspecified or not known here; we chose: all jobs
train as many samples, so |B| drops out; the loss is that of the client's probe batch, so its square's root mean is
itself; statistical utilities are scaled to [0, 1] before the bonus is added, as the authors' code does; T is the 30th
percentile of the measured times (their code's first value) without their pacer; unknown clients are taken by chance, as
their speed is not known; alpha is 2.

*Power of choice* (arXiv 2010.01243), in its form that costs no traffic (rpow-d): draw d candidates, take those whose
last known loss is highest. We chose: d is twice the number wanted; candidates are drawn with equal chances, as jobs
are equally long whatever a client's data; a client never heard of comes first.

*Available, fastest first* [ours]: those whose last measured time is shortest, of those at hand; clients never heard of
come first, by chance, so that every client is measured once. FedCS (arXiv 1804.08333) asks clients for their resources
instead.
"""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.control.client_history import ClientHistory
from fedsim.rng import Stream, uniforms

CANDIDATES = 2
"""d over the number of clients wanted, of power of choice."""
ALPHA = 2.0
_EXPLORED_FIRST, _EXPLORED_DECAY, _EXPLORED_LEAST = 0.9, 0.98, 0.2
_CUTOFF, _CLIP, _PREFERRED, _BONUS = 0.95, 95.0, 30.0, 0.1


def chances(seed: int, clients: IntArray, round_index: int, sent: int) -> FloatArray:
    """A number in (0, 1) per client, (N,), for one choice."""
    return uniforms(seed, Stream.SELECTION, clients, round_index, sent)


def highest(score: FloatArray, draws: FloatArray, count: int) -> IntArray:
    """Places of the `count` highest scores; of equal ones those with the smallest draws."""
    order = np.lexsort((draws, -score))
    return order[:count]


def power_of_choice(candidates: IntArray, count: int, history: ClientHistory, draws: FloatArray) -> IntArray:
    """Those with the highest loss among twice as many drawn."""
    drawn = np.argsort(draws, kind="stable")[: CANDIDATES * count]
    loss = history.loss[candidates[drawn]]
    return candidates[drawn[highest(np.where(np.isnan(loss), np.inf, loss), draws[drawn], count)]]


def available_fastest(candidates: IntArray, count: int, history: ClientHistory, draws: FloatArray) -> IntArray:
    """Those with the shortest measured time, unknown ones first."""
    time_s = history.time_s[candidates]
    return candidates[highest(-np.where(np.isnan(time_s), -np.inf, time_s), draws, count)]


def explored_share(round_index: int) -> float:
    """Share of Oort's places that goes to clients never heard of."""
    return max(_EXPLORED_LEAST, _EXPLORED_FIRST * _EXPLORED_DECAY**round_index)


def utility(clients: IntArray, history: ClientHistory, round_index: int) -> FloatArray:
    """Oort's utility of clients that have been heard of, (P,), above 0."""
    loss, time_s = np.nan_to_num(history.loss[clients]), history.time_s[clients]
    loss = np.minimum(loss, np.percentile(loss, _CLIP))
    low, high = float(loss.min()), float(loss.max())
    statistical = (loss - low) / (high - low) if high > low else np.ones_like(loss)
    last = np.maximum(history.heard[clients] + 1.0, 1.0)
    bonus = np.sqrt(_BONUS * np.log(max(round_index + 1.0, 1.0)) / last)
    preferred_s = float(np.percentile(time_s, _PREFERRED))
    penalty = np.where(time_s > preferred_s, (preferred_s / time_s) ** ALPHA, 1.0)
    return np.maximum((statistical + bonus) * penalty, 1e-12)


def oort(candidates: IntArray, count: int, history: ClientHistory, draws: FloatArray, round_index: int = 0) -> IntArray:
    """Exploit the known, explore the unknown."""
    is_known = history.is_known(candidates)
    known, unknown = np.flatnonzero(is_known), np.flatnonzero(~is_known)
    explored = min(len(unknown), round(explored_share(round_index) * count))
    explored = max(explored, count - len(known))
    places = unknown[np.argsort(draws[unknown], kind="stable")[:explored]]
    exploited = count - explored
    if exploited:
        value = utility(candidates[known], history, round_index)
        just_taken = np.partition(value, len(value) - exploited)[len(value) - exploited]
        pool = np.flatnonzero(value >= _CUTOFF * just_taken)
        # Drawn without replacement, with chances as the utilities: the largest u^(1/w) (Efraimidis and Spirakis 2006).
        keys = np.log(draws[known[pool]]) / value[pool]
        places = np.concatenate([places, known[pool[np.argsort(-keys, kind="stable")[:exploited]]]])
    return candidates[places]
