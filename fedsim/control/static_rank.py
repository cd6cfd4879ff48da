"""One LoRA rank per device class, for good: the rank policy of HETLoRA (arXiv 2401.06432) and FlexLoRA (2402.11505).

Both give a client a rank by its resources, before the first round. Unspecified there; we chose: resources are the
arithmetic rate of the device's fastest mode, and classes are spread evenly over the ranks on offer, the fastest class
at the highest and the slowest at the lowest (one class alone: the highest). Unlike the other policies this one is told
which class a device is of; it learns nothing.
"""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import IntArray, State
from fedsim.contracts.control import Arms, Feedback, RoundContext


class StaticRank:
    """Rank by class, ratio by the fleet's schedule.

    Args:
        ranks: on offer, ascending.
        speed_class: each client's class, 0 the slowest, shape (clients,).
    """

    def __init__(self, ranks: IntArray, speed_class: IntArray) -> None:
        classes = int(speed_class.max()) + 1
        share = speed_class / (classes - 1) if classes > 1 else np.ones(len(speed_class))
        self._rank = ranks[np.rint(share * (len(ranks) - 1)).astype(np.int64)]

    def select(self, context: RoundContext) -> Arms:
        """The schedule's ratio, within each client's bounds, and its class's rank."""
        ratio = np.clip(context.schedule_ratio, context.ratio_low, context.ratio_high)
        return Arms(ratio=ratio, rank=self._rank[context.clients])

    def update(self, feedback: Feedback) -> None:
        """Nothing to learn."""

    def state(self) -> State:
        """No state."""
        return {}

    def restore(self, state: State) -> None:
        """No state."""
