"""Discounted Thompson sampling with Gaussian beliefs on a fixed grid of arms.

[ours, beyond FedSpine] after the discounted Gaussian sampling of Qi, Wang and Zhu (arXiv 2305.10718): each playable arm
draws a value from a normal distribution around its discounted mean, and the largest draw is played. Rewards lie in
[0, 1], so the belief before any play is one play's worth of `PRIOR_MEAN`, and a forgotten arm returns to it:

    draw ~ Normal((S + PRIOR_MEAN) / (N + 1), s^2 / (N + 1))

with N and S discounted by lambda (``control.discount``), and s (``control.exploration``) the deviation that one reward
is thought to have. The grid is `fedsim.control.arm_grid`'s.
"""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.control.arm_grid import GridBandit
from fedsim.rng import Stream, normals
from fedsim.settings import ControlSettings

PRIOR_MEAN = 0.5
"""What an arm is thought to bring before it was played: the middle of the rewards."""


def thompson(settings: ControlSettings, *, clients: int, ranks: IntArray, seed: int) -> GridBandit:
    """Thompson sampling on the grid of ratios and `ranks`.

    Raises:
        ConfigError: ``control.split`` asks for too fine a grid.
    """

    def choose(
        count: FloatArray, reward: FloatArray, playable: np.ndarray, ids: IntArray, round_index: int
    ) -> IntArray:
        draws = np.stack([normals(seed, Stream.POLICY, ids, round_index, arm) for arm in range(len(count))])
        heard = count + 1.0
        value = (reward + PRIOR_MEAN) / heard + settings.exploration * draws / np.sqrt(heard)
        return np.where(playable, value, -np.inf).argmax(axis=0)

    return GridBandit(settings, clients=clients, ranks=ranks, choose=choose)
