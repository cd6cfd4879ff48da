"""The policies by name. A user's own is one entry in `POLICIES`, which is read when a run starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fedsim.contracts.common import IntArray, State
from fedsim.contracts.control import Arms, Ask, ExpectedTime, Feedback, Policy, RoundContext
from fedsim.control.balanced import Balanced, Oracle
from fedsim.control.eucb import EUcb
from fedsim.control.grid_ucb import d_ucb_grid
from fedsim.control.rank_growth import RankGrowth
from fedsim.control.recentre import recentre, recentred
from fedsim.control.static_rank import StaticRank
from fedsim.control.sucb import SUcb
from fedsim.control.thompson import thompson
from fedsim.errors import ConfigError, unknown
from fedsim.rng import Stream, uniforms
from fedsim.settings import ControlSettings

__all__ = [
    "POLICIES",
    "POLICY_DEFAULTS",
    "PolicyFactory",
    "PolicyInputs",
    "Random",
    "Uniform",
    "make_policy",
    "recentre",
]


class _Stateless:
    """What policies that learn nothing share."""

    def update(self, feedback: Feedback) -> None:
        """Nothing to learn."""

    def state(self) -> State:
        """No state."""
        return {}

    def restore(self, state: State) -> None:
        """No state."""


class Uniform(_Stateless):
    """One schedule and one rank for all: the controller's absence."""

    def __init__(self, fixed_rank: int) -> None:
        self._rank = fixed_rank

    def select(self, context: RoundContext) -> Arms:
        """The schedule's ratio, within each client's bounds, and the fixed rank."""
        ratio = np.clip(context.schedule_ratio, context.ratio_low, context.ratio_high)
        return Arms(ratio=ratio, rank=np.full(context.clients.shape, self._rank, dtype=np.int64))


class Random(_Stateless):
    """Uniform ratio within the bounds and uniform rank on offer, then re-centred: chance at equal mean ratio."""

    def __init__(self, ask: Ask, seed: int) -> None:
        self._ask = ask
        self._seed = seed

    def select(self, context: RoundContext) -> Arms:
        """Draw arms, and shift the ratios so that the participants' mean is on the schedule."""
        low, high = context.ratio_low, context.ratio_high
        draw = uniforms(self._seed, Stream.POLICY, context.clients, context.round_index)
        ratio = recentred(low + draw * (high - low), context)
        ranks = np.asarray(self._ask.ranks)
        place = uniforms(self._seed, Stream.POLICY_RANK, context.clients, context.round_index) * ranks.size
        return Arms(ratio=ratio, rank=ranks[place.astype(np.int64)])


@dataclass(frozen=True)
class PolicyInputs:
    """What a policy may be made from.

    Attributes:
        settings: the run's control section.
        clients: size of the fleet; ids are 0 to clients - 1.
        ask: what each arm asks, from shapes.
        seed: the run's root seed.
        fixed_rank: LoRA rank of policies that do not choose one.
        expected_time: true expected times, for `oracle` only.
        speed_class: each client's device class, 0 the slowest, for `static_rank` only.
    """

    settings: ControlSettings
    clients: int
    ask: Ask
    seed: int
    fixed_rank: int
    expected_time: ExpectedTime | None
    speed_class: IntArray | None = None


PolicyFactory = Callable[[PolicyInputs], Policy]
"""How a policy is made; a user's factory takes the same record."""


def _e_ucb(inputs: PolicyInputs) -> Policy:
    return EUcb(inputs.settings, clients=inputs.clients, fixed_rank=inputs.fixed_rank, seed=inputs.seed)


def _d_ucb_grid(inputs: PolicyInputs) -> Policy:
    return d_ucb_grid(inputs.settings, clients=inputs.clients, ranks=inputs.ask.ranks, seed=inputs.seed)


def _thompson(inputs: PolicyInputs) -> Policy:
    return thompson(inputs.settings, clients=inputs.clients, ranks=inputs.ask.ranks, seed=inputs.seed)


def _oracle(inputs: PolicyInputs) -> Policy:
    if inputs.expected_time is None:
        raise ConfigError("control.policy 'oracle' needs the simulator's expected times, and this run offers none")
    return Oracle(ask=inputs.ask, expected_time=inputs.expected_time)


def _static_rank(inputs: PolicyInputs) -> Policy:
    if inputs.speed_class is None:
        raise ConfigError("control.policy 'static_rank' needs the devices' classes, and this run offers none")
    return StaticRank(inputs.ask.ranks, inputs.speed_class)


POLICIES: dict[str, PolicyFactory] = {
    "balanced": lambda inputs: Balanced(clients=inputs.clients, ask=inputs.ask),
    "d_ucb_grid": _d_ucb_grid,
    "e_ucb": _e_ucb,
    "oracle": _oracle,
    "random": lambda inputs: Random(inputs.ask, inputs.seed),
    "rank_growth": lambda inputs: RankGrowth(inputs.ask.ranks, inputs.fixed_rank, inputs.clients),
    "static_rank": _static_rank,
    "sucb": lambda inputs: SUcb(inputs.settings, clients=inputs.clients, ranks=inputs.ask.ranks, seed=inputs.seed),
    "thompson": _thompson,
    "uniform": lambda inputs: Uniform(inputs.fixed_rank),
}
"""Policies by the name that ``control.policy`` takes."""

POLICY_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "e_ucb": {"control.exploration": 2.0**0.5, "control.cut": "played"},
}
"""Configuration keys that a policy sets where neither the method nor the user does."""


def make_policy(
    settings: ControlSettings,
    *,
    clients: int,
    ask: Ask,
    seed: int,
    fixed_rank: int,
    expected_time: ExpectedTime | None = None,
    speed_class: IntArray | None = None,
) -> Policy:
    """Make the policy that ``control.policy`` names.

    Args:
        settings: the run's control section.
        clients: size of the fleet; ids are 0 to clients - 1.
        ask: what each arm asks, from shapes.
        seed: the run's root seed.
        fixed_rank: LoRA rank of policies that do not choose one.
        expected_time: true expected times, for `oracle` only.
        speed_class: each client's device class, 0 the slowest, for `static_rank` only.
    Raises:
        ConfigError: unknown name, or a policy that is not given what it alone needs.
    """
    if settings.policy not in POLICIES:
        raise ConfigError(unknown("control.policy", settings.policy, POLICIES))
    inputs = PolicyInputs(settings, clients, ask, seed, fixed_rank, expected_time, speed_class)
    return POLICIES[settings.policy](inputs)
