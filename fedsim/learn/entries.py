"""Aggregation rules, pruning criteria and local objectives by name, with what a run must know before torch is loaded.

The functions themselves work on torch tensors, and are imported when a learner is built; a run that trains nothing
reads the facts and refuses misspelt names all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedsim.errors import ConfigError
from fedsim.registry import Catalogue, checked_function

Function = Callable[..., Any] | str
"""A function, or its place, ``"module:name"``, where importing it would load torch."""

_RULES, _CRITERIA, _COHORT = "fedsim.learn.merge", "fedsim.learn.train.importance", "fedsim.learn.cohort.scores"


@dataclass(frozen=True)
class RuleEntry:
    """An aggregation rule.

    Attributes:
        name: what ``aggregate.rule`` takes.
        merge: a `fedsim.learn.merge.merging.Rule`.
        equal_ranks: whether it can merge updates of one LoRA rank only.
        sends_stacks: whether clients download the stacked factors of all who contributed since they last took part, in
            the place of the global adapter (`fedsim.federation.broadcast`).
    """

    name: str
    merge: Function
    equal_ranks: bool = False
    sends_stacks: bool = False


RULES: Catalogue[RuleEntry] = Catalogue(
    "aggregate.rule",
    (
        RuleEntry("lowrank", f"{_RULES}.rules:lowrank"),
        RuleEntry("average_factors", f"{_RULES}.rules:average_factors", equal_ranks=True),
        RuleEntry("zero_pad", f"{_RULES}.padded:zero_pad"),
        RuleEntry("hetlora", f"{_RULES}.padded:hetlora"),
        RuleEntry("flexlora", f"{_RULES}.rules:flexlora"),
        RuleEntry("stack", f"{_RULES}.stacked:stack", sends_stacks=True),
    ),
)
"""Rules by the name that ``aggregate.rule`` takes."""


def register_rule(name: str, merge: Function, *, equal_ranks: bool = False, sends_stacks: bool = False) -> None:
    """Make an aggregation rule of your own usable as ``aggregate.rule``, without editing the package.

    Args:
        merge: takes a `fedsim.learn.merge.merging.Merging`, returns the new global adapter.
        equal_ranks, sends_stacks: facts, see `RuleEntry`.
    Raises:
        ConfigError: the name is taken, or `merge` is no function.
    """
    RULES.add(RuleEntry(name, checked_function(f"register_rule: '{name}'", merge), equal_ranks, sends_stacks))


@dataclass(frozen=True)
class CriterionEntry:
    """A criterion by which groups are pruned; exactly one of `estimate` and `static` is given.

    Attributes:
        name: what ``prune.criterion`` takes.
        estimate: scores from the model right after a backward pass; averaged over local iterations.
        static: scores from (backbone, seed, client), once; no gradients, no average.
        cohort: the form of `estimate` for clients that are trained together; without one the reference engine trains.
        watches: whether `estimate` reads inputs of Linears and their gradients, which are then kept for it.
        same_for_all: whether `static` ignores seed and client, so that one result serves the fleet.
        every_linear: whether `estimate` needs a LoRA on every prunable Linear (``model.lora_targets: all``).
    """

    name: str
    estimate: Function | None = None
    static: Function | None = None
    cohort: Function | None = None
    watches: bool = False
    same_for_all: bool = False
    every_linear: bool = False

    @property
    def is_static(self) -> bool:
        """Whether it needs no gradients, so that a device's job holds no work for it."""
        return self.static is not None


CRITERIA: Catalogue[CriterionEntry] = Catalogue(
    "prune.criterion",
    (
        CriterionEntry(
            "lora_guided",
            estimate=f"{_CRITERIA}:lora_guided",
            cohort=f"{_COHORT}:lora_guided_cohort",
            every_linear=True,
        ),
        CriterionEntry(
            "activation_gradient",
            estimate=f"{_CRITERIA}:activation_gradient",
            cohort=f"{_COHORT}:activation_gradient_cohort",
            watches=True,
        ),
        CriterionEntry("magnitude", static=f"{_CRITERIA}:magnitude_of", same_for_all=True),
        CriterionEntry("random", static=f"{_CRITERIA}:random_of"),
    ),
)
"""Criteria by the name that ``prune.criterion`` takes."""


def register_criterion(
    name: str,
    *,
    estimate: Function | None = None,
    static: Function | None = None,
    cohort: Function | None = None,
    watches: bool = False,
    same_for_all: bool = False,
    every_linear: bool = False,
) -> None:
    """Make a criterion of your own usable as ``prune.criterion``, without editing the package.

    Args:
        estimate: from a `fedsim.learn.model.lora.LoraModel` after a backward pass to
            `fedsim.learn.train.importance.GroupScores`; or, in its place:
        static: from (backbone, seed, client) to `GroupScores`.
        cohort: from a `fedsim.learn.cohort.stack.CohortStack` to `fedsim.learn.cohort.scores.CohortScores`.
        watches, same_for_all, every_linear: facts, see `CriterionEntry`.
    Raises:
        ConfigError: the name is taken, what is given is no function, or not exactly one of `estimate` and `static` is.
    """
    what = f"register_criterion: '{name}'"
    if (estimate is None) == (static is None):
        raise ConfigError(f"{what} needs either estimate=... or static=...")
    if cohort is not None and estimate is None:
        raise ConfigError(f"{what}: cohort=... is another form of estimate=..., which is not given")
    for function in (estimate, static, cohort):
        if function is not None:
            checked_function(what, function)
    CRITERIA.add(CriterionEntry(name, estimate, static, cohort, watches, same_for_all, every_linear))


@dataclass(frozen=True)
class ObjectiveEntry:
    """A local objective.

    Attributes:
        name: by which a method's local program names it.
        make: from the run's `fedsim.settings.Config` to the objective.
    """

    name: str
    make: Function


OBJECTIVES: Catalogue[ObjectiveEntry] = Catalogue("objective", ())
"""Local objectives by name."""


def register_objective(name: str, make: Function) -> None:
    """Make a local objective of your own usable by name, without editing the package.

    Args:
        make: from the run's `fedsim.settings.Config` to the objective.
    Raises:
        ConfigError: the name is taken, or `make` is no function.
    """
    OBJECTIVES.add(ObjectiveEntry(name, checked_function(f"register_objective: '{name}'", make)))
