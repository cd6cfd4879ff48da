"""One look for all figures: sizes, colours that colour-blind readers tell apart, captions, and saving."""

from __future__ import annotations

import importlib
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from fedsim.files import atomic_write_bytes
from fedsim.text import csv_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette (2008), without its yellow, which is too light for lines; then five chosen so that any two of
# the twelve stay apart, also as protanopes, deuteranopes and tritanopes see them.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#999933",
    "#8B0000",
    "#4B0082",
    "#C51B7D",
    "#7A5230",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (2, 1)))
# Few bars stay plain; from the seventh on the colours alone are not asked to tell them apart.
HATCHES = ("",) * 6 + ("////", "....", "\\\\\\\\", "xxxx", "----", "||||")
PHASE_COLOURS = {
    "wait": "#BBBBBB",
    "download": "#56B4E9",
    "compute": "#0072B2",
    "upload": "#E69F00",
    "idle": "#E6D3CE",
}


@dataclass(frozen=True)
class Look:
    """How one row (a method and its configuration) is drawn."""

    colour: str
    marker: str
    dashes: Any
    hatch: str

    @property
    def stroke(self) -> dict[str, Any]:
        """Of a line without markers."""
        return {"color": self.colour, "linestyle": self.dashes}

    @property
    def line(self) -> dict[str, Any]:
        """Of a line with a marker at each point."""
        return {**self.stroke, "marker": self.marker}

    @property
    def bar(self) -> dict[str, Any]:
        """Of a filled bar."""
        return {"facecolor": self.colour, "hatch": self.hatch, "edgecolor": "white", "linewidth": 0.0}


Looks = Mapping[str, Look]
"""Looks by row: made once, so that a row looks the same in every figure, whatever else that figure draws."""

Sink = Callable[["Figure", pd.DataFrame, str, str | None], None]
"""Takes a drawn figure, its numbers, its name, and the mark of what is not measured."""

DPI = 160
WIDTH_IN = 6.4
"""Of figures with one panel: two of them fit side by side on a page."""
_CAPTION = "caption"
_LINE_IN = 0.155
_LINES_COUNTED_ON = 3
_CHARACTERS_IN = 13.4
"""Characters of a legend to an inch, at the size of `_SETTINGS`."""
_SETTINGS = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "fedsim",
    "pdf.fonttype": 3,  # whole TrueType fonts (42) cost a third of the time and change no picture
}


def _matplotlib() -> Any:
    """Matplotlib, whatever backend the environment names: a Jupyter kernel's may not be installed here.

    Figures are only written to files, so any backend will do; one that can be used is left to the user's own figures.
    """
    try:
        return importlib.import_module("matplotlib")
    except ValueError:
        backend = os.environ.pop("MPLBACKEND", None)
        if backend is None:
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]  # what the first try left half loaded
        try:
            return importlib.import_module("matplotlib")
        finally:
            os.environ["MPLBACKEND"] = backend


@contextmanager
def canvas(width_in: float, height_in: float) -> Iterator[Figure]:
    """A figure that no window system and no global state of pyplot knows, in the common style."""
    matplotlib = _matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):  # type: ignore[arg-type]
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def caption(figure: Figure, text: str) -> None:
    """Small print under the figure: what a reader must know who sees the figure alone."""
    width_in, height_in = figure.get_size_inches()
    lines = textwrap.wrap(text, int(width_in * 18.5))
    # A long one makes the figure higher: the axes keep the room that their drawing counts on.
    height_in += _LINE_IN * max(0, len(lines) - _LINES_COUNTED_ON)
    figure.set_size_inches(width_in, height_in)
    share = (_LINE_IN * len(lines) + 0.06) / height_in
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(rect=(0.0, share, 1.0, 1.0 - share))  # type: ignore[call-arg]
    look: dict[str, Any] = {"fontsize": 7.5, "color": "#444444", "va": "bottom", "ha": "left", "gid": _CAPTION}
    figure.text(0.008, 0.05 / height_in, "\n".join(lines), **look)


def without_caption(figure: Figure) -> str:
    """Take the caption off a figure that a page will say it under, give its room back, and return its text."""
    taken = [text for text in figure.texts if text.get_gid() == _CAPTION]
    for text in taken:
        text.remove()
        width_in, height_in = figure.get_size_inches()
        spare = _LINE_IN * max(0, text.get_text().count("\n") + 1 - _LINES_COUNTED_ON)
        figure.set_size_inches(width_in, height_in - spare)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(rect=(0.0, 0.0, 1.0, 1.0))  # type: ignore[call-arg]
    return " ".join(" ".join(text.get_text().split()) for text in taken)


