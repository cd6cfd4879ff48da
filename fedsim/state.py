"""Reading a policy's arrays back from a checkpoint, with a clear sentence where they do not fit."""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import State
from fedsim.errors import RunError


def take(state: State, name: str, like: np.ndarray, *, free_axes: tuple[int, ...] = ()) -> np.ndarray:
    """A copy of array `name`, of the dtype of `like` and of its shape but for `free_axes`.

    Raises:
        RunError: the array is missing, or has another shape.
    """
    if name not in state:
        raise RunError(f"the checkpoint's policy state has no array '{name}' (it was written by another policy)")
    array = np.array(state[name], dtype=like.dtype)
    fits = array.ndim == like.ndim and all(
        axis in free_axes or array.shape[axis] == like.shape[axis] for axis in range(like.ndim)
    )
    if not fits:
        raise RunError(f"the checkpoint's policy array '{name}' has shape {array.shape}, but {like.shape} is needed")
    return array
