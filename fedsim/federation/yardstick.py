"""The final cut, and the tests of the global model."""

from __future__ import annotations

import numpy as np

from fedsim.contracts.flights import Arrivals
from fedsim.contracts.learning import Evaluation
from fedsim.control.recentre import recentre
from fedsim.federation.parts import Parts
from fedsim.federation.standing import Standing


def is_last(parts: Parts, arrivals: Arrivals) -> bool:
    """Whether no merge follows, whatever the evaluation says."""
    server = parts.config.server
    out_of_time = server.time_budget_s is not None and arrivals.end_s >= server.time_budget_s
    return out_of_time or arrivals.merge_index == server.rounds - 1


def cut_to_target(parts: Parts, standing: Standing) -> None:
    """Cut the whole fleet, sampled lately or not, to ``prune.target``."""
    prune = parts.config.prune
    if prune.target_scope == "every_device":
        targets = np.full_like(standing.asked, prune.target)
    else:
        low = np.zeros_like(standing.asked) if prune.reversible else standing.asked
        targets = recentre(standing.asked, prune.target, low, np.full_like(standing.asked, prune.max_ratio))
    # Only shrinking is a cut; a device that stands above its new target keeps what it has where it may not grow.
    clients = np.arange(len(standing.asked), dtype=np.int64)
    standing.achieved = parts.learner.cut(clients, targets)
    standing.asked = targets


def evaluation_of(parts: Parts, standing: Standing, merge_index: int, last: bool) -> Evaluation | None:
    """Tests of the new global model; None in merges without."""
    if not last and (merge_index + 1) % parts.config.evaluate.every_rounds != 0:
        return None
    return parts.learner.evaluate(parts.panel, float(standing.asked.mean()))
