"""The learning rate of a round: one function for all who train, fit or foretell.

Linear decay runs over all rounds, so that the last round still learns a little. A method may give a round less, or
nothing (`Method.learns`): a pass that changes no weight.
"""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import FloatArray
from fedsim.methods.base import Method
from fedsim.settings import Config


def rate_share(method: Method, config: Config, round_index: int) -> float:
    """Share of ``train.learning_rate`` that a round (from 0) trains with, in [0, 1]."""
    decay = 1.0 - round_index / config.server.rounds if config.train.schedule == "linear" else 1.0
    return decay * method.learns(round_index, config)


def learning_rate(method: Method, config: Config, round_index: int) -> float:
    """Learning rate of a round (from 0)."""
    return config.train.learning_rate * rate_share(method, config, round_index)


def rate_shares(method: Method, config: Config, rounds: int) -> FloatArray:
    """`rate_share` of the first `rounds` rounds, shape (rounds,)."""
    return np.array([rate_share(method, config, index) for index in range(rounds)])
