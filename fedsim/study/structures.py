"""What a finished run left of the model: kept heads and channels by client and layer, and the global adapter's energy.

Both are read from the run's last checkpoint, which a finished run keeps; nothing is trained or rebuilt.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from fedsim.contracts.common import FloatArray, State
from fedsim.cost.shapes import load_shape
from fedsim.errors import FedsimError
from fedsim.records.checkpoint import has_checkpoint, load_checkpoint
from fedsim.records.folder import CHECKPOINT
from fedsim.records.reader import Run

_COLUMNS = ["client", "layer", "heads_kept", "heads", "channels_kept", "channels"]


def final_state(run: Run) -> State:
    """Arrays of the newest checkpoint; empty where it was removed, or is damaged."""
    try:
        return load_checkpoint(run.path / CHECKPOINT)[1] if has_checkpoint(run.path / CHECKPOINT) else {}
    except FedsimError:
        return {}


def kept_structures(run: Run, state: State) -> pd.DataFrame:
    """Head groups and channels that every client keeps in every layer, beside how many there are.

    Clients that never took part keep everything. Timing-only and surrogate runs have ratios but no structures.

    Args:
        state: `final_state` of the run.
    Returns:
        ``client layer heads_kept heads channels_kept channels``, all integers; no rows where the run holds none.
    """
    empty = pd.DataFrame(columns=_COLUMNS)
    if "learner.structure_bits" not in state:
        return empty
    try:
        shape = load_shape(str(run.config["model"]["name"]), 2)
    except FedsimError:
        return empty  # a model folder that is gone
    heads_total, width = shape.layers * shape.head_groups, shape.layers * (shape.head_groups + shape.ffn)
    bits = np.unpackbits(state["learner.structure_bits"], axis=1)
    if bits.shape[1] < width or bits.shape[1] >= width + 8:
        return empty  # another model stands under that name by now
    known = state["learner.structure_clients"]
    # No client is known where every update was lost: all keep everything.
    clients = max(int((run.manifest.get("fleet") or {}).get("clients", 0)), int(known.max(initial=-1)) + 1)
    heads = np.full((clients, shape.layers), shape.head_groups)
    channels = np.full((clients, shape.layers), shape.ffn)
    heads[known] = bits[:, :heads_total].reshape(len(known), shape.layers, shape.head_groups).sum(axis=2)
    channels[known] = bits[:, heads_total:width].reshape(len(known), shape.layers, shape.ffn).sum(axis=2)
    client, layer = np.indices((clients, shape.layers))
    return pd.DataFrame(
        {
            "client": client.ravel(),
            "layer": layer.ravel(),
            "heads_kept": heads.ravel(),
            "heads": shape.head_groups,
            "channels_kept": channels.ravel(),
            "channels": shape.ffn,
        }
    )[_COLUMNS]


def component_energy(state: State) -> FloatArray:
    """Share of the global adapter's energy in each of its components, shape (rank,), adding up to 1.

    Component k is the product of column k of B and row k of A, what a device of rank k + 1 or more receives; its energy
    is the squared Frobenius norm, |B_k|^2 |A_k|^2, summed over the adapted layers. Empty where no adapter is held.
    """
    total: FloatArray = np.zeros(0)
    for name, a in state.items():
        b = state.get(name.replace("learner.A.", "learner.B.", 1))
        if not name.startswith("learner.A.") or b is None:
            continue
        energy = (np.square(a, dtype=np.float64)).sum(axis=1) * (np.square(b, dtype=np.float64)).sum(axis=0)
        total = energy if not len(total) else total + energy
    return total / total.sum() if len(total) and total.sum() > 0 else np.zeros(0)
