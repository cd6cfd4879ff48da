# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # A finished sweep: speedup, convergence, sensitivity
# Reads the folder that `fedsim sweep ... --out DIR` left on disk; nothing is trained here. As a script:
# `python notebooks/sweep.py DIR`. In Jupyter, name the folder in the cell of parameters, or in `FEDSIM_SWEEP`. Each
# figure is also written, as PNG and PDF with its numbers as CSV, to `figures/` in the sweep's folder.

# %%
import os
import sys
from pathlib import Path

import pandas as pd

from fedsim import load_sweep
from fedsim.experiment.belonging import Group, group_runs
from fedsim.experiment.compare import compare
from fedsim.experiment.regret import regret
from fedsim.plots.figures import draw_accuracy, mark_of
from fedsim.plots.frames import has_accuracy
from fedsim.plots.regret import draw_cumulative_regret, summary
from fedsim.plots.style import canvas, caption, columns_that_fit, legend_in, save, styles, wrapped
from fedsim.plots.summary import draw_speedups
from fedsim.plots.summary_frames import speedups
from fedsim.sweeps.notes import sweep_notes

# %% [markdown]
# ## Parameters

# %%
named = [word for word in sys.argv[1:2] if not word.startswith("-")]  # a kernel's own arguments begin with -
folder = Path(named[0] if named else os.environ.get("FEDSIM_SWEEP", "runs/local-steps"))
out = folder / "figures"
target_accuracy = None  # by default the highest that every run reaches
baseline = None  # a method; by default fedlora, else fedspine_uniform
fleet = None  # name, where the sweep has several: times compare on one fleet only; by default the first run's

# %%
found = load_sweep(folder)
if not found:
    raise SystemExit(f"no cell of the sweep '{folder}' is finished")
fleets = list(dict.fromkeys(run.config["fleet"]["name"] for run in found))
fleet = fleet or fleets[0]
runs = [run for run in found if run.config["fleet"]["name"] == fleet]
print(f"{len(runs)} runs on fleet {fleet}; {len(found) - len(runs)} left out (fleets: {', '.join(fleets)})")
groups, _ = group_runs(runs)
out.mkdir(exist_ok=True)
mark = mark_of(runs)  # a surrogate's figures say so


def show(figure, numbers, name, mark=None):
    """Write the figure and its numbers; in a notebook, show it."""
    written = save(figure, numbers, out, name, mark)
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display

        display(Image(filename=str(written[0]), width=760))


# %% [markdown]
# ## Speedup
# Paired by seed: one seed gives all methods the same split, fleet, jitter and choice of clients. Without any accuracy
# (timing only) it is of total simulated time.

# %%
comparison = compare(runs, target_accuracy, baseline, sweep_notes([folder]))
print(comparison.as_text())

# %%
of = "total simulated time"
if comparison.target_accuracy is not None:
    of = f"simulated time to accuracy {comparison.target_accuracy:.4g}"
draw_speedups(speedups(comparison), of, comparison.baseline, comparison.clock, mark, show)

# %% [markdown]
# ## Convergence
# Of the learning: accuracy against simulated time.

# %%
if has_accuracy(runs):
    draw_accuracy(groups, comparison.clock, mark, show)
else:
    print("timing only: no accuracy was evaluated")

# %% [markdown]
# Of the controllers: simulated seconds lost, round by round, against an oracle that knows every device's true times.
# A curve that flattens has learned. First seed of the first ten configurations with a controller.

# %%
controlled = [
    group
    for group in groups
    if all(run.config["control"]["policy"] != "uniform" and run.has("client_rounds") for run in group.runs.values())
][:10]
firsts = [
    # Numbers where settings tell configurations apart: their names are too long for a legend.
    Group(group.method if group.label == group.method else f"{place}: {group.method}", group.method, dict([first]))
    for place, group in enumerate(controlled)
    for first in [next(iter(group.runs.items()))]
]
known = {run.path: regret(run) for group in firsts for run in group.runs.values()}
if known:
    draw_cumulative_regret(firsts, known, comparison.clock, mark, show)
    print(summary(firsts, known).round(2).assign(configuration=[group.label for group in controlled]).to_string())
