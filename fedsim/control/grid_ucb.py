"""D-UCB on a fixed grid of arms: S-UCB without its tree.

Source: the discounted UCB of Garivier and Moulines (arXiv 0805.3415): the arm with the largest
S/N + s sqrt(ln n / N), N and S discounted by lambda at every play, n the sum of N; an untried arm first, ties drawn.
Their 2 B sqrt(xi) is ``control.exploration`` here: sqrt 2 for B = 1 and xi = 1/2; by default S-UCB's 0.2, so that
the two differ in the grid alone [ours]. The grid is `fedsim.control.arm_grid`'s, and n counts playable arms only
[ours].
"""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.control.arm_grid import GridBandit
from fedsim.control.armspace import best_bound
from fedsim.rng import Stream, uniforms
from fedsim.settings import ControlSettings


def d_ucb_grid(settings: ControlSettings, *, clients: int, ranks: IntArray, seed: int) -> GridBandit:
    """D-UCB on the grid of ratios and `ranks`.

    Raises:
        ConfigError: ``control.split`` asks for too fine a grid.
    """

    def choose(
        count: FloatArray, reward: FloatArray, playable: np.ndarray, ids: IntArray, round_index: int
    ) -> IntArray:
        draws = uniforms(seed, Stream.POLICY_TIES, ids, round_index)
        return best_bound(count, reward, playable, settings.exploration, draws)

    return GridBandit(settings, clients=clients, ranks=ranks, choose=choose)
