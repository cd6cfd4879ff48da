"""Predicted over measured, row by row, with each prediction's band."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from fedsim.cost.validate import Validation
from fedsim.plots.style import COLOURS, MARKERS, canvas, caption, save


def fidelity_frame(result: Validation) -> pd.DataFrame:
    """The counted step times, memory peaks and ratios, one row each: what the figure shows."""
    rows = [one.as_dict() for one in result.checked if one.row.counted and one.row.setting is not None]
    columns = ["id", "device", "quantity", "fitted", "measured", "predicted", "low", "high", "error"]
    return pd.DataFrame([{name: row[name] for name in columns} for row in rows], columns=columns)


def draw_fidelity(result: Validation, folder: Path, name: str) -> list[Path]:
    """Write the figure ``NAME.png``, and its numbers beside it; nothing where no step was measured."""
    frame = fidelity_frame(result)
    if frame.empty:
        return []
    with canvas(7.6, 4.2) as figure:
        axes = figure.add_subplot()
        devices = list(dict.fromkeys(frame["device"]))
        for at, device in enumerate(devices):
            for fitted in (False, True):
                own = frame[(frame["device"] == device) & (frame["fitted"] == fitted)]
                if own.empty:
                    continue
                middle = own["predicted"] / own["measured"]
                spread = np.stack([middle - own["low"] / own["measured"], own["high"] / own["measured"] - middle])
                axes.errorbar(
                    own.index.to_numpy(),
                    middle,
                    yerr=np.maximum(spread, 0.0),
                    fmt=MARKERS[at % len(MARKERS)],
                    markersize=3.5,
                    color=COLOURS[at % len(COLOURS)],
                    markerfacecolor="white" if fitted else COLOURS[at % len(COLOURS)],
                    elinewidth=0.8,
                    label=f"{device}, fitted" if fitted else device,
                )
        axes.axhline(1.0, color="#444444", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_yticks([0.5, 0.7, 1.0, 1.4, 2.0], ["0.5", "0.7", "1", "1.4", "2"])
        axes.minorticks_off()
        axes.set_ylabel("predicted / measured")
        axes.set_xlabel("measurement, in the order of the table")
        axes.legend(fontsize=7, ncols=2)
        caption(
            figure,
            "Step times, peak memory and ratios that others measured, and what the cost model says of each; bars are "
            "the band over the device's joint samples. Hollow: the model was fitted to this row.",
        )
        return save(figure, frame, folder, name)
