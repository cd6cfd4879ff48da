"""Methods side by side: time to accuracy, speedup, accuracy at equal sparsity, idle share, traffic, energy.

Seeds of one method and configuration form one row. Choices [ours], where the literature does not say how:

* *Time to target* is `end_s` of the first evaluated round whose accuracy is at or above the target: the crossing lies
  somewhere in the `time_known_to_s` before, since the last evaluation below it. Without a given target it is the
  highest accuracy that every finished run reaches, and provisional while runs are missing or unfinished.
* *Speedup* is the baseline's time over the method's, paired by seed, averaged geometrically; the interval resamples
  the seeds (`fedsim.study.bootstrap`) and is given from three pairs on. A pair in which either run missed the
  target has no ratio: such pairs are counted and said, never filled in. What is left is then the mean of the pairs that
  went well, and the table says of how many.
* *Accuracy gain* is the method's final accuracy less the baseline's, paired and resampled in the same way.
* Unfinished runs are named and left out.
* *Sparsity* is the fleet mean of the pruning ratio achieved at the end, with its range over devices: the manifest's
  where the run is finished (it includes the final cut, and clients that were never sampled), else each client's last
  record.
* Where nothing was evaluated, speedups are of the total simulated time; of the mean time of a round where the runs hold
  different numbers of rounds.
* *Lost* is the share of all dispatched updates that did not arrive (late, dropped, out of memory, not finite): a round
  that waits for nobody is short, and worth nothing.
* *Idle share* is the mean over rounds of `idle_fraction`. That of the fastest class uses the clients of the device
  class that computes fastest in the baseline's runs, the same class for every method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedsim.errors import ConfigError, unknown
from fedsim.methods.catalogue import preferred_baselines
from fedsim.records.reader import Run
from fedsim.study.belonging import Group, Repeat, check_together, clock_text, finished_only, group_runs, labels
from fedsim.study.bootstrap import mean_interval, ratio_interval
from fedsim.study.caveats import caveats
from fedsim.study.comparison import Comparison

__all__ = ["Comparison", "compare", "final_sparsity", "idle_of_class", "time_to_target"]

UNPRUNED = 0.005
"""Below this fleet-mean sparsity a method is a reference, not a rival."""
SAME_SPARSITY = 0.02
"""Methods whose sparsities follow each other within this distance form one group."""


def compare(
    runs: Sequence[Run],
    target_accuracy: float | None = None,
    baseline: str | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Compare runs.

    Args:
        runs: unfinished ones are left out, with a warning.
        target_accuracy: in (0, 1]; default: the highest accuracy that every run reaches.
        baseline: a method or a row's label; default: the first of `preferred_baselines` of which the runs hold
            one configuration, else the slowest in total.
        notes: what is known of runs that are missing, such as `fedsim.sweeps.notes.sweep_notes`; become warnings.
    Raises:
        RunError: the runs do not belong together (other data, fleet or clock), or none is finished.
        ConfigError: the target is no fraction, or no run has the baseline method.
    """
    if target_accuracy is not None and not 0.0 < target_accuracy <= 1.0:
        raise ConfigError(f"--target-accuracy: value {target_accuracy:g} is not allowed (above 0, at most 1)")
    done, warnings = finished_only(runs)
    warnings += check_together(done)
    groups, more = group_runs(done)
    base = _baseline(groups, baseline)
    target = _default_target(groups) if target_accuracy is None else target_accuracy
    fastest = _fastest_class(base)
    facts = {
        group.label: {repeat: _facts(run, target, fastest) for repeat, run in group.runs.items()} for group in groups
    }
    speedup_of = _speedup_of(facts, target)
    rows = pd.DataFrame([_row(group, facts[group.label], facts[base.label], speedup_of) for group in groups])
    rows = _in_order(rows)
    table = pd.DataFrame(
        [
            {"method": group.label, "seed": repeat[0], "profile_draw": None if repeat[1] < 0 else repeat[1], **values}
            for group in groups
            for repeat, values in facts[group.label].items()
        ]
    )
    return Comparison(
        rows=rows,
        runs=table,
        target_accuracy=target,
        target_is_default=target_accuracy is None,
        baseline=base.label,
        baseline_is_default=baseline is None,
        speedup_of=speedup_of,
        fastest_class=fastest,
        clock=clock_text(done),
        labels=labels(done),
        warnings=(*notes, *warnings, *more, *caveats(rows, table, target, _classes(done))),
        is_surrogate=done[0].is_surrogate,
        target_is_provisional=target is not None and target_accuracy is None and (bool(notes) or len(done) < len(runs)),
    )


