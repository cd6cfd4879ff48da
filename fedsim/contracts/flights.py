"""The joint between time and learning. Nothing here computes.

`sim` (when) and `learn` (what is learned) do not know each other. A `Strategy` stands between them: the server process
asks it for a `RoundPlan`, plays the plan on the simulated clock, and hands back a `RoundReport`.

Arrays over the participants of one round have shape ``(P,)`` in the order of ``RoundPlan.clients``, which ascends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fedsim.contracts.common import FloatArray, IntArray, Labels
from fedsim.contracts.control import Rewards, Work


@dataclass(frozen=True, eq=False)
class RoundPlan:
    """What the server dispatches in one round, shape (P,).

    Attributes:
        flight: how many times each client was sent off before.
        steps: local steps of each job.
    """

    round_index: int
    clients: IntArray
    ratio_before: FloatArray
    ratio_target: FloatArray
    rank: IntArray
    work: Work
    flight: IntArray
    steps: IntArray


@dataclass(frozen=True, eq=False)
class RoundReport:
    """What happened on the simulated clock, shape (P,) but for the first three.

    Each phase has its own timestamps (seconds of simulated time, cut at `end_s`):
    ``start_s <= download_start_s <= download_end_s <= compute_end_s <= upload_end_s <= end_s``.
    Bytes and energy are those really spent, also by work that the close of the round cut short. `outcome` holds codes
    of `Outcome`.
    """

    round_index: int
    start_s: float
    end_s: float
    clients: IntArray
    device: Labels
    mode: Labels
    download_start_s: FloatArray
    download_end_s: FloatArray
    compute_end_s: FloatArray
    upload_end_s: FloatArray
    bytes_down: FloatArray
    bytes_up: FloatArray
    energy_joules: FloatArray
    outcome: IntArray


@dataclass(frozen=True, eq=False)
class RoundLearning:
    """What the round taught. Per-client arrays of shape (P,), NaN where there is nothing to say.

    Attributes:
        ratio: achieved cumulative pruning ratio.
        lora_importance: mean of |B * grad B| over each client's LoRA.
        rewards: the bandit's reward and its terms.
        outcome: codes of `Outcome`: the report's, with ``NON_FINITE`` where training failed.
        accuracy, loss, accuracy_consensus: of the new global model; None in rounds without evaluation.
    """

    ratio: FloatArray
    loss_before: FloatArray
    loss_after: FloatArray
    lora_importance: FloatArray
    rewards: Rewards
    outcome: IntArray
    accuracy: float | None
    loss: float | None
    accuracy_consensus: float | None


class Strategy(Protocol):
    """What a method puts behind the server process."""

    def open_round(self, round_index: int, clients: IntArray) -> RoundPlan:
        """Choose arms, freeze and submit the local jobs. `clients` ascends."""

    def close_round(self, report: RoundReport) -> RoundLearning:
        """Train what arrived, aggregate, teach the policy, evaluate."""
