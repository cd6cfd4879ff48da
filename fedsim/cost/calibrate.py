"""What the fitted numbers are fitted to: the efficiency of each device with measured steps, and the memory constants.

``python -m fedsim.cost.calibrate [--json]`` fits them anew to ``device_profiles/measurements`` and prints them beside
what the profiles and `fedsim.cost.memory` hold. Nothing is written; a test compares them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from fedsim.cost.bands import fit_memory, fitted_rows, solve_efficiency
from fedsim.cost.describe import table
from fedsim.cost.device import load_profile, peak_flops_per_s, profile_names, si_numbers
from fedsim.cost.measurements import built_in_measurements, matching
from fedsim.cost.memory import ACTIVATION_GROWTH, FITTED_MEMORY, FRAMEWORK_BYTES, TRAINED_STATE_BYTES
from fedsim.errors import FedsimError


def fits() -> dict[str, Any]:
    """Fitted efficiency and misfit of each device that is fitted; memory constants; shares of large products."""
    rows = built_in_measurements()
    devices = {}
    for name in profile_names():
        profile = load_profile(name)
        if not profile.fitted_to:
            continue
        efficiency, misfit = solve_efficiency(profile, fitted_rows(profile), partial(si_numbers, profile))
        held = profile.efficiency_fp32.value
        devices[name] = {"efficiency_fp32": float(efficiency), "misfit": float(misfit), "profile": held}
    memory = fit_memory([row for row in matching(rows, FITTED_MEMORY) if row.quantity == "peak_memory"])
    return {"devices": devices, "memory": memory, "products": _products()}


def _products() -> dict[str, float]:
    """Mean share of the fp32 peak that large products reach, by source."""
    orin = load_profile("jetson-orin-nano")
    shares = {}
    for source in ("orin-nano-product-fp32", "orin-nano-cublas"):
        rows = matching(built_in_measurements(), [f"{source}-*"])
        peaks = [peak_flops_per_s(orin, orin.mode(row.mode), "fp32") for row in rows]
        shares[source] = float(np.mean([row.value / peak for row, peak in zip(rows, peaks, strict=True)]))
    return shares


def _text(found: dict[str, Any]) -> str:
    rows = [
        [name, f"{one['efficiency_fp32']:.3f}", f"{one['profile']:.3f}", f"{100 * one['misfit']:.1f}%"]
        for name, one in found["devices"].items()
    ]
    memory = found["memory"]
    held = {"framework": FRAMEWORK_BYTES, "growth": ACTIVATION_GROWTH, "state_bytes": TRAINED_STATE_BYTES}
    rows += [[f"memory: {name}", f"{memory[name]:.4g}", f"{value:.4g}", ""] for name, value in held.items()]
    rows += [[f"share of peak, {name}", f"{value:.3f}", "", ""] for name, value in found["products"].items()]
    return table(["number", "fitted", "held", "misfit"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fedsim.cost.calibrate", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print numbers instead of text")
    options = parser.parse_args(arguments)
    try:
        found = fits()
    except FedsimError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2) if options.json else _text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