else:
    print("no run has a controller")

# %% [markdown]
# ## Sensitivity
# What tau, lambda and s do, all else alike: a line joins runs that differ in nothing but the one setting and the seed.
# Studies of tau at equal local work change rounds with it; these keys may follow tau.

# %%
SETTINGS = {"train.local_steps": "tau", "control.discount": "lambda", "control.exploration": "s"}
FOLLOW = {"train.local_steps": ["train.recovery_steps", "server.rounds", "evaluate.every_rounds"]}
QUANTITIES = {
    comparison.speedup_of: f"{of} (s)",
    "accuracy_final": "final accuracy",
    "idle_fraction": "idle share of the round",
}
configs = pd.json_normalize([run.config for group in groups for run in group.runs.values()])
assert list(configs["seed"]) == list(comparison.runs["seed"])  # both follow the groups
values = configs.drop(columns=["seed", "method"]).astype(str)
varied = [name for name in values if values[name].nunique() > 1 and not name.startswith("records.")]
facts = comparison.runs[["seed", *QUANTITIES]].join(configs["method"]).join(values[varied])


def lines(key):
    """The runs that took part in a change of `key` alone, with the name of the line they lie on."""
    held = ["method", *(name for name in varied if name not in (key, *FOLLOW.get(key, ())))]
    rows = facts.groupby(held, sort=False).filter(lambda own: own[key].nunique() > 1).copy()
    several = {name for name in held[1:] if (rows.groupby("method")[name].nunique() > 1).any()}
    rows["line"] = rows["method"]
    for place, row in rows.iterrows():
        told = [f"{name}={row[name]}" for name in held if name in several]
        rows.loc[place, "line"] += f" ({', '.join(told)})" if told else ""
    return rows.assign(setting=key, value=rows[key].astype(float))[["setting", "value", "line", "seed", *QUANTITIES]]


# %%
tables = {key: lines(key) for key in SETTINGS if key in varied}
tables = {key: table for key, table in tables.items() if len(table)}
print("varied alone:", ", ".join(SETTINGS[key] for key in tables) or "none of tau, lambda and s")
for table in tables.values():
    print(table.groupby(["setting", "line", "value"])[list(QUANTITIES)].mean().round(3).to_string())


# %%
def draw_sensitivity(table, symbol):
    """A panel per quantity: dots are seeds, lines their means."""
    names = list(table["line"].unique())
    steps = sorted(table["value"].unique())
    shown = [name for name in QUANTITIES if table[name].notna().any()]
    looks, columns = styles(names), columns_that_fit([wrapped(name) for name in names], 9.0)
    with canvas(9.0, 3.6 + legend_in([wrapped(name) for name in names], columns)) as figure:
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, quantity in zip(panels, shown, strict=True):
            for name in names:
                own, look = table[table["line"] == name], looks[name]
                axes.plot(own["value"].map(steps.index), own[quantity], ".", color=look["color"], alpha=0.4)
                mean = own.groupby("value")[quantity].mean()
                axes.plot([steps.index(step) for step in mean.index], mean, label=wrapped(name), markersize=4, **look)
            axes.set_xticks(range(len(steps)), [f"{step:g}" for step in steps])
            axes.set_xlabel(symbol)
            axes.set_title(QUANTITIES[quantity])
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=columns)
        caption(figure, "Dots: seeds; lines: their means; values evenly spaced. " + comparison.clock)
        show(figure, table, f"sensitivity_{symbol}", mark)


for key, table in tables.items():
    draw_sensitivity(table, SETTINGS[key])

# %%
print("written:", *sorted(path.name for path in out.glob("*.png")))
