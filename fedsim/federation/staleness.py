"""How much an update counts that started from an older version."""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.settings import ServerSettings, StalenessSettings

MIX_ASYNC = 0.6
"""``server.mix`` of an asynchronous server where it is null: alpha of FedAsync's experiments (arXiv 1903.03934)."""


def mix_of(server: ServerSettings) -> float:
    """Share of the mean difference that is added."""
    if server.mix is not None:
        return server.mix
    return MIX_ASYNC if server.mode == "async" else 1.0


def staleness_weight(rule: StalenessSettings, staleness: IntArray) -> FloatArray:
    """Weight in (0, 1] of updates that are so many merges old, shape of `staleness`; 1 where that is none."""
    old = np.asarray(staleness, dtype=np.float64)
    if rule.rule == "polynomial":
        return (1.0 + old) ** -rule.exponent
    if rule.rule == "hinge":
        return 1.0 / (1.0 + rule.slope * np.maximum(old - rule.grace, 0.0))
    return np.ones_like(old)


def merge_weights(server: ServerSettings, staleness: IntArray) -> tuple[float, FloatArray | None]:
    """``mix``, and the weight of each update of a merge, (P,); None where all count in full."""
    mix = mix_of(server)
    if server.mode == "sync" or not staleness.any():
        return mix, None
    return mix, staleness_weight(server.staleness, staleness)