def time_to_target(rounds: pd.DataFrame, target: float) -> float:
    """`end_s` of the first evaluated round at or above the target accuracy; NaN when none is."""
    reached = rounds.loc[rounds["accuracy"] >= target, "end_s"]
    return float(reached.iloc[0]) if len(reached) else math.nan


def time_known_to(rounds: pd.DataFrame, target: float) -> float:
    """Simulated seconds from the evaluation before the first at or above the target to that one: the crossing's place.

    From the start where there is none before; NaN where the target is not reached.
    """
    tested = rounds[rounds["accuracy"].notna()]
    since = tested["end_s"].diff().fillna(tested["end_s"])
    reached = since[tested["accuracy"] >= target]
    return float(reached.iloc[0]) if len(reached) else math.nan


def evaluated_every(rounds: pd.DataFrame) -> tuple[float, float]:
    """How often a run was tested: rounds (the longest gap; the last may be shorter), and mean simulated seconds.

    The time before the first evaluation counts as a gap. NaN where nothing was evaluated.
    """
    tested = rounds[rounds["accuracy"].notna()]
    if not len(tested):
        return math.nan, math.nan
    return float(np.diff(tested["round"], prepend=-1).max()), float(tested["end_s"].iloc[-1]) / len(tested)


def final_sparsity(run: Run) -> tuple[float, float, float]:
    """Achieved pruning ratio at the end: fleet mean, lowest and highest device (NaN where not recorded)."""
    stated = run.manifest.get("final_prune_ratio") or {}
    if run.finished and "mean" in stated:
        return float(stated["mean"]), float(stated.get("low", math.nan)), float(stated.get("high", math.nan))
    if run.has("client_rounds"):
        known = run.client_rounds.dropna(subset=["prune_ratio"]).groupby("client")["prune_ratio"].last()
        if len(known):
            return float(known.mean()), float(known.min()), float(known.max())
    means = run.rounds["prune_ratio_mean"].dropna()
    return (float(means.iloc[-1]) if len(means) else math.nan), math.nan, math.nan


def idle_of_class(client_rounds: pd.DataFrame, device: str) -> float:
    """Mean over rounds of one class's idle share (sum of idle_s / sum of durations); rounds without it do not count."""
    own = client_rounds[client_rounds["device"] == device]
    if not len(own):
        return math.nan
    phases = ["wait_s", "download_s", "compute_s", "upload_s", "idle_s"]
    sums = own.groupby("round")[phases].sum()
    return float((sums["idle_s"] / sums.sum(axis=1)).mean())


def _facts(run: Run, target: float | None, fastest: str | None) -> dict[str, Any]:
    rounds = run.rounds
    tested = rounds["accuracy"].dropna()
    consensus = rounds["accuracy_consensus"].dropna()
    mean, low, high = final_sparsity(run)
    every_rounds, every_s = evaluated_every(rounds)
    with_clients = fastest is not None and run.has("client_rounds")
    return {
        "rounds": len(rounds),
        "round_s": float(rounds["end_s"].iloc[-1]) / len(rounds),
        "lost_fraction": _share(rounds["dropped"].sum(), rounds["participants"].sum()),
        "evaluations": len(tested),
        "reached_at_once": target is not None and bool(len(tested)) and float(tested.iloc[0]) >= target,
        "time_to_target_s": math.nan if target is None else time_to_target(rounds, target),
        "time_known_to_s": math.nan if target is None else time_known_to(rounds, target),
        "evaluated_every_rounds": every_rounds,
        "evaluated_every_s": every_s,
        "accuracy_final": float(tested.iloc[-1]) if len(tested) else math.nan,
        "accuracy_best": float(tested.max()) if len(tested) else math.nan,
        "accuracy_consensus_final": float(consensus.iloc[-1]) if len(consensus) else math.nan,
        "sparsity": mean,
        "sparsity_low": low,
        "sparsity_high": high,
        "simulated_s": float(rounds["end_s"].iloc[-1]),
        "idle_fraction": float(rounds["idle_fraction"].mean()),
        "idle_fastest_fraction": idle_of_class(run.client_rounds, str(fastest)) if with_clients else math.nan,
        "traffic_bytes": float(rounds["bytes_down"].sum() + rounds["bytes_up"].sum()),
        "energy_j": float(rounds["energy_j"].sum()),
        "host_s": float(run.manifest.get("host_s", math.nan)),
    }


_AVERAGED = (
    "rounds",
    "round_s",
    "lost_fraction",
    "time_to_target_s",
    "time_known_to_s",
    "evaluated_every_rounds",
    "evaluated_every_s",
    "accuracy_final",
    "accuracy_best",
    "accuracy_consensus_final",
    "sparsity",
    "simulated_s",
    "idle_fraction",
    "idle_fastest_fraction",
    "traffic_bytes",
    "energy_j",
    "host_s",
)


