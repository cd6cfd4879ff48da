"""Figures of a user's own, written beside the package's by ``fedsim compare --out``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fedsim.errors import ConfigError
from fedsim.study.belonging import Group

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Draw = Callable[["Figure", Sequence[Group]], "pd.DataFrame"]
"""Draws on an empty figure what the rows of a comparison hold (`Group.label`, `Group.runs`); returns the numbers, which
are written beside the picture."""

OWN_FIGURES: dict[str, Draw] = {}
"""By name, which is the files' name too."""

BUILT_IN = ("accuracy_over_time", "perplexity_over_time", "idle_by_class", "choices_by_class", "timeline")


def register_figure(name: str, draw: Draw) -> None:
    """Let every comparison write a figure of your own.

    Raises:
        ConfigError: no name for a file, or one that is taken.
    """
    if not name.isidentifier():
        raise ConfigError(f"register_figure: '{name}' is no name for a file (letters, digits and _)")
    if name in OWN_FIGURES or name in BUILT_IN:
        raise ConfigError(f"register_figure: figure '{name}' exists already; register yours under another name")
    OWN_FIGURES[name] = draw