def watermark(figure: Figure, word: str) -> None:
    """`word` across the figure, in front of everything, and once more in its upper corner, where none can miss it."""
    look: dict[str, Any] = {"color": COLOURS[1], "fontweight": "bold", "zorder": 1000}
    width_in, height_in = figure.get_size_inches()
    size = 72 * 0.8 * min(width_in / len(word) / 0.7, height_in / 2)
    figure.text(0.5, 0.5, word, fontsize=size, alpha=0.16, rotation=20, ha="center", va="center", **look)
    figure.text(0.995, 0.995, word, fontsize=8, ha="right", va="top", **look)


def settle(figure: Figure, frame: pd.DataFrame, mark: str | None) -> pd.DataFrame:
    """Find the layout once, and mark what is not measured: a watermark on the figure, a column ``engine`` in the table.

    Returns the table.
    """
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)  # without the whole drawing that draw_without_rendering would do after it
    figure.set_layout_engine("none")
    if mark is None:
        return frame
    watermark(figure, mark)
    return frame.assign(engine=mark.lower())


def svg_text(figure: Figure) -> str:
    """The figure as an ``<svg>`` element for a page: no date, no XML head, no background, as wide as its place.

    Identifiers come from the content alone, so that equal ones on a page stand for equal things.
    """
    content = io.StringIO()
    # What the page draws behind, such as the cue that it scrolls, shall show.
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_visible(False)
    figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})  # type: ignore[arg-type]
    text = content.getvalue()
    text = text[text.index("<svg") :].rstrip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)  # the text of every label, which the glyphs show
    text = re.sub(r"\s*\n\s*", "\n", text)
    return re.sub(r'<svg ([^>]*?)width="[^"]*pt"', r'<svg \1role="img"', text, count=1).replace(
        'height="', 'data-height="', 1
    )


def save(figure: Figure, frame: pd.DataFrame, out: Path, name: str, mark: str | None = None) -> list[Path]:
    """Write ``name.png``, ``name.pdf`` and ``name.csv``, without dates, whole or not at all.

    Args:
        mark: what is not measured says so: a watermark on the figure, and a column ``engine`` in the table.
    Raises:
        RunError: full disk, or a folder that cannot be written.
    """
    frame, paths = settle(figure, frame, mark), []
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None, "Producer": None})):
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=DPI, metadata=metadata)  # type: ignore[arg-type]
        atomic_write_bytes(out / f"{name}.{kind}", content.getvalue())
        paths.append(out / f"{name}.{kind}")
    atomic_write_bytes(out / f"{name}.csv", csv_text(frame).encode("utf-8"))
    return [*paths, out / f"{name}.csv"]


def wrapped(label: str, width: int = 34) -> str:
    """A long label (a method and the settings that tell it from its like) in lines, its keys without their sections."""
    short = re.sub(r"\b\w+\.(\w+)=", r"\1=", label)
    short = re.sub(r"(\.\d{4})\d+", r"\1", short)  # 2 ** 0.5 in full is a line of its own
    lines = short.replace(" (", "\n(", 1).split("\n") if len(short) > width else [short]
    return "\n".join(textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in lines)


def columns_that_fit(labels: Sequence[str], width_in: float, most: int = 4) -> int:
    """How many columns of a legend fit over a figure."""
    longest = max((len(line) for label in labels for line in label.split("\n")), default=1)
    return max(1, min(most, len(labels), int(width_in * _CHARACTERS_IN / (longest + 8))))


def legend_in(labels: Sequence[str], columns: int) -> float:
    """Height of a legend beyond the one line that a figure has room for."""
    lines = [label.count("\n") + 1 for label in labels]
    rows = -(-len(labels) // columns)
    return 0.17 * (max((sum(lines[at : at + rows]) for at in range(0, len(lines), rows)), default=1) - 1)


def whole_numbers(axes: Any) -> None:
    """Ticks of a horizontal axis that counts rounds: there is no round 2.5."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def styles(names: Sequence[str]) -> dict[str, Look]:
    """Looks by name. Twelve differ in colour, marker and hatch; then a colour returns with other dashes and marker."""
    looks = {}
    for index, name in enumerate(dict.fromkeys(names)):
        again = index // len(COLOURS)
        looks[name] = Look(
            COLOURS[index % len(COLOURS)],
            MARKERS[(index + again) % len(MARKERS)],
            DASHES[(index + again) % len(DASHES)],
            HATCHES[(index + again) % len(HATCHES)],
        )
    return looks
