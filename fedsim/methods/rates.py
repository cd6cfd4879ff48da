"""The learning rate of a round: one function for all who fit or foretell; who trains plays the program itself."""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import FloatArray
from fedsim.methods.base import Method
from fedsim.settings import Config


def learning_rate(method: Method, config: Config, round_index: int) -> float:
    """Mean learning rate over the local steps of a round (from 0); passes that change no weight count as 0."""
    return method.local_program(round_index, config).rate


def rate_share(method: Method, config: Config, round_index: int) -> float:
    """`learning_rate` over ``train.learning_rate``."""
    return learning_rate(method, config, round_index) / config.train.learning_rate


def rate_shares(method: Method, config: Config, rounds: int) -> FloatArray:
    """`rate_share` of the first `rounds` rounds, shape (rounds,)."""
    return np.array([rate_share(method, config, index) for index in range(rounds)])
