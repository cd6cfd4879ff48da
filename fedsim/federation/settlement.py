"""After flights have ended: the results of what arrived, and what they are worth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.contracts.common import FloatArray, Outcome
from fedsim.contracts.control import Feedback, Rewards
from fedsim.contracts.flights import Arrivals
from fedsim.contracts.learning import LocalResults
from fedsim.federation.parts import Parts


@dataclass(frozen=True, eq=False)
class Settlement:
    """The results of a merge, beside the flights that they belong to.

    Attributes:
        results: of the flights whose updates arrived, in their order.
        arrived, trained: masks (F,) of the flights that arrived, and of these that brought a usable update.
        time_s: from dispatch to the end of upload, (F,); NaN where not `arrived`.
    """

    arrivals: Arrivals
    results: LocalResults
    arrived: NDArray[np.bool_]
    trained: NDArray[np.bool_]
    time_s: FloatArray

    @property
    def good(self) -> LocalResults:
        """The usable results."""
        return self.results.take(self.results.outcome == Outcome.OK)

    def spread(self, values: FloatArray) -> FloatArray:
        """One number per flight from one per result, NaN for the others."""
        column = np.full(len(self.arrived), np.nan)
        column[self.arrived] = values
        return column


def settled(arrivals: Arrivals, results: LocalResults) -> Settlement:
    """Put the results of what arrived beside the flights."""
    arrived = arrivals.outcome == Outcome.OK
    trained = np.zeros(len(arrivals), dtype=bool)
    trained[arrived] = results.outcome == Outcome.OK
    # Dispatch to the end of upload: the download is part of a device's time.
    time_s = np.where(arrived, arrivals.upload_end_s - arrivals.flights.dispatch_s, np.nan)
    return Settlement(arrivals, results, arrived, trained, time_s)


def rewards_of(parts: Parts, settlement: Settlement) -> Rewards:
    """Each flight's reward and its terms, (F,)."""
    flights, results = settlement.arrivals.flights, settlement.results
    return parts.reward.compute(
        loss_before=settlement.spread(results.loss_before),
        loss_after=settlement.spread(results.loss_after),
        ratio_before=flights.ratio_before,
        ratio=flights.ratio_asked,
        lora_importance=settlement.spread(results.lora_importance),
        time_s=settlement.time_s,
        arrived=settlement.trained,
        step_max=parts.step_max,
        target=parts.config.prune.target if parts.method.prunes else 0.0,
    )


def feedback_of(settlement: Settlement, reward: FloatArray) -> Feedback:
    """What the policy is told of a merge."""
    arrivals, flights = settlement.arrivals, settlement.arrivals.flights
    return Feedback(
        round_index=arrivals.merge_index,
        clients=flights.clients,
        ratio_before=flights.ratio_before,
        ratio=flights.ratio_asked,
        rank=flights.rank,
        work=flights.work,
        time_s=settlement.time_s,
        arrived=settlement.arrived,
        reward=reward,
    )
