"""The server's choice of clients: which of those at hand take part. A catalogue, with chance as the built-in rule.

A rule is a function ``choose(candidates, count, context)`` that returns `count` of the candidates. It must depend on
its arguments alone: a resumed run calls it again with the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedsim.contracts.common import IntArray
from fedsim.errors import ConfigError
from fedsim.registry import Catalogue, checked_function
from fedsim.rng import Stream, uniforms


@dataclass(frozen=True)
class SelectionContext:
    """What a rule may go by.

    Attributes:
        seed: the run's root seed.
        round_index: the round that opens, 0-based.
    """

    seed: int
    round_index: int


Choose = Callable[[IntArray, int, SelectionContext], IntArray]
"""`count` of the candidates (shape (N,), ascending), each once, in any order."""


@dataclass(frozen=True)
class SelectionEntry:
    """A rule by the name that ``server.selection`` takes."""

    name: str
    choose: Choose


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


SELECTIONS: Catalogue[SelectionEntry] = Catalogue("server.selection", (SelectionEntry("uniform", uniform),))
"""Rules by the name that ``server.selection`` takes."""


def register_selection(name: str, choose: Choose) -> None:
    """Make a selection rule of your own usable as ``server.selection``, without editing the package.

    Args:
        choose: see `Choose`.
    Raises:
        ConfigError: the name is taken, or `choose` is no function.
    """
    checked_function(f"register_selection: '{name}'", choose)
    SELECTIONS.add(SelectionEntry(name, choose))


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
