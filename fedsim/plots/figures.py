"""The four figures of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fedsim.files import writing
from fedsim.plots import frames
from fedsim.plots.own_figures import OWN_FIGURES
from fedsim.plots.style import (
    COLOURS,
    PHASE_COLOURS,
    WIDTH_IN,
    Looks,
    Sink,
    canvas,
    caption,
    columns_that_fit,
    legend_in,
    save,
    styles,
    whole_numbers,
    wrapped,
)
from fedsim.records.reader import Run
from fedsim.study.belonging import Group, check_together, clock_text, finished_only, group_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SURROGATE = "SURROGATE"
"""The watermark of figures whose losses and accuracies are a fitted model's."""
PANELS = 4
"""Most methods side by side in one row of panels."""


def write_figures(
    runs: Sequence[Run], out: Path, round_for_gantt: int | None = None, order: Sequence[str] = ()
) -> list[Path]:
    """Draw every figure that the runs have records for, each as PNG and PDF with its numbers as CSV.

    ``accuracy_over_time`` (not for timing-only runs; beside it, for language models, ``perplexity_over_time``),
    ``idle_by_class``, ``choices_by_class`` and ``timeline`` (not for
    runs without client records). Methods keep their colour, classes theirs, in all figures. Figures of surrogate runs
    are watermarked.

    Args:
        runs: runs that belong together; unfinished ones are left out.
        out: folder, made if needed.
        round_for_gantt: round of the timeline; None takes the middle one of the shortest run.
        order: labels of the rows (those of `compare`), as they shall follow each other; others come after them.
    Returns:
        The files written.
    Raises:
        RunError: runs of different data, fleets or clocks, or none finished; or `out` cannot be written.
        ConfigError: no such round.
    """
    done, _ = finished_only(runs)
    check_together(done)
    place = {label: index for index, label in enumerate(order)}
    groups = sorted(group_runs(done)[0], key=lambda group: place.get(group.label, len(place)))
    looks = styles([group.label for group in groups])
    text = clock_text(done)
    mark = mark_of(done)
    detailed = frames.with_client_rounds(groups)
    # Every table before the first figure: a wrong round must not leave half of the figures behind.
    timeline = frames.timeline(detailed, round_for_gantt) if detailed else None
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def sink(figure: Figure, frame: pd.DataFrame, name: str, mark: str | None) -> None:
        written.extend(save(figure, frame, out, name, mark))

    if frames.has_accuracy(done):
        draw_accuracy(groups, text, mark, sink, looks)
        if all(run.is_language_model for run in done):
            draw_perplexity(groups, text, mark, sink, looks)
    if timeline is not None:
        classes = frames.class_order(frames.first_client_rounds(detailed))
        draw_idle(detailed, classes, text, mark, sink, looks)
        draw_choices(detailed, classes, text, mark, sink)
        draw_timeline(timeline, text, mark, sink)
    for name, draw in OWN_FIGURES.items():
        with canvas(WIDTH_IN, 3.6) as figure:
            frame = draw(figure, groups)
            caption(figure, text)
            sink(figure, frame, name, mark)
    return written


def mark_of(runs: Sequence[Run]) -> str | None:
    """The watermark that figures of these runs carry; None for measured ones."""
    return SURROGATE if any(run.is_surrogate for run in runs) else None


def draw_accuracy(groups: Sequence[Group], text: str, mark: str | None, sink: Sink, looks: Looks | None = None) -> None:
    """Accuracy against simulated time, one look per row: that of `looks`, where other figures share it."""
    label = "test accuracy (panel mean)" if mark is None else "fitted accuracy (not measured)"
    _draw_over_time(groups, frames.accuracy_over_time(groups), ("accuracy", label), (text, mark, looks), sink)


def draw_perplexity(
    groups: Sequence[Group], text: str, mark: str | None, sink: Sink, looks: Looks | None = None
) -> None:
    """Perplexity against simulated time, one look per row, for runs of language models."""
    label = "test perplexity of responses" if mark is None else "fitted perplexity (not measured)"
    _draw_over_time(groups, frames.perplexity_over_time(groups), ("perplexity", label), (text, mark, looks), sink)


def _draw_over_time(
    groups: Sequence[Group],
    frame: pd.DataFrame,
    quantity: tuple[str, str],
    notes: tuple[str, str | None, Looks | None],
    sink: Sink,
) -> None:
    """One column of `frame` (its name and the axis's label) against ``end_s``; `notes` are caption, mark and looks."""
    (name, label), (text, mark, looks) = quantity, notes
    looks = looks or styles([group.label for group in groups])
    with canvas(WIDTH_IN, 4.2 + _legend_in(groups)) as figure:
        axes = figure.add_subplot()
        several = False
        for group in groups:
            own, look = frame[frame["method"] == group.label], looks[group.label]
            repeats = own.groupby(["seed", "profile_draw"])
            if len(repeats) > 1:
                several = True
                for _, one in repeats:
                    axes.plot(one["end_s"], one[name], color=look.colour, linewidth=0.7, alpha=0.4)
            mean = own.groupby("round")[["end_s", name]].mean()
            axes.plot(mean["end_s"], mean[name], label=wrapped(group.label), markersize=4, **look.line)
        axes.set_xlabel("simulated time (s)")
        axes.set_ylabel(label)
        axes.set_xlim(left=0)
        axes.legend(ncols=_columns(groups), loc="lower center", bbox_to_anchor=(0.5, 1.0))
        caption(figure, ("Bold: mean over seeds by round; thin: each seed. " if several else "") + text)
        sink(figure, frame, f"{name}_over_time", mark)


