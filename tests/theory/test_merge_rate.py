"""Merge rates of servers that do not wait, against renewal theory.

With C clients at work, each replaced at once by one drawn from a large fleet, arrivals come at C / E[flight] a second;
a buffer of K makes a merge of every K of them (FedBuff, arXiv 2106.06639).
"""

from __future__ import annotations

import numpy as np
import pytest
from sim_toys import ToyFleet, play

from fedsim.settings import ServerSettings

CLIENTS, AT_WORK, MEAN_S = 3000, 40, 7.0


def fleet(seed):
    """Computing takes 3 to 7 s by client, evenly, times 0.5 to 1.5 by flight; transfers 1 s each."""
    of_client = np.random.default_rng(seed).permutation(np.linspace(3.0, 7.0, CLIENTS))
    factors = np.random.default_rng(seed + 1).uniform(0.5, 1.5, (64, CLIENTS))
    return ToyFleet(
        np.ones(CLIENTS), of_client, np.ones(CLIENTS), wobble=lambda flight, clients: factors[flight, clients]
    )


@pytest.mark.parametrize(("mode", "buffer"), [("semi_async", 8), ("async", 1)])
def test_merges_come_as_renewal_theory_says(mode, buffer):
    merges, burn_in = 5000 // buffer, 400 // buffer
    own = {"buffer": buffer} if mode == "semi_async" else {}
    settings = ServerSettings(mode=mode, rounds=merges, concurrency=AT_WORK, **own)
    _, reports, _ = play(fleet(3), settings, seed=3)
    rate = (merges - burn_in) / (reports[-1].end_s - reports[burn_in - 1].end_s)
    assert rate == pytest.approx(AT_WORK / (MEAN_S * buffer), rel=0.01)
    # Little's law: who is at work beside a flight comes back C - 1 times meanwhile, on average.
    staleness = np.concatenate([one.staleness for one in reports[burn_in:]])
    assert staleness.mean() == pytest.approx((AT_WORK - 1) / buffer, rel=0.02, abs=0.5 / buffer)
