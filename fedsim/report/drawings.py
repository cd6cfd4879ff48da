"""Figures of a page: drawn by `fedsim.plots`, kept as SVG with their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from fedsim.plots.style import settle, svg_text
from fedsim.report.html import figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Drawing:
    """One figure, ready for a page."""

    svg: str
    frame: pd.DataFrame

    def html(self, name: str, title: str, caption: str) -> str:
        """The figure with its caption and its CSV."""
        return figure(self.svg, title, caption, name, self.frame)


class Sketchbook:
    """A sink for figures (`fedsim.plots.style.Sink`) that keeps them by name."""

    def __init__(self) -> None:
        self._drawn: dict[str, Drawing] = {}

    def __call__(self, drawn: Figure, frame: pd.DataFrame, name: str, mark: str | None) -> None:
        """Keep a figure."""
        frame = settle(drawn, frame, mark)
        self._drawn[name] = Drawing(svg_text(drawn), frame)

    def html(self, name: str, title: str, caption: str) -> str:
        """The figure of that name; nothing where it was not drawn."""
        drawing = self._drawn.get(name)
        return "" if drawing is None else drawing.html(name, title, caption)
