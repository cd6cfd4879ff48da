"""Tables of a report. Numbers come from the comparison and the runs' manifests; nothing is computed anew."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fedsim.experiment.belonging import Group
from fedsim.experiment.compare import Comparison
from fedsim.experiment.comparison_text import number_text, scale, sparsity_text, speedup_text, time_text
from fedsim.experiment.progress import seconds_text
from fedsim.report.html import Cell, table

_HASH_SHOWN = 12


def summary_table(comparison: Comparison) -> str:
    """A row per method: what a reader looks at first."""
    rows = comparison.rows
    byte_unit, byte_scale = scale(rows["traffic_bytes"].max(), "B")
    joule_unit, joule_scale = scale(rows["energy_j"].max(), "J")
    target = comparison.target_accuracy
    header = ["method", "seeds"]
    header += [] if target is None else [f"simulated s to accuracy {target:.4g}"]
    header += [f"speedup over {comparison.baseline} [95%]"]
    header += [] if target is None else ["accuracy, final" + (", SURROGATE" if comparison.is_surrogate else "")]
    header += [] if target is None else [f"points over {comparison.baseline} [95%]"]
    header += ["sparsity, mean (devices)", "total, simulated s", "idle"]
    header += [] if comparison.fastest_class is None else [f"idle, {comparison.fastest_class}"]
    header += [f"traffic, {byte_unit}", f"energy, {joule_unit}", "host time, s"]
    body = []
    for _, row in rows.iterrows():
        cells: list[Cell | str] = [row["method"], _seeds(row)]
        if target is not None:
            cells.append(_number(time_text(row), row["time_to_target_s"]))
        cells.append(_number(speedup_text(row, comparison.baseline), row["speedup"]))
        if target is not None:
            spread = row["accuracy_final_sd"]
            accuracy = number_text(row["accuracy_final"], ".3f") + ("" if math.isnan(spread) else f" ± {spread:.3f}")
            cells.append(_number(accuracy, row["accuracy_final"]))
            cells.append(_number(_gain(row, comparison.baseline), row["accuracy_gain"]))
        cells += [
            _number(sparsity_text(row), row["sparsity"]),
            _number(seconds_text(row["simulated_s"]), row["simulated_s"]),
            _number(number_text(row["idle_fraction"], ".1%"), row["idle_fraction"]),
        ]
        if comparison.fastest_class is not None:
            cells.append(_number(number_text(row["idle_fastest_fraction"], ".1%"), row["idle_fastest_fraction"]))
        cells += [
            _number(number_text(row["traffic_bytes"] / byte_scale, ".2f"), row["traffic_bytes"]),
            _number(number_text(row["energy_j"] / joule_scale, ".2f"), row["energy_j"]),
            _number(number_text(row["host_s"], ".0f"), row["host_s"]),
        ]
        body.append(cells)
    return table(header, body, "Means over seeds; ± is their standard deviation. Host time is this computer's.")


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


def regret_table(frame: pd.DataFrame) -> str:
    """Regret of the runs that were judged (rows of `fedsim.plots.regret.summary`)."""
    rows = [
        [
            row["method"],
            Cell(str(row["seed"]), row["seed"]),
            _number(f"{row['total_s']:.0f}", row["total_s"]),
            _number(f"{row['relative']:.0%}", row["relative"]),
            _number(f"{row['cold_start_s']:.0f}", row["cold_start_s"]),
            _number(number_text(row["settled_s_per_round"], ".2f"), row["settled_s_per_round"]),
        ]
        for _, row in frame.iterrows()
    ]
    header = ["method", "seed", "regret, simulated s", "of the oracle's time", "cold start, s", "settled, s a round"]
    return table(header, rows, "Simulated seconds lost against the oracle at the same mean ratio, jitter left out.")


def runs_table(groups: Sequence[Group]) -> str:
    """Every run: where it lies and what made it."""
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
                    "-" if draw < 0 else str(draw),
                    str(manifest.get("engine", "-")),
                    _seconds(manifest.get("simulated_s")),
                    _seconds(manifest.get("host_s")),
                    str(manifest.get("config_hash", "-"))[:_HASH_SHOWN],
                    str(manifest.get("trace_hash", "-"))[:_HASH_SHOWN],
                    commit,
                    str(run.path),
                ]
            )
    header = [
        "method",
        "seed",
        "profile draw",
        "engine",
        "simulated s",
        "host s",
        "config",
        "trace",
        "commit",
        "folder",
    ]
    return table(header, rows, f"Hashes by their first {_HASH_SHOWN} digits.")


def facts_table(manifests: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """A row per key of the manifests; where runs differ, all values."""
    rows = []
    for key in keys:
        flat = [flattened({key: manifest[key]}) for manifest in manifests if manifest.get(key) is not None]
        parts = []
        for name in dict.fromkeys(name for facts in flat for name in facts):
            values = list(dict.fromkeys(facts[name] for facts in flat if name in facts))
            shown = " or ".join(values[:4]) + (f" or {len(values) - 4} more" if len(values) > 4 else "")
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


def _seconds(value: Any) -> Cell:
    return Cell("-", math.nan) if value is None else _number(seconds_text(float(value)), float(value))


def _number(text: str, value: float) -> Cell:
    return Cell(text, float(value))
