"""Tables of a report. Numbers come from the comparison and the runs' manifests; nothing is computed anew."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from fedsim.report.html import Cell, table
from fedsim.study.belonging import Group
from fedsim.study.compare import Comparison
from fedsim.study.comparison import (
    PANEL,
    columns_in_need,
    devices_differ,
    number_text,
    scale,
    sparsity_text,
    speedup_text,
    time_text,
)
from fedsim.study.regret import COLD_PARTICIPATIONS

_HASH_SHOWN = 12
_VALUES = 8
"""Most values of one fact that are named."""


def summary_table(comparison: Comparison) -> str:
    """A row per method: what a reader looks at first."""
    rows = comparison.rows
    byte_unit, byte_scale = scale(rows["traffic_bytes"].max(), "B")
    joule_unit, joule_scale = scale(rows["energy_j"].max(), "J")
    target = comparison.target_accuracy
    header = ["method", "seeds"]
    header += [] if target is None else [f"s to accuracy {target:.4g}"]
    header += [f"speedup over {comparison.baseline}"]
    header += [] if target is None else ["final accuracy" + (", SURROGATE" if comparison.is_surrogate else "")]
    header += [] if target is None else [f"points over {comparison.baseline}"]
    uneven = target is not None and devices_differ(rows)
    header += ["consensus"] if uneven else []
    header += ["sparsity (devices)", "total, simulated s", "idle"]
    header += [] if comparison.fastest_class is None else [f"idle of {comparison.fastest_class}"]
    unequal, lossy = columns_in_need(rows)
    header += [*(["rounds"] if unequal else []), *(["updates lost"] if lossy else [])]
    header += [f"traffic, {byte_unit}", f"energy, {joule_unit}", "host time, s"]
    to_target, total, host = (_decimals(rows[name]) for name in ("time_to_target_s", "simulated_s", "host_s"))
    body = []
    for _, row in rows.iterrows():
        cells: list[Cell | str] = [row["method"], _seeds(row)]
        if target is not None:
            cells.append(_time_to_target(row, to_target))
        cells.append(_split(speedup_text(row, comparison.baseline), row["speedup"]))
        if target is not None:
            spread = row["accuracy_final_sd"]
            note = "" if math.isnan(spread) else f"± {spread:.3f}"
            cells.append(Cell(number_text(row["accuracy_final"], ".3f"), float(row["accuracy_final"]), note))
            cells.append(_split(_gain(row, comparison.baseline), row["accuracy_gain"]))
        if uneven:
            consensus = row["accuracy_consensus_final"]
            cells.append(_number(number_text(consensus, ".3f"), consensus))
        cells += [
            _split(sparsity_text(row), row["sparsity"]),
            _seconds(row["simulated_s"], total),
            _number(number_text(row["idle_fraction"], ".1%"), row["idle_fraction"]),
        ]
        if comparison.fastest_class is not None:
            cells.append(_number(number_text(row["idle_fastest_fraction"], ".1%"), row["idle_fastest_fraction"]))
        cells += [Cell(f"{row['rounds']:g}", float(row["rounds"]))] if unequal else []
        cells += [_number(number_text(row["lost_fraction"], ".1%"), row["lost_fraction"])] if lossy else []
        cells += [
            _number(number_text(row["traffic_bytes"] / byte_scale, ".2f"), row["traffic_bytes"]),
            _number(number_text(row["energy_j"] / joule_scale, ".2f"), row["energy_j"]),
            _seconds(row["host_s"], min(host, 1)),
        ]
        body.append(cells)
    caption = (
        "Means over seeds; ± is their standard deviation, [ ] a 95% interval. Times to accuracy are simulated seconds; "
        "host time is this computer's. "
        "Idle: mean over rounds of idle seconds over client seconds."
    ) + (f" {PANEL}" if uneven else "")
    return table(header, body, caption, "sortable dense")


def critical_table(paths: pd.DataFrame, top: int) -> str:
    """The clients that made most rounds slow, of each method."""
    body = []
    counted = paths.groupby(["method", "seed", "profile_draw"])["round"].transform("size")
    for (method, client, device), own in paths.assign(of=counted).groupby(["method", "client", "device"], sort=False):
        causes = own["cause"].value_counts()
        rounds = int(paths["method"].eq(method).sum())
        body.append(
            (method, client, device, len(own), len(own) / rounds, causes, (own["busy_s"] / own["median_busy_s"]))
        )
    ranked = pd.DataFrame(body, columns=["method", "client", "device", "rounds", "share", "causes", "slower"])
    ranked = ranked.sort_values(["rounds", "client"], ascending=[False, True]).groupby("method", sort=False).head(top)
    order = {name: place for place, name in enumerate(dict.fromkeys(paths["method"]))}
    ranked = ranked.sort_values("method", key=lambda names: names.map(order), kind="stable")
    rows = [
        [
            row["method"],
            Cell(str(row["client"]), row["client"]),
            row["device"],
            Cell(str(row["rounds"]), row["rounds"]),
            Cell(f"{row['share']:.1%}", row["share"]),
            ", ".join(f"{cause} {times}" for cause, times in row["causes"].items()),
            Cell(f"{row['slower'].mean():.2f}", row["slower"].mean()),
        ]
        for _, row in ranked.iterrows()
    ]
    header = ["method", "client", "device", "rounds it made slow", "share of rounds", "held up by", "times the median"]
    return table(header, rows, f"The {top} clients of each method that were last in most rounds, over all seeds.")


def structure_table(frame: pd.DataFrame) -> str:
    """Kept head groups and channels by method and layer."""
    rows: list[list[Cell | str]] = [
        [
            str(row["method"]),
            Cell(str(row["layer"]), row["layer"]),
            *(
                _number(f"{row[f'{kind}_mean']:.1f} of {row[kind]}", row[f"{kind}_mean"])
                if what == "mean"
                else Cell(f"{row[f'{kind}_low']} to {row[f'{kind}_high']}", row[f"{kind}_low"])
                for kind in ("heads", "channels")
                for what in ("mean", "range")
            ),
        ]
        for _, row in frame.iterrows()
    ]
    header = ["method", "layer", "head groups, mean", "over clients", "FFN channels, mean", "over clients"]
    return table(header, rows, "What the devices keep at the end, first seed.")


def regret_table(frame: pd.DataFrame, runs: Mapping[str, int]) -> str:
    """Mean regret of each method (rows of `fedsim.plots.controllers.means`): its parts, and their sum.

    Args:
        runs: how many runs each method has; more than were judged are told.
    """
    rows = []
    for _, row in frame.iterrows():
        judged, rest = int(row["runs"]), row["rounds"] - row["warmup_rounds"] - row["cold_start_rounds"]
        spread = row["total_sd"]
        rows.append(
            [
                row["method"],
                Cell(f"{judged}" if judged == runs[row["method"]] else f"{judged} of {runs[row['method']]}", judged),
                _regret(row["warmup_s"], row["warmup_rounds"]),
                _regret(row["cold_start_s"], row["cold_start_rounds"]),
                _regret(row["settled_s"], rest),
                Cell(f"{row['total_s']:.1f}", row["total_s"], "" if math.isnan(spread) else f"± {spread:.1f}"),
                _number(f"{row['relative']:.1%}", row["relative"]),
                _number(number_text(row["settled_s_per_round"], ".2f"), row["settled_s_per_round"]),
            ]
        )
    header = ["method", "runs", "warm-up, s", "cold start, s", "settled, s", "total, s", "of the oracle's time"]
    caption = (
        "Simulated seconds lost against the oracle at the same mean ratio, jitter left out: means over the judged runs "
        "(one for each seed), ± their standard deviation. Warm-up, cold start and settled add up to the total, up to "
        f"rounding. Cold start: from the first round that may prune until each device has taken part "
        f"{COLD_PARTICIPATIONS} times on average; to policies that learn nothing it is a span of rounds like any other."
    )
    return table([*header, "settled, s a round"], rows, caption)


def _regret(seconds: float, rounds: float) -> Cell:
    """Seconds lost in so many rounds; no number where there are none."""
    if rounds <= 0:
        return Cell("-", math.nan, "no round")
    return Cell(f"{seconds:.1f}", seconds, f"{rounds:.0f} round{'' if rounds == 1 else 's'}")


def runs_table(groups: Sequence[Group]) -> str:
    """Every run: where it lies and what made it. Draws of the device profiles have a column where there are any."""
    drawn = any(draw >= 0 for group in groups for _, draw in group.runs)
    manifests = [run.manifest for group in groups for run in group.runs.values()]
    simulated, host = (_decimals([one.get(name) for one in manifests]) for name in ("simulated_s", "host_s"))
    rows: list[list[Cell | str]] = []
    for group in groups:
        for (seed, draw), run in group.runs.items():
            manifest = run.manifest
            git = manifest.get("git") or {}
            commit = str(git.get("commit") or "-")[:_HASH_SHOWN] + (" (dirty)" if git.get("dirty") else "")
            rows.append(
                [
                    group.label,
                    Cell(str(seed), seed),
                    *(["-" if draw < 0 else str(draw)] if drawn else []),
                    str(manifest.get("engine", "-")),
                    _seconds(manifest.get("simulated_s"), simulated),
                    _seconds(manifest.get("host_s"), host),
                    _share(manifest.get("controller_host_s"), manifest.get("host_s")),
                    str(manifest.get("config_hash", "-"))[:_HASH_SHOWN],
                    str(manifest.get("trace_hash", "-"))[:_HASH_SHOWN],
                    commit,
                    str(run.path),
                ]
            )
    header = ["method", "seed", *(["profile draw"] if drawn else [])]
    header += ["engine", "simulated s", "host s", "controller's share", "config", "trace", "commit", "folder"]
    return table(header, rows, f"Hashes by their first {_HASH_SHOWN} digits.")


def facts_table(manifests: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """A row per key of the manifests; where runs differ, all values."""
    rows = []
    for key in keys:
        held = [manifest[key] for manifest in manifests if manifest.get(key) is not None]
        flat = [flattened({key: "; ".join(map(str, one)) if isinstance(one, list) else one}) for one in held]
        parts = []
        for name in dict.fromkeys(name for facts in flat for name in facts):
            values = list(dict.fromkeys(facts[name] for facts in flat if name in facts))
            shown = " or ".join(values[:_VALUES]) + (
                f" or {len(values) - _VALUES} more" if len(values) > _VALUES else ""
            )
            parts.append(f"{name.removeprefix(key).lstrip('.')} {shown}".strip())
        if parts:
            rows.append([key, ", ".join(parts)])
    return table(["fact", "value"], rows, "From the manifests; several values where runs differ.", kind="")


def config_tables(groups: Sequence[Group]) -> tuple[str, str]:
    """Keys in which the groups differ (a column each), and those that all share."""
    flat = [flattened(next(iter(group.runs.values())).config) for group in groups]
    names = [name for name in dict.fromkeys(name for one in flat for name in one) if name != "seed"]
    shared = [name for name in names if len({one.get(name) for one in flat}) == 1]
    header = ["key", *(group.label for group in groups)]
    differing = [[name, *(one.get(name, "-") for one in flat)] for name in names if name not in shared]
    return (
        table(header, differing, "Keys in which the methods differ.", kind="plain") if differing else "",
        table(
            ["key", "value"], [[name, flat[0][name]] for name in shared], "Keys that all share; seeds aside.", kind=""
        ),
    )


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys and values as text."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _seeds(row: Any) -> Cell:
    seeds = row["seeds"]
    text = ", ".join(map(str, seeds)) if len(seeds) <= 6 else f"{len(seeds)} ({seeds[0]} to {seeds[-1]})"
    more = f", {row['runs']} runs" if row["runs"] > len(seeds) else ""
    return Cell(text + more, len(seeds))


def _gain(row: Any, baseline: str) -> str:
    if row["method"] == baseline:
        return "baseline"
    if math.isnan(row["accuracy_gain"]):
        return "-"
    text = f"{100 * row['accuracy_gain']:+.1f}"
    if math.isnan(row["accuracy_gain_low"]):
        return f"{text} [no interval]"
    return f"{text} [{100 * row['accuracy_gain_low']:+.1f}, {100 * row['accuracy_gain_high']:+.1f}]"


def _decimals(values: Iterable[float | None]) -> int:
    """Decimals for a column of seconds: three digits of its least number, but no more than five of its largest."""
    known = [abs(float(one)) for one in values if one is not None and math.isfinite(one) and one != 0]
    if not known:
        return 0
    low, high = (math.floor(math.log10(edge)) for edge in (min(known), max(known)))
    return max(0, min(2 - low, 4 - high))


def _seconds(value: float | None, decimals: int) -> Cell:
    """A number of a column of seconds."""
    if value is None or math.isnan(value):
        return Cell("-", math.nan)
    return Cell(f"{value:,.{decimals}f}", float(value))


def _share(part: Any, whole: Any) -> Cell:
    """Of two host times; runs of earlier versions did not count the controller's."""
    if part is None or not whole:
        return Cell("-", math.nan)
    share = float(part) / float(whole)
    return Cell(f"{share:.2%}" if share < 0.1 else f"{share:.0%}", share)


def _split(text: str, value: float) -> Cell:
    """A number whose interval, range or count stands under it."""
    for bracket in (" [", " ("):
        if bracket in text:
            first, _, rest = text.partition(bracket)
            return Cell(first, float(value), bracket.strip() + rest)
    return Cell(text, float(value))


def _time_to_target(row: Any, decimals: int) -> Cell:
    """The time, and under it how many runs reached the target, or else how exactly the time is known."""
    if row["reached"] == 0:
        return Cell(time_text(row), math.nan)
    cell = _seconds(row["time_to_target_s"], decimals)
    if row["reached"] < row["runs"]:
        return replace(cell, note=f"({row['reached']} of {row['runs']})")
    known_to = _seconds(row["time_known_to_s"], decimals)
    return cell if math.isnan(row["time_known_to_s"]) else replace(cell, note=f"known to {known_to.text}")


def _number(text: str, value: float) -> Cell:
    return Cell(text, float(value))
