"""The server's choice of clients: which of those at hand take part. A catalogue: chance, and rules that go by what is
known of clients (`fedsim.control.selection_rules`).

A rule is a function ``choose(candidates, count, context)`` that returns `count` of the candidates. It must depend on
its arguments alone: a resumed run calls it again with the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.control.client_history import ClientHistory
from fedsim.control.selection_rules import available_fastest, chances, oort, power_of_choice
from fedsim.errors import ConfigError
from fedsim.registry import Catalogue, checked_function
from fedsim.rng import Stream, uniforms


@dataclass(frozen=True)
class SelectionContext:
    """What a rule may go by.

    Attributes:
        seed: the run's root seed.
        round_index: merges so far.
        sent: clients sent off since the last merge: not 0 where a server chooses more than once between two merges.
        history: what is known of clients; None where the rule's entry does not want it.
    """

    seed: int
    round_index: int
    sent: int = 0
    history: ClientHistory | None = None


Choose = Callable[[IntArray, int, SelectionContext], IntArray]
"""`count` of the candidates (shape (N,), ascending), each once, in any order."""


@dataclass(frozen=True)
class SelectionEntry:
    """A rule by the name that ``server.selection`` takes.

    Attributes:
        by_chance: whether all candidates are alike to it, so that a server need not list those at hand.
        needs_history: whether it goes by what is known of clients.
        reads_losses: whether it says nothing without their losses.
    """

    name: str
    choose: Choose
    by_chance: bool = False
    needs_history: bool = False
    reads_losses: bool = False


def uniform(candidates: IntArray, count: int, context: SelectionContext) -> IntArray:
    """Uniformly without replacement: those with the smallest keyed random numbers.

    Whether a client takes part hangs on its own number and the `count` smallest alone.
    """
    draws = uniforms(context.seed, Stream.CLIENT_SAMPLING, candidates, context.round_index)
    # The highest draw that takes part, without sorting the fleet; equal draws go to the lower client numbers.
    highest = np.partition(draws, count - 1)[count - 1]
    below = np.flatnonzero(draws < highest)
    level = np.flatnonzero(draws == highest)[: count - len(below)]
    return candidates[np.sort(np.concatenate([below, level]))]


def _known(context: SelectionContext) -> ClientHistory:
    if context.history is None:
        raise ConfigError("server.selection: this rule goes by what is known of clients, which is not kept here")
    return context.history


def _draws(candidates: IntArray, context: SelectionContext) -> FloatArray:
    return chances(context.seed, candidates, context.round_index, context.sent)


def _oort(candidates: IntArray, count: int, context: SelectionContext) -> IntArray:
    return oort(candidates, count, _known(context), _draws(candidates, context), context.round_index)


def _power_of_choice(candidates: IntArray, count: int, context: SelectionContext) -> IntArray:
    return power_of_choice(candidates, count, _known(context), _draws(candidates, context))


def _available_fastest(candidates: IntArray, count: int, context: SelectionContext) -> IntArray:
    return available_fastest(candidates, count, _known(context), _draws(candidates, context))


SELECTIONS: Catalogue[SelectionEntry] = Catalogue(
    "server.selection",
    (
        SelectionEntry("uniform", uniform, by_chance=True),
        SelectionEntry("oort", _oort, needs_history=True),
        SelectionEntry("power_of_choice", _power_of_choice, needs_history=True, reads_losses=True),
        SelectionEntry("available_fastest", _available_fastest, needs_history=True),
    ),
)
"""Rules by the name that ``server.selection`` takes."""


def register_selection(name: str, choose: Choose, *, needs_history: bool = False) -> None:
    """Make a selection rule of your own usable as ``server.selection``, without editing the package.

    Args:
        choose: see `Choose`.
        needs_history: whether it goes by ``context.history``, which is then kept, and in checkpoints too.
    Raises:
        ConfigError: the name is taken, or `choose` is no function.
    """
    checked_function(f"register_selection: '{name}'", choose)
    SELECTIONS.add(SelectionEntry(name, choose, needs_history=needs_history))


def choose_clients(rule: str, candidates: IntArray, count: int, context: SelectionContext) -> IntArray:
    """The clients that the rule chooses, ascending, shape (count,).

    Args:
        rule: the name that ``server.selection`` gives.
        candidates: ascending, at least `count` of them.
    Raises:
        ConfigError: unknown name, or a rule that does not answer with `count` different candidates.
    """
    chosen = np.unique(np.asarray(SELECTIONS.named(rule).choose(candidates, count, context)))
    if len(chosen) != count or not np.isin(chosen, candidates, assume_unique=True).all():
        raise ConfigError(
            f"server.selection '{rule}' must choose {count} different clients of the {len(candidates)} at hand; in "
            f"round {context.round_index} it chose {len(chosen)}: {_some(chosen)}"
        )
    clients: IntArray = chosen.astype(np.int64)
    return clients


def _some(clients: np.ndarray) -> str:
    shown = ", ".join(map(str, clients[:5].tolist()))
    return f"{shown}, ..." if len(clients) > 5 else shown or "none"
