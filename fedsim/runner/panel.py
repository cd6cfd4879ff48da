"""The fixed panel of devices on which the global model is tested."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsim.contracts.common import IntArray
from fedsim.rng import Stream, generator


def draw_panel(device_of: NDArray[np.str_], size: int, seed: int) -> IntArray:
    """Clients drawn by device class, each class in proportion to its share of the fleet, at least one of each.

    Args:
        device_of: device name of each client, shape (C,).
        size: devices on the panel; raised to the number of classes, and at most the fleet.
        seed: root seed (stream PANEL, keyed by the class's place in alphabetical order).
    Returns:
        Ascending client numbers.
    """
    classes, counts = np.unique(device_of, return_counts=True)
    size = min(max(size, len(classes)), len(device_of))
    share = counts * (size / len(device_of))
    seats = np.maximum(1, np.floor(share)).astype(int)
    # Largest remainders first; ties go to the alphabetically first class.
    while seats.sum() != size:
        if seats.sum() < size:
            open_seats = np.where(seats < counts, share - seats, -np.inf)
            seats[int(np.argmax(open_seats))] += 1
        else:
            surplus = np.where(seats > 1, seats - share, -np.inf)
            seats[int(np.argmax(surplus))] -= 1
    chosen = [
        generator(seed, Stream.PANEL, number).choice(np.flatnonzero(device_of == name), size=seat, replace=False)
        for number, (name, seat) in enumerate(zip(classes, seats, strict=True))
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64)
