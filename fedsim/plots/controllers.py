"""Two figures about controllers: seconds lost against the oracle, and the arms of every device over time."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fedsim.errors import RunError
from fedsim.files import atomic_write_text, writing
from fedsim.plots import frames
from fedsim.plots.choice import policy_facts_of
from fedsim.plots.figures import PANELS, SURROGATE
from fedsim.plots.style import (
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
from fedsim.study.belonging import Group, check_together, clock_text, group_runs
from fedsim.study.regret import COLD_PARTICIPATIONS, Regret, regret
from fedsim.text import csv_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHORT = 26
"""Longest name, in characters, that fits a panel's title."""
_ARM_COLUMNS = [
    "round",
    "client",
    "device",
    "prune_ratio_target",
    "lora_rank",
    "oracle_ratio",
    "oracle_rank",
    "expected_s",
    "regret_s",
]


def write_regret_figures(runs: Sequence[Run], out: Path) -> list[Path]:
    """Draw ``cumulative_regret`` (all runs) and ``arms_over_time`` (each method's first run), each with its CSV.

    Runs that recorded no clients are left out. Beside the CSV of the figures stands ``regret_summary.csv``, a row per
    run: its regret and the parts that add up to it.

    Args:
        runs: runs that belong together (same data, fleet and clock).
        out: folder, made if needed.
    Returns:
        The files written.
    Raises:
        RunError: runs that do not belong together or of which none recorded its clients; or `out` cannot be written.
    """
    check_together(runs)
    begun = [run for run in runs if run.has("client_rounds") and len(run.rounds)]
    if not begun:
        raise RunError("no regret to draw: none of the runs has recorded a round of its clients")
    groups = _named_shortly(group_runs(begun)[0])
    known = {run.path: regret(run) for group in groups for run in group.runs.values()}
    text = clock_text(begun)
    unfinished = sum(not run.finished for run in begun)
    if unfinished:
        text += f" {unfinished} of {len(begun)} runs unfinished."
    mark = SURROGATE if any(run.is_surrogate for run in begun) else None
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        table = summary(groups, known)
        atomic_write_text(out / "regret_summary.csv", csv_text(table))
    written = [out / "regret_summary.csv"]

    def sink(figure: Figure, frame: pd.DataFrame, name: str, mark: str | None) -> None:
        written.extend(save(figure, frame, out, name, mark))

    draw_cumulative_regret(groups, known, text, mark, sink)
    _draw_arms(groups, known, text, mark, sink)
    return written


def summary(groups: Sequence[Group], known: Mapping[Path, Regret]) -> pd.DataFrame:
    """A row per run that `known` holds: ``method seed profile_draw`` and its regret in simulated seconds.

    ``warmup_s``, ``cold_start_s`` and ``settled_s`` (the rounds before, in and after the cold start) add up to
    ``total_s``; ``settled_s_per_round`` is NaN where no round is left after the cold start.
    """
    rows = []
    for group in groups:
        for (seed, draw), run in group.runs.items():
            if run.path not in known:
                continue
            own = known[run.path]
            rows.append(
                {
                    "method": group.label,
                    "seed": seed,
                    "profile_draw": draw,
                    "total_s": own.total_s,
                    "relative": own.relative,
                    "rounds": len(own.rounds),
                    "warmup_s": own.warmup_s,
                    "warmup_rounds": min(own.cold_start_first_round, len(own.rounds)),
                    "cold_start_s": own.cold_start_s,
                    "cold_start_rounds": own.cold_start_rounds,
                    "settled_s": own.total_s - own.warmup_s - own.cold_start_s,
                    "settled_s_per_round": own.settled_s_per_round,
                }
            )
    return pd.DataFrame(rows)


def means(runs: pd.DataFrame) -> pd.DataFrame:
    """Means over a method's runs (rows of `summary`): its columns, ``runs``, and ``total_sd`` (NaN of a single run)."""
    grouped = runs.groupby("method", sort=False)
    table = grouped.mean(numeric_only=True).drop(columns=["seed", "profile_draw"])
    return table.assign(runs=grouped.size(), total_sd=grouped["total_s"].std(ddof=1)).reset_index()


