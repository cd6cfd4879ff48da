# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # A finished sweep: speedup, convergence, sensitivity
# Reads the folder that `fedsim sweep ... --out DIR` left on disk; nothing is trained here. As a script:
# `python notebooks/sweep.py DIR [FLEET]`. In Jupyter, name the folder in the cell of parameters, or in `FEDSIM_SWEEP`.
# Each figure is also written, as PNG and PDF with its numbers as CSV, to `figures/` in the sweep's folder.

# %%
import os
import sys
from pathlib import Path

import pandas as pd

from fedsim import load_sweep
from fedsim.errors import FedsimError
from fedsim.plots.choice import (
    bare_text,
    first_rule,
    left_out_text,
    policy_of,
    regret_rule,
    shown_by_regret,
    shown_first,
)
from fedsim.plots.controllers import draw_cumulative_regret, summary
from fedsim.plots.figures import draw_accuracy, mark_of
from fedsim.plots.frames import has_accuracy
from fedsim.plots.style import canvas, caption, columns_that_fit, legend_in, save, styles, wrapped
from fedsim.plots.summary import draw_speedups
from fedsim.plots.summary_frames import speedups
from fedsim.study.belonging import Group, group_runs
from fedsim.study.compare import compare
from fedsim.study.regret import regret
from fedsim.sweeps.notes import sweep_notes

# %% [markdown]
# ## Parameters

# %%
arguments = sys.argv[1:3] if not sys.argv[1:2] or not sys.argv[1].startswith("-") else []  # a kernel's begin with -
folder = Path(arguments[0] if arguments else os.environ.get("FEDSIM_SWEEP", "runs/local-steps"))
out = folder / "figures"
target_accuracy = None  # by default the highest that every run reaches
baseline = None  # a method; by default fedlora, else fedspine_uniform
fleet = arguments[1] if len(arguments) > 1 else None  # name, where the sweep has several; by default the first run's

# %%
try:
    found = load_sweep(folder)
except FedsimError as error:
    raise SystemExit(f"{error}; name the folder of a sweep: python notebooks/sweep.py DIR, or FEDSIM_SWEEP") from None
if not found:
    raise SystemExit(f"no cell of the sweep '{folder}' is finished")
fleets = list(dict.fromkeys(run.config["fleet"]["name"] for run in found))
if fleet is not None and fleet not in fleets:
    raise SystemExit(f"the sweep '{folder}' has no finished run on fleet '{fleet}': its fleets are {', '.join(fleets)}")
of_fleets = ""  # stands under every figure
if len(fleets) > 1:
    which = "as asked" if fleet else "that of the first run"
    fleet = fleet or fleets[0]
    others = ", ".join(name for name in fleets if name != fleet)
    of_fleets = f"Only fleet {fleet}, {which}: times compare on one fleet alone; left out: {others}. "
fleet = fleet or fleets[0]
runs = [run for run in found if run.config["fleet"]["name"] == fleet]
print(f"{len(runs)} of {len(found)} runs: those on fleet {fleet}. {of_fleets}".strip())
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
try:
    comparison = compare(runs, target_accuracy, baseline, sweep_notes([folder]))
except FedsimError as error:
    raise SystemExit(str(error)) from None
print(comparison.as_text())
print(bare_text(groups))

# %%
# Figures keep to the order of this table, and give a row one look; their captions say what they leave out.
text = of_fleets + comparison.clock
place = {label: index for index, label in enumerate(comparison.rows["method"])}
ordered = sorted(groups, key=lambda group: place[group.label])
of = comparison.speedup_of_text()
draw_speedups(speedups(comparison), of, comparison.baseline, text, mark, show)

# %% [markdown]
# ## Convergence
# Of the learning: accuracy against simulated time.

# %%
drawn = shown_first(ordered, comparison.baseline)
looks = styles([group.label for group in [*drawn, *ordered]])
if has_accuracy(runs):
    left_out = left_out_text(ordered, drawn, first_rule(ordered, comparison.baseline))
    draw_accuracy(drawn, left_out + text, mark, show, looks)
else:
    print("timing only: no accuracy was evaluated")

# %% [markdown]
# Of the controllers: simulated seconds lost, round by round, against an oracle that knows every device's true times.
# A curve that flattens has learned. First seed of each configuration; `uniform` chooses nothing, and shows what there
# is to gain. Of more than twelve, the figure draws those of least and most regret, oracle and uniform, and then those
# of least; the table holds all.

# %%
firsts, known = [], {}
for group in ordered:
    repeat, run = next(iter(group.runs.items()))
    if run.has("client_rounds"):
        try:
            known[run.path] = regret(run)
            firsts.append(Group(group.label, group.method, {repeat: run}))
        except FedsimError as error:
            print(f"no regret of {group.label}: {error}")
if any(policy_of(group) != "uniform" for group in firsts):
    chosen = shown_by_regret(firsts, known)
    if not has_accuracy(runs):  # no other figure shares these colours
        looks = styles([group.label for group in [*chosen, *ordered]])
    said = left_out_text(firsts, chosen, regret_rule()) + f"{bare_text(groups)} ".lstrip() + text
    draw_cumulative_regret(chosen, known, said, mark, show, looks)
    for label, row in summary(firsts, known).set_index("method").iterrows():
        after = row["rounds"] > row["warmup_rounds"] + row["cold_start_rounds"]
        settled = f"settled {row['settled_s']:.1f}" if after else "no round after it"
        parts = f"warm-up {row['warmup_s']:.1f}, cold start {row['cold_start_s']:.1f}, {settled}"
        print(f"{row['total_s']:9.1f} s ({row['relative']:.1%} of the oracle's time; {parts}): {label}")
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
    comparison.speedup_of: f"{of} (s)" if comparison.target_accuracy is None else f"simulated {of} (s)",
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
                axes.plot(own["value"].map(steps.index), own[quantity], ".", color=look.colour, alpha=0.4)
                mean = own.groupby("value")[quantity].mean()
                axes.plot(
                    [steps.index(step) for step in mean.index], mean, label=wrapped(name), markersize=4, **look.line
                )
            axes.set_xticks(range(len(steps)), [f"{step:g}" for step in steps])
            axes.set_xlabel(symbol)
            axes.set_title(QUANTITIES[quantity])
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=columns)
        caption(figure, "Dots: seeds; lines: their means; values evenly spaced. " + text)
        show(figure, table, f"sensitivity_{symbol}", mark)


for key, table in tables.items():
    draw_sensitivity(table, SETTINGS[key])

# %%
print("written:", *sorted(path.name for path in out.glob("*.png")))
