"""Figures of a report beside those of `fedsim.plots.figures`: speedups, critical path, resources, structure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedsim.plots.style import WIDTH_IN, Looks, Sink, canvas, caption, columns_that_fit, legend_in, styles, wrapped
from fedsim.study.comparison import scale
from fedsim.study.critical import CAUSES

_HATCHES = {"compute": "", "link": "////", "wait": "...."}
_BAR_IN = 0.34
_GREY = "#555555"
# Of no row: these bars stand beside their names, and must not read as another figure's colours.
_BAR, _BASE_BAR = "#8FA3B8", "#5A6470"


def draw_speedups(frame: pd.DataFrame, of: str, baseline: str, text: str, mark: str | None, sink: Sink) -> None:
    """A bar per method (rows of `summary_frames.speedups`); whiskers are 95% intervals, where there are any.

    The numbers stand in a column beside the axes: at a bar's or whisker's end they would read as its position.

    Args:
        of: what is faster, such as "time to accuracy 0.9".
    """
    with canvas(WIDTH_IN, _height_in(frame["method"]) + 1.6) as figure:
        axes = figure.add_subplot()
        top = np.nanmax([1.0, *frame["speedup"], *frame["speedup_high"]])
        for place, (_, row) in enumerate(frame.iterrows()):
            value = row["speedup"]
            if not np.isnan(value):
                axes.barh(place, value, height=0.62, color=_BASE_BAR if row["is_baseline"] else _BAR)
                if not np.isnan(row["speedup_low"]) and not row["is_baseline"]:
                    span = [[value - row["speedup_low"]], [row["speedup_high"] - value]]
                    axes.errorbar(value, place, xerr=span, fmt="none", ecolor="#222222", elinewidth=1.0, capsize=3)
            at: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
            axes.annotate(_speedup_said(row), (1.0, place), (6, 0), va="center", fontsize=8, **at)
        axes.axvline(1.0, color=_GREY, linewidth=0.8, linestyle="--")
        _rows_named(axes, frame["method"])
        axes.set_xlim(0, top * 1.05)
        axes.set_xlabel(textwrap.fill(f"speedup over {baseline}: {of}", 55))
        caption(figure, "Paired by seed, geometric mean; whiskers: 95% bootstrap interval over seeds. " + text)
        sink(figure, frame, "speedup", mark)


def _speedup_said(row: Any) -> str:
    """The number of a row, its interval, or why there is none."""
    if np.isnan(row["speedup"]):
        return "not reached" if row["reached"] == 0 and row["runs"] else "no pair"
    if row["is_baseline"]:
        return f"{row['speedup']:.2f}x, baseline"
    if np.isnan(row["speedup_low"]):
        return f"{row['speedup']:.2f}x, no interval"
    return f"{row['speedup']:.2f}x [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"


def draw_critical(frame: pd.DataFrame, classes: Sequence[str], text: str, mark: str | None, sink: Sink) -> None:
    """Share of rounds that each class made slow, by cause (rows of `summary_frames.critical_counts`)."""
    from matplotlib.patches import Patch

    methods = list(dict.fromkeys(frame["method"]))
    looks = styles(classes)
    with canvas(WIDTH_IN, _height_in(methods) + 1.7) as figure:
        axes = figure.add_subplot()
        shares = frame.set_index(["method", "device", "cause"])["share"]
        for place, method in enumerate(methods):
            left = 0.0
            for device in classes:
                for cause in CAUSES:
                    width = float(shares.get((method, device, cause), 0.0))
                    if width > 0:
                        look: dict[str, Any] = {
                            "color": looks[device].colour,
                            "hatch": _HATCHES[cause],
                            "edgecolor": "white",
                        }
                        axes.barh(place, width, left=left, height=0.66, linewidth=0.0, **look)
                        left += width
        handles: list[Any] = [Patch(facecolor=looks[device].colour, label=device) for device in classes]
        present = [cause for cause in CAUSES if cause in set(frame["cause"])]
        handles += [
            Patch(facecolor="#999999", hatch=_HATCHES[cause], edgecolor="white", label=cause) for cause in present
        ]
        columns = columns_that_fit([handle.get_label() for handle in handles], WIDTH_IN)
        _rows_named(axes, methods)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(_percent())
        axes.set_xlabel("share of rounds: class of the last to finish, and cause")
        figure.legend(handles=handles, loc="outside upper center", ncols=columns)
        caption(figure, "All seeds. Cause: where that client exceeds the round's median client most. " + text)
        sink(figure, frame, "critical_path", mark)


def draw_resources(frame: pd.DataFrame, classes: Sequence[str], text: str, mark: str | None, sink: Sink) -> None:
    """Traffic, energy and the highest memory use by method and class (rows of `summary_frames.resources`)."""
    methods = list(dict.fromkeys(frame["method"]))
    names = [name for name in [*classes, "all"] if name in set(frame["device"])]
    looks = styles(names)
    with canvas(8.6, _height_in(methods) + 1.8) as figure:
        left_axes, middle, right = figure.subplots(1, 3, sharey=True)
        own = frame.assign(traffic=frame["bytes_down"] + frame["bytes_up"])
        for axes, quantity, unit in ((left_axes, "traffic", "B"), (middle, "energy_j", "J")):
            totals = own.pivot_table(index="method", columns="device", values=quantity, sort=False).reindex(methods)
            prefix, factor = scale(float(totals.sum(axis=1).max()), unit)
            left = np.zeros(len(methods))
            for name in names:
                width = totals[name].fillna(0.0).to_numpy() / factor
                axes.barh(range(len(methods)), width, left=left, height=0.66, color=looks[name].colour)
                left += width
            axes.set_xlabel(f"{'traffic, both ways' if unit == 'B' else 'energy'} ({prefix})")
        prefix, factor = scale(float(own["peak_memory_bytes"].max()), "B")
        for name in names:
            mine = own[own["device"] == name]
            places = [methods.index(method) for method in mine["method"]]
            look = {**looks[name].line, "linestyle": "none"}
            right.plot(mine["peak_memory_bytes"] / factor, places, label=name, **look)
        right.set_xlabel(f"highest memory use ({prefix})")
        largest = float(own["peak_memory_bytes"].max())
        right.set_xlim(0, 1.1 * largest / factor if largest > 0 else 1)
        _rows_named(left_axes, methods)
        handles, labels = right.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(names))
        caption(figure, "Totals of a run, mean over seeds; memory: the highest of any client and round. " + text)
        sink(figure, frame, "resources", mark)


def draw_structures(frame: pd.DataFrame, text: str, mark: str | None, sink: Sink, looks: Looks | None = None) -> None:
    """Kept share of heads and channels by layer (rows of `summary_frames.structures`); bands: all clients."""
    methods = list(dict.fromkeys(frame["method"]))
    looks = looks or styles(methods)
    layers = int(frame["layer"].max()) + 1
    labels = [wrapped(method) for method in methods]
    columns = columns_that_fit(labels, WIDTH_IN)
    with canvas(WIDTH_IN, 3.6 + legend_in(labels, columns)) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, kind in zip(panels, ("heads", "channels"), strict=True):
            for place, method in enumerate(methods):
                own = frame[frame["method"] == method]
                # Side by side within a layer: methods at one sparsity would hide each other.
                at = own["layer"] + (place - (len(methods) - 1) / 2) * 0.6 / max(len(methods), 2)
                low, mean, high = (own[f"{kind}_{what}"] / own[kind] for what in ("low", "mean", "high"))
                look = looks[method]
                axes.errorbar(
                    at,
                    mean,
                    yerr=np.vstack([mean - low, high - mean]),
                    fmt=look.marker,
                    color=look.colour,
                    markersize=4,
                    elinewidth=1.0,
                    capsize=2,
                    label=labels[place],
                )
            axes.set_title(f"{'head groups' if kind == 'heads' else 'FFN channels'} ({own[kind].iloc[0]} a layer)")
            axes.set_xlabel("layer")
            axes.set_xticks(range(0, layers, max(1, layers // 8)))
            axes.set_xlim(-0.5, layers - 0.5)
            axes.set_ylim(0, 1.05)
            axes.yaxis.set_major_formatter(_percent())
        panels[0].set_ylabel("kept at the end")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=columns)
        caption(figure, "Mean over clients, first seed; whiskers: the client that keeps least and most. " + text)
        sink(figure, frame, "structure", mark)


def _height_in(names: Sequence[str]) -> float:
    """Room for a bar per name, all as high as the longest name needs."""
    lines = max(len(wrapped(name).split("\n")) for name in names)
    return max(_BAR_IN, 0.17 * lines + 0.06) * len(names)


def _rows_named(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [wrapped(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, decimals=0)
