"""What each controller costs in simulated time, on both fleets and three seeds; nothing is trained.

    python experiments/policies/study.py [--out DIR] [--seeds 0 1 2] [--policies uniform sucb ...]
        [--figures]

Prints total simulated seconds, idle share of the last 20 rounds (fleet mean, and of the fastest class), and how far
`balanced` stays behind `oracle`: its round time over the oracle's from ten rounds after pruning begins, leaving out the
two rounds after each re-drawing of power modes; and the regret of each policy against the oracle at its own mean ratio
(`fedsim.study.regret`). Writes the table as CSV, and with ``--figures`` regret and arms over time of each fleet.
All of it is a reconstruction: the paper states neither its bandit's constants nor its testbed's link speeds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd

import fedsim
from fedsim.plots import write_regret_figures
from fedsim.study.regret import regret

BASE = Path(__file__).with_name("base.yaml")
FLEETS = ("fedspine-80", "fedspine-80-modes")
POLICIES = ("uniform", "random", "sucb", "e_ucb", "d_ucb_grid", "thompson", "balanced", "oracle")
MODE_PERIOD = 20
SETTLED_AFTER = 10


def one_run(fleet: str, policy: str, seed: int, out: Path) -> fedsim.Run:
    """One timing-only run; a uniform fleet follows the schedule on every device alike."""
    return fedsim.run(
        BASE,
        out=out / f"{fleet}-{policy}-seed{seed}",
        force=True,
        quiet=True,
        **{"fleet.name": fleet, "control.policy": policy, "seed": seed},
    )


def settled_rounds(rounds: int, warmup: int, fleet: str) -> np.ndarray:
    """Rounds from ten after pruning begins, without the two after each change of modes."""
    index = np.arange(rounds)
    keep = index >= warmup + SETTLED_AFTER
    if fleet.endswith("modes"):
        keep &= index % MODE_PERIOD >= 2
    return keep


def fastest_class_idle(run: fedsim.Run, last: int) -> float:
    """Idle share of the device class that computes fastest, over the last rounds."""
    rows = run.client_rounds
    fastest = rows.groupby("device")["compute_s"].mean().idxmin()
    tail = rows[(rows["round"] >= len(run.rounds) - last) & (rows["device"] == fastest)]
    durations = run.rounds.set_index("round")["duration_s"]
    return float(tail["idle_s"].sum() / tail["round"].map(durations).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/policies"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--figures", action="store_true")
    arguments = parser.parse_args()
    began_s, rows = time.perf_counter(), []
    for fleet in FLEETS:
        runs: list[fedsim.Run] = []
        for seed in arguments.seeds:
            durations: dict[str, np.ndarray] = {}
            for policy in arguments.policies:
                run = one_run(fleet, policy, seed, arguments.out)
                runs.append(run)
                rounds, lost = run.rounds, regret(run)
                durations[policy] = rounds["duration_s"].to_numpy()
                rows.append(
                    {
                        "fleet": fleet,
                        "policy": policy,
                        "seed": seed,
                        "total_s": run.manifest["simulated_s"],
                        "idle_last_20": rounds["idle_fraction"].tail(20).mean(),
                        "idle_fastest_class_last_20": fastest_class_idle(run, 20),
                        "ratio_last_20": rounds["prune_ratio_mean"].tail(20).mean(),
                        "regret_s": lost.total_s,
                        "relative_regret": lost.relative,
                        "warmup_regret_s": lost.warmup_s,
                        "cold_start_s": lost.cold_start_s,
                        "settled_regret_s_per_round": lost.settled_s_per_round,
                    }
                )
            if {"balanced", "oracle"} <= durations.keys():
                keep = settled_rounds(len(durations["oracle"]), 10, fleet)
                behind = durations["balanced"][keep] / durations["oracle"][keep]
                rows[-1] |= {"balanced_over_oracle_mean": behind.mean(), "balanced_over_oracle_max": behind.max()}
        if arguments.figures:
            write_regret_figures(runs, arguments.out / f"figures-{fleet}")
    table = pd.DataFrame(rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out / "policies.csv", index=False)
    means = table.groupby(["fleet", "policy"], sort=False).mean(numeric_only=True).drop(columns="seed")
    print(means.round(3).to_string())
    print("\neach seed:\n" + table.round(3).to_string(index=False))
    print(f"\n{len(table)} runs in {time.perf_counter() - began_s:.1f} s; table in {arguments.out / 'policies.csv'}")


if __name__ == "__main__":
    main()
