"""What a federated method is: a small frozen record of settings and functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from fedsim.contracts.program import LocalProgram, Objective, Phase
from fedsim.contracts.server_optimizer import ServerOptimizer
from fedsim.control.schedule import cubic_ratio
from fedsim.learn.entries import OBJECTIVES
from fedsim.registry import loaded
from fedsim.settings import Config, Section

Schedule = Callable[[int, Config], float]
"""The fleet's pruning ratio after a round: ``schedule(round_index, config)``."""

Program = Callable[[int, Config], LocalProgram]
"""What devices do that are sent off in a round."""

When = Callable[[int, Config], bool]
"""Whether something happens in a round."""

Refusals = Callable[[Config], Iterator[str]]
"""What is wrong with a configuration, a sentence each."""


def cubic_schedule(round_index: int, config: Config) -> float:
    """Warm-up, then the cubic schedule from ``prune.warmup_rounds`` to ``prune.end_round``."""
    return cubic_ratio(round_index, config.prune_warmup_rounds, config.prune_end_round, config.prune.target)


def never(round_index: int, config: Config) -> bool:
    """In no round."""
    return False


def refuses_nothing(config: Config) -> Iterator[str]:
    """No configuration."""
    yield from ()


def scheduled_rate(round_index: int, config: Config) -> float:
    """What ``train.schedule`` gives a round: linear decay over all, so that the last round still learns a little."""
    train, rounds = config.train, config.server.rounds
    decay = max(0.0, 1.0 - round_index / rounds) if train.schedule == "linear" else 1.0
    return train.learning_rate * decay


def tuning(round_index: int, config: Config, objective: Objective | str | None = None) -> LocalProgram:
    """Tuning alone: ``train.local_steps`` steps.

    Args:
        objective: or the name of one that was registered (``fedsim.register_objective``).
    Raises:
        ConfigError: there is no objective of that name.
    """
    if isinstance(objective, str):
        made: Objective = loaded(OBJECTIVES.named(objective).make)(config)
        objective = made
    return LocalProgram((Phase(config.train.local_steps, scheduled_rate(round_index, config)),), objective)


def pruning(
    round_index: int, config: Config, *, cuts: bool = True, estimates: bool = True, trains: bool = True
) -> LocalProgram:
    """Tune while importance is estimated, cut, recover: ``train.local_steps`` steps in all.

    Args:
        cuts: False leaves the structure as it is; so do the rounds of warm-up.
        estimates: whether importance is estimated.
        trains: False: passes that change no weight.
    """
    rate, recovery = scheduled_rate(round_index, config), config.local_recovery_steps
    cuts = cuts and round_index >= config.prune_warmup_rounds
    first = Phase(config.train.local_steps - recovery, rate, estimates, trains=trains)
    return LocalProgram((first, Phase(recovery, rate, estimates, cut_before=cuts, trains=trains)))


@dataclass(frozen=True)
class Method:
    """A federated method.

    Attributes:
        name: the key in ``method:``.
        summary: one line on what it does.
        sources: citations.
        prunes: whether the backbone is pruned; where not, the schedule is 0 and importance is never estimated.
        defaults: dotted configuration keys the method sets where the user does not.
        labels: how far its numbers may be trusted (``reconstruction`` where the paper is silent on a choice).
        schedule: the fleet's pruning schedule.
        iterative: whether devices prune within rounds; where not, ratios change by `cuts_after` and at the end alone,
            and no program cuts.
        cuts_after: rounds after which the whole fleet is cut to its target, without training. After the last round it
            always is.
        program: what a device does in a round; None: `pruning` where the method prunes, else `tuning`.
        options: the settings that belong to this method alone, ``method_options``; a section with a default for each.
        server_optimizer: what the server makes of a merge's mean difference; None: the rule's own result.
        refuses: what is wrong with a configuration under this method, beyond what is refused for all.
        baseline: its place among the methods that others are compared with where the user names none, lowest first;
            None: it is none.
    """

    name: str
    summary: str
    sources: tuple[str, ...]
    prunes: bool
    defaults: Mapping[str, object]
    labels: tuple[str, ...] = ("reconstruction",)
    schedule: Schedule = cubic_schedule
    iterative: bool = True
    cuts_after: When = never
    program: Program | None = None
    options: type[Section] = Section
    server_optimizer: Callable[[Config], ServerOptimizer] | None = None
    refuses: Refusals = refuses_nothing
    baseline: int | None = None

    def local_program(self, round_index: int, config: Config) -> LocalProgram:
        """What the devices do that are sent off in a round."""
        if self.program is not None:
            return self.program(round_index, config)
        if self.prunes:
            return pruning(round_index, config, cuts=self.iterative)
        return tuning(round_index, config)
