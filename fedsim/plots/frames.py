"""The numbers behind each figure, as tables. Nothing here draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from fedsim.errors import ConfigError
from fedsim.records.reader import Run
from fedsim.study.belonging import Group, Repeat

PHASES = ("wait", "download", "compute", "upload", "idle")


def accuracy_over_time(groups: Sequence[Group]) -> pd.DataFrame:
    """Evaluated rounds of every run: ``method seed profile_draw round end_s accuracy accuracy_consensus``."""
    tables = []
    for group in groups:
        for (seed, draw), run in group.runs.items():
            tested = run.rounds.dropna(subset=["accuracy"])
            table = tested[["round", "end_s", "accuracy", "accuracy_consensus"]].copy()
            tables.append(_named(table, method=group.label, seed=seed, profile_draw=draw))
    return pd.concat(tables, ignore_index=True)


def perplexity_over_time(groups: Sequence[Group]) -> pd.DataFrame:
    """Evaluated rounds of every language model's run: ``method seed profile_draw round end_s perplexity``."""
    tables = []
    for group in groups:
        for (seed, draw), run in group.runs.items():
            table = run.rounds[["round", "end_s"]].assign(perplexity=run.perplexity).dropna()
            tables.append(_named(table, method=group.label, seed=seed, profile_draw=draw))
    return pd.concat(tables, ignore_index=True)


def idle_by_class(groups: Sequence[Group]) -> pd.DataFrame:
    """Mean over rounds of each class's idle share, per run: ``method seed profile_draw device idle_fraction``."""
    tables = []
    for group, (seed, draw), rows in _client_rounds(groups):
        sums = rows.groupby(["device", "round"])[[f"{phase}_s" for phase in PHASES]].sum()
        share = (sums["idle_s"] / sums.sum(axis=1)).groupby("device").mean()
        table = share.rename("idle_fraction").reset_index()
        tables.append(_named(table, method=group.label, seed=seed, profile_draw=draw))
    return pd.concat(tables, ignore_index=True)


def choices_by_class(groups: Sequence[Group]) -> pd.DataFrame:
    """Asked ratio and rank per round and class, over clients and seeds of a method.

    Columns: ``method device round`` and, for ``prune_ratio_target`` and ``lora_rank``, mean, 10th and 90th percentile.
    """
    tables = []
    for group in groups:
        own = [rows for _, _, rows in _client_rounds([group])]
        if not own:
            continue
        grouped = pd.concat(own).groupby(["device", "round"])[["prune_ratio_target", "lora_rank"]]
        table = pd.concat(
            [
                grouped.mean().add_suffix("_mean"),
                grouped.quantile(0.1).add_suffix("_p10"),
                grouped.quantile(0.9).add_suffix("_p90"),
            ],
            axis=1,
        )
        tables.append(_named(table.reset_index(), method=group.label))
    return pd.concat(tables, ignore_index=True)


def timeline(groups: Sequence[Group], round_index: int | None) -> pd.DataFrame:
    """One round of each method's first run, a row per client, ordered by class speed and then by end of work.

    Columns: ``method seed round client device mode outcome`` and each phase's duration in seconds.

    Args:
        round_index: None takes the middle one of the shortest run.
    Raises:
        ConfigError: a run has no such round.
    """
    shortest = min(len(run.rounds) for group in groups for run in [_first(group)[1]])
    chosen = shortest // 2 if round_index is None else round_index
    if not 0 <= chosen < shortest:
        raise ConfigError(
            f"--round: value {chosen} is not allowed (rounds 0 to {shortest - 1} are recorded by all runs)"
        )
    return timeline_of(groups, {group.label: chosen for group in groups})


def timeline_of(groups: Sequence[Group], rounds: Mapping[str, int]) -> pd.DataFrame:
    """`timeline` with a round of its own for each group, by label; groups without client records are left out."""
    columns = ["round", "client", "device", "mode", "outcome", *(f"{phase}_s" for phase in PHASES)]
    tables = []
    for group in groups:
        repeat, run = _first(group)
        if not run.has("client_rounds"):
            continue
        rows = run.client_rounds
        order = class_order(rows)
        table = rows.loc[rows["round"] == rounds[group.label], columns].copy()
        table["device_order"] = table["device"].map(order.index)
        # Ordered by what each client did, so that equal finishing times lie together within a class.
        table["busy_s"] = table[["wait_s", "download_s", "compute_s", "upload_s"]].sum(axis=1)
        table = table.sort_values(["device_order", "busy_s", "client"]).drop(columns=["device_order", "busy_s"])
        tables.append(_named(table, method=group.label, seed=repeat[0]))
    return pd.concat(tables, ignore_index=True)


def typical_and_slowest(groups: Sequence[Group]) -> tuple[dict[str, int], dict[str, int]]:
    """For each group's first run, by label: the round nearest the median duration, and the longest."""
    typical, slowest = {}, {}
    for group in groups:
        duration_s = _first(group)[1].rounds["duration_s"].to_numpy()
        typical[group.label] = int(np.argmin(np.abs(duration_s - np.median(duration_s))))
        slowest[group.label] = int(np.argmax(duration_s))
    return typical, slowest


def _first(group: Group) -> tuple[Repeat, Run]:
    return next(iter(group.runs.items()))


def class_order(client_rounds: pd.DataFrame) -> list[str]:
    """Device classes, slowest first, by mean compute time (of clients that ended well, where there are any)."""
    means = client_rounds.groupby("device")["compute_s"].mean()
    well = client_rounds[client_rounds["outcome"] == "ok"].groupby("device")["compute_s"].mean()
    return [str(name) for name in well.reindex(means.index).fillna(means).sort_values(ascending=False).index]


def with_client_rounds(groups: Sequence[Group]) -> list[Group]:
    """Groups of which a run recorded its clients."""
    return [group for group in groups if any(run.has("client_rounds") for run in group.runs.values())]


def _client_rounds(groups: Sequence[Group]) -> list[tuple[Group, tuple[int, int], pd.DataFrame]]:
    found: list[tuple[Group, tuple[int, int], pd.DataFrame]] = []
    for group in groups:
        for repeat, run in group.runs.items():
            if run.has("client_rounds") and len(run.client_rounds):
                found.append((group, repeat, run.client_rounds))
    return found


def first_client_rounds(groups: Sequence[Group]) -> pd.DataFrame:
    """Client records of all runs together (to order and colour the classes alike in every figure)."""
    return pd.concat([rows[["device", "outcome", "compute_s"]] for _, _, rows in _client_rounds(groups)])


def has_accuracy(runs: Sequence[Run]) -> bool:
    """Whether any run was evaluated."""
    return any(run.rounds["accuracy"].notna().any() for run in runs)


def _named(table: pd.DataFrame, **names: object) -> pd.DataFrame:
    for position, (name, value) in enumerate(names.items()):
        table.insert(position, name, [value] * len(table))
    return table
