"""The numbers behind a report's figures, as tables. Nothing here draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from fedsim.study.belonging import Group
from fedsim.study.compare import Comparison
from fedsim.study.critical import critical_path


def speedups(comparison: Comparison) -> pd.DataFrame:
    """A row per method, in the comparison's order: speedup, interval, pairs, and how many runs reached the target."""
    columns = ["method", "speedup", "speedup_low", "speedup_high", "speedup_pairs", "speedup_pairs_missed"]
    table = comparison.rows[[*columns, "reached", "runs"]].copy()
    table["is_baseline"] = table["method"] == comparison.baseline
    return table


def critical_paths(groups: Sequence[Group]) -> pd.DataFrame:
    """Critical clients of all rounds of all runs: ``method seed profile_draw`` and the columns of `critical_path`."""
    tables = [
        critical_path(run.client_rounds).assign(method=group.label, seed=seed, profile_draw=draw)
        for group in groups
        for (seed, draw), run in group.runs.items()
        if run.has("client_rounds") and len(run.client_rounds)
    ]
    whole = pd.concat(tables, ignore_index=True)
    names = ["method", "seed", "profile_draw"]
    return whole[[*names, *(name for name in whole if name not in names)]]


def critical_counts(paths: pd.DataFrame) -> pd.DataFrame:
    """``method device cause rounds share``: how often a class made a round slow, and by what."""
    counts = paths.groupby(["method", "device", "cause"], sort=False).size().rename("rounds").reset_index()
    counts["share"] = counts["rounds"] / counts.groupby("method")["rounds"].transform("sum")
    return counts


def resources(groups: Sequence[Group]) -> pd.DataFrame:
    """Means over a method's runs, by class: ``method device bytes_down bytes_up energy_j peak_memory_bytes``.

    Totals of a run over all clients of the class, the peak over them. Runs without client records have one row, of
    class ``all``, without memory.
    """
    tables = []
    for group in groups:
        for run in group.runs.values():
            if run.has("client_rounds") and len(run.client_rounds):
                grouped = run.client_rounds.groupby("device")
                table = grouped[["bytes_down", "bytes_up", "energy_j"]].sum()
                table["peak_memory_bytes"] = grouped["peak_memory_bytes"].max()
                table = table.reset_index()
            else:
                table = run.rounds[["bytes_down", "bytes_up", "energy_j"]].sum().to_frame().T
                table.insert(0, "device", "all")
                table["peak_memory_bytes"] = float("nan")
            tables.append(table.assign(method=group.label))
    return pd.concat(tables).groupby(["method", "device"], sort=False).mean(numeric_only=True).reset_index()


def structures(kept: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Kept groups per layer, over clients: ``method layer`` and, of heads and channels, mean, low, high and total.

    Args:
        kept: `fedsim.study.structures.kept_structures` by method's label.
    """
    tables = []
    for label, table in kept.items():
        layers = table.groupby("layer")
        rows = pd.DataFrame({"method": label, "layer": sorted(layers.groups)}).set_index("layer", drop=False)
        for kind in ("heads", "channels"):
            own = layers[f"{kind}_kept"]
            rows[f"{kind}_mean"], rows[f"{kind}_low"], rows[f"{kind}_high"] = own.mean(), own.min(), own.max()
            rows[kind] = layers[kind].first()
        tables.append(rows.reset_index(drop=True))
    return pd.concat(tables, ignore_index=True)
