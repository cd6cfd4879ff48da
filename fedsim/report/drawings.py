"""Figures of a page: drawn by `fedsim.plots`, kept as SVG with their numbers and captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from fedsim.plots.style import WIDTH_IN, settle, svg_text, without_caption
from fedsim.report.html import figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE_IN = 11.8
"""A figure over the whole width of the page, drawn for a window of 1200 pixels."""


@dataclass(frozen=True, eq=False)
class _Drawing:
    svg: str
    frame: pd.DataFrame
    caption: str


class Sketchbook:
    """A sink for figures (`fedsim.plots.style.Sink`) that keeps them by name.

    Args:
        wide: whether they fill the page's width; else two stand side by side.
    """

    def __init__(self, wide: bool = False) -> None:
        self._wide = wide
        self._drawn: dict[str, _Drawing] = {}

    def __call__(self, drawn: Figure, frame: pd.DataFrame, name: str, mark: str | None) -> None:
        """Keep a figure, laid out for its place; what it says in small print is text on the page."""
        caption = without_caption(drawn)
        drawn.set_size_inches(WIDE_IN if self._wide else WIDTH_IN, drawn.get_size_inches()[1])
        frame = settle(drawn, frame, mark)
        self._drawn[name] = _Drawing(svg_text(drawn), frame, caption)

    def html(self, name: str, title: str, caption: str) -> str:
        """The figure of that name, `caption` before its own; nothing where it was not drawn."""
        drawing = self._drawn.get(name)
        if drawing is None:
            return ""
        said = f"{caption} {drawing.caption}"
        return figure(drawing.svg, title, said, name, drawing.frame, "wide" if self._wide else "half")