def _named_shortly(groups: Sequence[Group]) -> list[Group]:
    """Groups by method, or by policy where that alone tells them apart; a policy brings other keys of its own."""
    policies = [str(next(iter(group.runs.values())).config["control"]["policy"]) for group in groups]
    if len({group.method for group in groups}) == len(groups):
        return [replace(group, label=group.method) for group in groups]
    if len({group.method for group in groups}) == 1 and len(set(policies)) == len(groups):
        return [replace(group, label=policy) for group, policy in zip(groups, policies, strict=True)]
    return list(groups)


def draw_cumulative_regret(
    groups: Sequence[Group],
    known: Mapping[Path, Regret],
    text: str,
    mark: str | None,
    sink: Sink,
    looks: Looks | None = None,
) -> None:
    """Seconds lost against the oracle, added up over rounds; runs that `known` does not hold are left out.

    The cold start is marked of controllers that learn: to others no device is new.

    Args:
        known: regret of at least one run, by the run's path.
    """
    tables = []
    for group in groups:
        for (seed, draw), run in group.runs.items():
            if run.path not in known:
                continue
            own = known[run.path].rounds
            tables.append(
                pd.DataFrame({"method": group.label, "seed": seed, "profile_draw": draw}, own.index).join(own)
            )
    frame = pd.concat(tables, ignore_index=True)
    groups = [group for group in groups if group.label in set(frame["method"])]
    looks = looks or styles([group.label for group in groups])
    learn = {group.label for group in groups if policy_facts_of(group).explores}
    names = [wrapped(group.label) for group in groups] + [_COLD] * bool(learn)
    columns = columns_that_fit(names, WIDTH_IN)
    with canvas(WIDTH_IN, 4.2 + legend_in(names, columns)) as figure:
        axes = figure.add_subplot()
        for place, group in enumerate(groups):
            own, look = frame[frame["method"] == group.label], looks[group.label]
            repeats = own.groupby(["seed", "profile_draw"])
            if len(repeats) > 1:
                for _, one in repeats:
                    axes.plot(one["round"], one["cumulative_regret_s"], color=look.colour, linewidth=0.7, alpha=0.4)
            mean = own.groupby("round")["cumulative_regret_s"].mean()
            # A few markers, each line's at rounds of its own, tell apart what colour and dashes do not.
            every = max(1, len(mean) // _MARKS)
            marks: dict[str, Any] = {"markevery": (place * every // len(groups), every)}
            axes.plot(mean.index, mean, label=wrapped(group.label), markersize=4, **look.line, **marks)
            if group.label in learn:
                _draw_cold_start(axes, mean, next(known[run.path] for run in group.runs.values() if run.path in known))
        axes.set_xlabel("round")
        axes.set_ylabel("simulated seconds lost against the oracle")
        axes.set_xlim(0, max(1, frame["round"].max()))
        whole_numbers(axes)
        handles, labels = axes.get_legend_handles_labels()
        named = dict(zip(labels, handles, strict=True))
        named |= {_COLD: named.pop(_COLD)} if _COLD in named else {}  # last, and once for all methods
        axes.legend(named.values(), named, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        caption(
            figure,
            "Expected times, jitter left out; the oracle at each run's own mean ratio. "
            f"{COLD_TEXT if learn else ''}{_seeds_text(frame)}{text}",
        )
        sink(figure, frame, "cumulative_regret", mark)


_COLD = "cold start"
_MARKS = 6
COLD_TEXT = (
    "Broad and pale: the cold start of controllers that learn, from the first round that may prune until each device "
    f"has taken part {COLD_PARTICIPATIONS} times on average. "
)


def _draw_cold_start(axes: Any, mean: pd.Series, own: Regret) -> None:
    """Under a method's own line: methods that warm up begin theirs later than others."""
    first = own.cold_start_first_round
    cold = mean.loc[first : first + own.cold_start_rounds - 1]
    if len(cold):
        axes.plot(cold.index, cold, color="#BBBBBB", linewidth=7, alpha=0.6, zorder=1, label=_COLD)


def _seeds_text(frame: pd.DataFrame) -> str:
    if frame.groupby("method")[["seed", "profile_draw"]].value_counts().groupby("method").size().max() > 1:
        return "Bold: mean over seeds; thin: each seed. "
    seeds = sorted(frame["seed"].unique())
    return f"One seed: {seeds[0]}. " if len(seeds) == 1 else "One seed of each method. "


def _draw_arms(groups: Sequence[Group], known: dict[Path, Regret], text: str, mark: str | None, sink: Sink) -> None:
    firsts = [(group, *next(iter(group.runs.items()))) for group in groups]
    classes = frames.class_order(frames.first_client_rounds(groups))
    tables = []
    for group, (seed, _), run in firsts:
        own = known[run.path].arms[_ARM_COLUMNS]
        tables.append(pd.DataFrame({"method": group.label, "seed": seed}, own.index).join(own))
    frame = pd.concat(tables, ignore_index=True)
    columns = min(len(groups), PANELS)
    blocks = -(-len(groups) // columns)
    ranks = sorted(int(rank) for rank in frame["lora_rank"].unique())
    quantities: tuple[tuple[str, str, float | list[int]], ...] = (
        ("prune_ratio_target", "pruning ratio asked", max(0.01, float(frame["prune_ratio_target"].max()))),
        ("lora_rank", "LoRA rank", ranks),
    )
    with canvas(max(4.5, 2.3 * columns + 1.2), 4.2 * blocks + 0.5) as figure:
        grid = figure.subplots(2 * blocks, columns, sharex=True, squeeze=False)
        for kind, (name, title, levels) in enumerate(quantities):
            for row, first in zip(grid[kind::2], range(0, len(groups), columns), strict=True):
                image: Any = None
                for axes, place in zip(row, range(first, first + columns), strict=True):
                    if place >= len(groups):
                        axes.set_visible(False)
                        continue
                    own = frame[frame["method"] == groups[place].label]
                    image = _draw_map(axes, own, name, classes, levels, name_classes=place == first)
                    if kind == 0:
                        axes.set_title(textwrap.fill(groups[place].label, _SHORT))
                    elif place + columns >= len(groups):
                        axes.tick_params(labelbottom=True)
                        axes.set_xlabel("round")
                bar = figure.colorbar(image, ax=list(row), label=title)
                if isinstance(levels, list):
                    bar.set_ticks([float(step) for step in range(len(levels))], labels=[f"{rank}" for rank in levels])
        seeds = ", ".join(dict.fromkeys(f"{seed}" for _, (seed, _), _ in firsts))
        caption(
            figure,
            f"One line per device, slowest class on top; blank: not taking part. First seed of each: {seeds}. {text}",
        )
        sink(figure, frame, "arms_over_time", mark)


def _draw_map(
    axes: Any, own: pd.DataFrame, name: str, classes: Sequence[str], levels: float | Sequence[int], name_classes: bool
) -> Any:
    """Devices by rounds, one quantity as colour: from 0 to `levels`, or one step of colour for each of `levels`."""
    from matplotlib import colormaps

    table = own.pivot(index="client", columns="round", values=name)
    table = table.reindex(columns=range(int(own["round"].max()) + 1))
    device = own.groupby("client")["device"].first()
    order = sorted(table.index, key=lambda client: (classes.index(device[client]), client))
    values = table.loc[order].to_numpy(dtype=np.float64)
    if isinstance(levels, float):
        look = {"cmap": colormaps["viridis"], "vmin": 0.0, "vmax": levels}
    else:
        values = np.where(np.isnan(values), np.nan, np.searchsorted(levels, np.nan_to_num(values)))
        look = {"cmap": colormaps["cividis"].resampled(len(levels)), "vmin": -0.5, "vmax": len(levels) - 0.5}
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **look)
    axes.grid(visible=False)
    counts = device.value_counts().reindex([one for one in classes if one in set(device)]).to_numpy()
    ends = np.cumsum(counts)
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white", linewidth=1.5)
    names = [one for one in classes if one in set(device)]
    axes.set_yticks(ends - (counts + 1) / 2, names if name_classes else [])
    axes.tick_params(axis="y", length=0)
    return image
