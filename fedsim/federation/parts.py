"""What a federation is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedsim.contracts.common import IntArray
from fedsim.contracts.control import Ask, Policy
from fedsim.contracts.learning import Learner
from fedsim.contracts.program import LocalProgram
from fedsim.control.reward import RewardModel
from fedsim.control.schedule import default_step_max
from fedsim.methods.base import Method
from fedsim.settings import Config


@dataclass(frozen=True)
class Parts:
    """What a federation is made of.

    Attributes:
        participants: clients that a round waits for.
        panel: clients on whose structures the global model is tested.
        ask_of: what a job demands that plays a program.
    """

    config: Config
    method: Method
    learner: Learner
    policy: Policy
    reward: RewardModel
    ask_of: Callable[[LocalProgram], Ask]
    clients: int
    participants: int
    panel: IntArray

    @property
    def step_max(self) -> float:
        """The largest rise of a device's ratio in one participation."""
        config = self.config
        if not self.method.iterative:
            return 0.0
        if config.prune.max_step is not None:
            return config.prune.max_step
        return default_step_max(
            config.prune_warmup_rounds,
            config.prune_end_round,
            config.prune.target,
            clients=self.clients,
            participants_per_round=self.participants,
        )

    def schedule(self, version: int) -> float:
        """Where the fleet's mean ratio should be after the merge that follows `version`."""
        return self.method.schedule(version, self.config) if self.method.prunes else 0.0
