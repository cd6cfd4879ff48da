"""The catalogue of policies: how each is made, and what other parts must know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fedsim.contracts.common import IntArray
from fedsim.contracts.control import Ask, ExpectedTime, Policy
from fedsim.control.balanced import Balanced, Oracle
from fedsim.control.eucb import EUcb
from fedsim.control.fixed_arms import Random, Uniform
from fedsim.control.grid_ucb import d_ucb_grid
from fedsim.control.rank_growth import RankGrowth
from fedsim.control.static_rank import StaticRank
from fedsim.control.sucb import SUcb
from fedsim.control.thompson import thompson
from fedsim.errors import ConfigError
from fedsim.registry import Catalogue, checked_function
from fedsim.settings import ControlSettings


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
    expected_time: ExpectedTime | None = None
    speed_class: IntArray | None = None


PolicyFactory = Callable[[PolicyInputs], Policy]
"""How a policy is made; a user's factory takes the same record."""


@dataclass(frozen=True)
class PolicyEntry:
    """A policy, and what is known of it before it is made. The facts' defaults are those of a learning controller.

    Attributes:
        name: what ``control.policy`` takes.
        make: the policy of one run.
        defaults: dotted configuration keys that it sets where neither the method nor the user does.
        reads_rewards: whether rewards teach it: where not, it does not matter which terms they had.
        one_rank: whether every client always works at ``model.lora_rank``.
        chooses: whether it chooses arms at all; where not, all clients follow the schedule alike.
        explores: whether it must find out what devices can do, so that they are new to it at first.
        is_reference: whether it stands at one of the two ends of what a controller can do: never left out of a figure.
    """

    name: str
    make: PolicyFactory
    defaults: Mapping[str, object] = field(default_factory=dict)
    reads_rewards: bool = True
    one_rank: bool = False
    chooses: bool = True
    explores: bool = True
    is_reference: bool = False


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


def _rank_growth(inputs: PolicyInputs) -> Policy:
    return RankGrowth(inputs.ask.ranks, inputs.fixed_rank, inputs.clients)


def _static_rank(inputs: PolicyInputs) -> Policy:
    if inputs.speed_class is None:
        raise ConfigError("control.policy 'static_rank' needs the devices' classes, and this run offers none")
    return StaticRank(inputs.ask.ranks, inputs.speed_class)


def _sucb(inputs: PolicyInputs) -> Policy:
    return SUcb(inputs.settings, clients=inputs.clients, ranks=inputs.ask.ranks, seed=inputs.seed)


POLICIES: Catalogue[PolicyEntry] = Catalogue(
    "control.policy",
    (
        PolicyEntry("balanced", lambda inputs: Balanced(clients=inputs.clients, ask=inputs.ask), reads_rewards=False),
        PolicyEntry("d_ucb_grid", _d_ucb_grid),
        PolicyEntry(
            "e_ucb",
            _e_ucb,
            defaults={"control.exploration": 2.0**0.5, "control.cut": "played"},
            one_rank=True,
        ),
        PolicyEntry("oracle", _oracle, reads_rewards=False, explores=False, is_reference=True),
        PolicyEntry("random", lambda inputs: Random(inputs.ask, inputs.seed), reads_rewards=False, explores=False),
        # It follows how much each device's components matter, round by round; it has no arms to explore.
        PolicyEntry("rank_growth", _rank_growth, explores=False),
        PolicyEntry("static_rank", _static_rank, reads_rewards=False, explores=False),
        PolicyEntry("sucb", _sucb),
        PolicyEntry("thompson", _thompson),
        PolicyEntry(
            "uniform",
            lambda inputs: Uniform(inputs.fixed_rank),
            reads_rewards=False,
            one_rank=True,
            chooses=False,
            explores=False,
            is_reference=True,
        ),
    ),
)
"""Policies by the name that ``control.policy`` takes."""


def policy_facts(name: str) -> PolicyEntry:
    """Facts of a recorded run's policy: those of a learning controller where nobody registered it in this process."""
    return POLICIES.get(name) or PolicyEntry(name, make_policy)


def make_policy(inputs: PolicyInputs) -> Policy:
    """Make the policy that ``control.policy`` names.

    Raises:
        ConfigError: unknown name, or a policy that is not given what it alone needs.
    """
    return POLICIES.named(inputs.settings.policy).make(inputs)


def register_policy(
    name: str,
    make: PolicyFactory,
    *,
    defaults: Mapping[str, object] | None = None,
    reads_rewards: bool = True,
    one_rank: bool = False,
    chooses: bool = True,
    explores: bool = True,
) -> None:
    """Make a policy of your own usable as ``control.policy``, without editing the package.

    Args:
        make: takes `PolicyInputs`, returns a `fedsim.contracts.control.Policy`.
        defaults, reads_rewards, one_rank, chooses, explores: facts, see `PolicyEntry`.
    Raises:
        ConfigError: the name is taken, or `make` is no function.
    """
    checked_function(f"register_policy: '{name}'", make)
    POLICIES.add(PolicyEntry(name, make, dict(defaults or {}), reads_rewards, one_rank, chooses, explores))
