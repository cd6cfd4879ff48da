"""Figures of finished runs, each with the numbers behind it. Matplotlib loads with the first figure, not by import."""

from fedsim.plots.controllers import write_regret_figures
from fedsim.plots.figures import write_figures

__all__ = ["write_figures", "write_regret_figures"]