def _row(
    group: Group, own: dict[Repeat, dict[str, Any]], base: dict[Repeat, dict[str, Any]], speedup_of: str
) -> dict[str, Any]:
    table = pd.DataFrame(list(own.values()))
    common = [repeat for repeat in sorted(own) if repeat in base]
    pairs = [
        (repeat[0], base[repeat][speedup_of] / own[repeat][speedup_of])
        for repeat in common
        if own[repeat][speedup_of] > 0 and base[repeat][speedup_of] > 0
    ]
    gains = [(repeat[0], own[repeat]["accuracy_final"] - base[repeat]["accuracy_final"]) for repeat in common]
    gains = [(seed, gain) for seed, gain in gains if not math.isnan(gain)]
    ratio = ratio_interval([ratio for _, ratio in pairs], [seed for seed, _ in pairs])
    gain = mean_interval([gain for _, gain in gains], [seed for seed, _ in gains])
    return {
        "method": group.label,
        "seeds": sorted({repeat[0] for repeat in own}),
        "runs": len(own),
        "reached": int(table["time_to_target_s"].notna().sum()),
        **{name: float(table[name].mean()) for name in _AVERAGED},
        "accuracy_final_sd": float(table["accuracy_final"].std(ddof=1)) if len(own) > 1 else math.nan,
        "accuracy_gain": gain.mean,
        "accuracy_gain_low": gain.low,
        "accuracy_gain_high": gain.high,
        "sparsity_low": float(table["sparsity_low"].min()),
        "sparsity_high": float(table["sparsity_high"].max()),
        "speedup": ratio.mean,
        "speedup_low": ratio.low,
        "speedup_high": ratio.high,
        "speedup_pairs": len(pairs),
        "speedup_pairs_missed": len(common) - len(pairs),
        "speedup_unpaired": len(own) - len(common),
    }


def _share(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else math.nan


def _speedup_of(facts: Mapping[str, Mapping[Repeat, Mapping[str, Any]]], target: float | None) -> str:
    if target is not None:
        return "time_to_target_s"
    rounds = {values["rounds"] for own in facts.values() for values in own.values()}
    return "simulated_s" if len(rounds) == 1 else "round_s"


def _classes(runs: Sequence[Run]) -> int:
    """Labels of the classifier; 0 of a language model, a surrogate or where nothing is known."""
    names = (runs[0].manifest.get("data") or {}).get("label_names")
    return len(names) if isinstance(names, list) else 0


def _in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Name each row's sparsity group (0: unpruned references), and sort by group and time."""
    known = rows["sparsity"].fillna(0.0)
    rows["is_reference"] = known < UNPRUNED
    pruned = np.sort(known[~rows["is_reference"]].to_numpy())
    starts = pruned[np.concatenate([[True], np.diff(pruned) > SAME_SPARSITY])] if len(pruned) else pruned
    rows["sparsity_group"] = np.where(rows["is_reference"], 0, np.searchsorted(starts, known, side="right"))
    time_s = rows["time_to_target_s"].fillna(math.inf)
    order = np.lexsort((rows["simulated_s"], time_s, rows["sparsity_group"]))
    return rows.iloc[order].reset_index(drop=True)


def _baseline(groups: Sequence[Group], asked: str | None) -> Group:
    if asked is not None:
        found = [group for group in groups if group.label == asked] or [
            group for group in groups if group.method == asked
        ]
        if not found:
            raise ConfigError(f"--baseline: {unknown('method', asked, {group.label for group in groups})}")
        if len(found) > 1:
            names = ", ".join(f"'{group.label}'" for group in found)
            raise ConfigError(f"--baseline: '{asked}' comes in several configurations; name one of {names}")
        return found[0]
    for method in preferred_baselines():
        found = [group for group in groups if group.method == method]
        if len(found) == 1:
            return found[0]
    return max(groups, key=lambda group: float(np.mean([run.rounds["end_s"].iloc[-1] for run in group.runs.values()])))


def _default_target(groups: Sequence[Group]) -> float | None:
    """The highest accuracy that every run reaches."""
    best = [run.rounds["accuracy"].max() for group in groups for run in group.runs.values()]
    tested = [float(one) for one in best if not math.isnan(one)]
    return min(tested) if tested else None


def _fastest_class(base: Group) -> str | None:
    tables = [run.client_rounds for run in base.runs.values() if run.has("client_rounds")]
    rows = pd.concat(tables) if tables else pd.DataFrame()
    if not len(rows):
        return None
    compute_s = rows[rows["outcome"] == "ok"].groupby("device")["compute_s"].mean()
    return str(compute_s.idxmin()) if len(compute_s) else None