def draw_idle(
    groups: Sequence[Group],
    classes: Sequence[str],
    text: str,
    mark: str | None,
    sink: Sink,
    looks: Looks | None = None,
) -> None:
    """Idle share by device class and method."""
    frame = frames.idle_by_class(groups)
    looks = looks or styles([group.label for group in groups])
    with canvas(WIDTH_IN, 3.8 + _legend_in(groups)) as figure:
        axes = figure.add_subplot()
        width, highest = 0.8 / len(groups), float(frame["idle_fraction"].max())
        several = False
        for index, group in enumerate(groups):
            own = frame[frame["method"] == group.label].groupby("device")["idle_fraction"]
            mean, low, high = (values.reindex(classes).to_numpy() for values in (own.mean(), own.min(), own.max()))
            at = np.arange(len(classes)) + (index - (len(groups) - 1) / 2) * width
            axes.bar(at, mean, width * 0.92, label=wrapped(group.label), **looks[group.label].bar)
            if len(group.runs) > 1:
                several = True
                bounds = np.vstack([mean - low, high - mean])
                axes.errorbar(at, mean, yerr=bounds, fmt="none", ecolor="#222222", elinewidth=0.9, capsize=2)
            for x, value in zip(at, mean, strict=True):
                if len(groups) * len(classes) <= 16 and not np.isnan(value):
                    on_bar = value > _LOW_BAR * highest
                    look = {**_ON_BAR, "bbox": {"facecolor": looks[group.label].colour, "lw": 0.0, "pad": 0.6}}
                    where, look = ((x, 0), look) if on_bar else ((x, value), _OVER_BAR)
                    axes.annotate(f"{value:.0%}", where, (0, 2), textcoords="offset points", ha="center", **look)
        axes.set_xticks(range(len(classes)), classes)
        axes.grid(axis="x", visible=False)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(_percent())
        axes.set_ylabel("idle share of the round (mean over rounds)")
        axes.legend(ncols=_columns(groups), loc="lower center", bbox_to_anchor=(0.5, 1.0))
        caption(figure, ("Whiskers: lowest and highest seed. " if several else "") + text)
        sink(figure, frame, "idle_by_class", mark)


_ON_BAR: dict[str, Any] = {"fontsize": 7, "color": "white", "fontweight": "bold"}
_OVER_BAR: dict[str, Any] = {**_ON_BAR, "color": "#333333"}
_LOW_BAR = 0.06
"""Of the highest bar: lower ones are no ground for a number."""


def draw_choices(groups: Sequence[Group], classes: Sequence[str], text: str, mark: str | None, sink: Sink) -> None:
    """Asked pruning ratio and rank over rounds, by class: what a policy chose."""
    frame = frames.choices_by_class(groups)
    looks = styles(classes)
    columns = min(len(groups), PANELS)
    blocks = -(-len(groups) // columns)
    quantities = (("prune_ratio_target", "pruning ratio asked"), ("lora_rank", "LoRA rank"))
    with canvas(max(4.5, 2.4 * columns + 0.4), 3.9 * blocks + 0.5) as figure:
        grid = figure.subplots(2 * blocks, columns, sharex=True, squeeze=False)
        top = float(frame["prune_ratio_target_p90"].max())
        for row in range(2 * blocks):
            for column in range(columns):
                axes, index = grid[row, column], row // 2 * columns + column
                if index >= len(groups):
                    axes.set_visible(False)
                    continue
                name, title = quantities[row % 2]
                own = frame[frame["method"] == groups[index].label]
                _draw_choice(axes, own, name, classes, looks)
                if name == "lora_rank":
                    _rank_axis(axes, frame)
                else:
                    axes.set_ylim(-0.03 * max(top, 0.1), 1.08 * max(top, 0.1))  # a line at 0 is seen whole
                if row % 2 == 0:
                    axes.set_title(wrapped(groups[index].label, 26))
                whole_numbers(axes)
                if column == 0:
                    axes.set_ylabel(title)
                else:
                    axes.tick_params(labelleft=False)
                if row == 2 * blocks - 1 or index + columns >= len(groups):
                    axes.set_xlabel("round" if row % 2 else "")
                    axes.tick_params(labelbottom=row % 2 == 1)
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(classes))
        caption(figure, "Lines: mean over a class's clients (and seeds); bands: 10th to 90th percentile. " + text)
        sink(figure, frame, "choices_by_class", mark)


