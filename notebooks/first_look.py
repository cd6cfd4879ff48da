# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # First look at finished runs
# Reads what `make demo` (or any `fedsim run`) left on disk; nothing is trained here. Open it in Jupyter, or run it as
# a script: `python notebooks/first_look.py runs/quickstart`.

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from fedsim.errors import FedsimError
from fedsim.records.reader import find_runs
from fedsim.study.compare import compare

folder = Path(sys.argv[1] if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else "runs/quickstart")
try:
    runs = find_runs([folder])
except FedsimError as error:
    raise SystemExit(f"{error}; name a folder of runs: python notebooks/first_look.py DIR") from None

# %% [markdown]
# ## The table

# %%
print(compare(runs).as_text())

# %% [markdown]
# ## Accuracy against simulated time

# %%
figure, axes = plt.subplots(figsize=(7, 4))
for run in runs:
    tested = run.rounds.dropna(subset="accuracy")
    axes.plot(tested["end_s"], tested["accuracy"], marker="o", label=run.method)
axes.set_xlabel("simulated time (s)")
axes.set_ylabel("test accuracy (panel mean)")
axes.legend()

# %% [markdown]
# ## Who waits: idle share by device class

# %%
for run in runs:
    rows = run.client_rounds.merge(run.rounds[["round", "duration_s"]], on="round")
    by_class = rows.groupby("device")[["idle_s", "duration_s"]].sum()
    print(run.method, (by_class["idle_s"] / by_class["duration_s"]).round(3).to_dict())
