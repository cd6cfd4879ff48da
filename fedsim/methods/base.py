"""What a federated method is: a small frozen record of settings and functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedsim.control.schedule import cubic_ratio
from fedsim.settings import Config

Schedule = Callable[[int, Config], float]
"""The fleet's pruning ratio after a round: ``schedule(round_index, config)``."""

Share = Callable[[int, Config], float]
"""A share in [0, 1] for a round."""

When = Callable[[int, Config], bool]
"""Whether something happens in a round."""


def cubic_schedule(round_index: int, config: Config) -> float:
    """Warm-up, then the cubic schedule from ``prune.warmup_rounds`` to ``prune.end_round``."""
    return cubic_ratio(round_index, config.prune_warmup_rounds, config.prune_end_round, config.prune.target)


def always(round_index: int, config: Config) -> bool:
    """In every round."""
    return True


def never(round_index: int, config: Config) -> bool:
    """In no round."""
    return False


def in_full(round_index: int, config: Config) -> float:
    """All of it, in every round."""
    return 1.0


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
        iterative: whether devices prune within rounds; where not, ratios change by `cuts_after` and at the end alone.
        cuts_after: rounds after which the whole fleet is cut to its target, without training. After the last round it
            always is.
        learns: share of the learning rate that a round gets; 0: a pass that changes no weight.
        estimates: rounds in which importance is estimated, and its cost counted.
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
    learns: Share = in_full
    estimates: When = always
    baseline: int | None = None