def _draw_choice(axes: Any, frame: pd.DataFrame, name: str, classes: Sequence[str], looks: Looks) -> None:
    for device in classes:
        own, look = frame[frame["device"] == device], looks[device]
        axes.fill_between(own["round"], own[f"{name}_p10"], own[f"{name}_p90"], color=look.colour, alpha=0.15, lw=0)
        axes.plot(own["round"], own[f"{name}_mean"], label=device, **look.stroke)


def _rank_axis(axes: Any, frame: pd.DataFrame) -> None:
    """Ranks are powers of two: a logarithmic axis with a tick at each."""
    low, high = float(frame["lora_rank_p10"].min()), float(frame["lora_rank_p90"].max())
    ticks = 2 ** np.arange(np.floor(np.log2(low)), np.ceil(np.log2(high)) + 1)
    axes.set_yscale("log", base=2)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(ticks[0] / 1.2, ticks[-1] * 1.2)


def draw_timeline(frame: pd.DataFrame, text: str, mark: str | None, sink: Sink, name: str = "timeline") -> None:
    """One round per method as bars, a line per client (rows of `frames.timeline`)."""
    names = list(dict.fromkeys(frame["method"]))
    same = frame["round"].nunique() == 1
    columns = 3 if len(names) == 3 or len(names) > 4 else min(len(names), 2)
    rows = -(-len(names) // columns)
    with canvas(3.6 * columns + 1.4, 2.8 * rows + 0.7) as figure:
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
        handles: dict[str, Any] = {}
        # A legend names what there is to see: nobody waits where the server serves all at once.
        phases = [phase for phase in frames.PHASES if (frame[f"{phase}_s"] > 0).any()]
        # Where each method has a round of its own, other clients take part: each panel then names its classes.
        alike = len({tuple(own["device"]) for _, own in frame.groupby("method")}) == 1
        for index, axes in enumerate(grid.flat):
            if index >= len(names):
                axes.set_visible(False)
                continue
            own = frame[frame["method"] == names[index]].reset_index(drop=True)
            _draw_bars(axes, own, phases, name_classes=not alike or index % columns == 0)
            chosen = int(own["round"].iloc[0])
            axes.set_title(wrapped(names[index] if same else f"{names[index]}, round {chosen}"))
            if index + columns >= len(names):
                axes.tick_params(labelbottom=True)
                axes.set_xlabel("simulated time since the round opened (s)")
            handles |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
        # The panels share their axis: it must reach to the end of the longest round, not of the first one drawn.
        longest_s = frame[[f"{phase}_s" for phase in frames.PHASES]].sum(axis=1).max()
        grid[0, 0].set_xlim(0.0, 1.05 * longest_s)
        names_in_order = [name for name in (*phases, _NOT_OK) if name in handles]
        figure.legend(
            [handles[name] for name in names_in_order], names_in_order, loc="outside upper center", ncols=len(handles)
        )
        which = f"Round {frame['round'].iloc[0]}, seed" if same else "The rounds named above, seed"
        caption(figure, f"{which} {frame['seed'].iloc[0]}; one line per client, slowest class first. " + text)
        sink(figure, frame, name, mark)


def _columns(groups: Sequence[Group]) -> int:
    return columns_that_fit([wrapped(group.label) for group in groups], WIDTH_IN)


def _legend_in(groups: Sequence[Group]) -> float:
    return legend_in([wrapped(group.label) for group in groups], _columns(groups))


_NOT_OK = "ended otherwise than ok"


# Told from the blue and orange of work, and from the pale idle, by more than their lightness.
_HATCHED: dict[str, dict[str, Any]] = {"wait": {"hatch": "xxxx", "edgecolor": "#444444"}}


def _draw_bars(axes: Any, rows: pd.DataFrame, phases: Sequence[str], name_classes: bool) -> None:
    """Phases as steps: one filled outline per phase, since a rectangle per client leaves hairlines between them."""
    edges = np.repeat(np.arange(len(rows) + 1) - 0.5, 2)[1:-1]
    left = np.zeros(len(rows))
    for phase in frames.PHASES:
        right = left + rows[f"{phase}_s"].to_numpy()
        if phase not in phases:
            continue
        look = {"facecolor": PHASE_COLOURS[phase], "lw": 0, **_HATCHED.get(phase, {})}
        axes.fill_betweenx(edges, np.repeat(left, 2), np.repeat(right, 2), label=phase, **look)
        left = right
    failed = rows["outcome"].to_numpy() != "ok"
    if failed.any():
        worked = (left - rows["idle_s"].to_numpy())[failed]
        axes.plot(worked, np.flatnonzero(failed), "x", color=COLOURS[6], markersize=4, mew=1.2, zorder=4, label=_NOT_OK)
    starts = rows.groupby("device", sort=False).head(1).index.to_numpy()
    ends = np.append(starts[1:], len(rows))
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="white", linewidth=2.0)
    axes.set_yticks((starts + ends - 1) / 2, rows["device"].iloc[starts] if name_classes else [])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, decimals=0)
