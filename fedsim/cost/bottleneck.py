"""Bottleneck adapters (Houlsby et al., arXiv 1902.00751; one a layer, after the FFN, as Pfeiffer et al. place it).

A layer's adapter takes the FFN's output down to a narrow width, through an activation function and up again, and adds
it back. The backbone is frozen; gradients pass through it as they do for LoRA.
"""

from __future__ import annotations

from typing import NamedTuple

from fedsim.cost.setting import StepSetting
from fedsim.structure import ModelShape

LAUNCHES_FORWARD, LAUNCHES_BACKWARD = 4, 8
"""Of one adapter (status: derived, by counting its operations): two products with bias, activation, addition; their
gradients: two products and a sum for each Linear, activation, addition."""
PASSES = 3.0
"""Passes of backward and forward together over what one forward moves: as of any trained Linear."""


class Bottlenecks(NamedTuple):
    """What the adapters of `layers` trained layers ask of one batch's forward and backward."""

    flops: float
    moved_values: float
    launches: float


def bottleneck_weights(shape: ModelShape, setting: StepSetting) -> int:
    """Trained weights of one adapter: two products with their biases; 0 where there is none."""
    width = setting.adapter_width or 0
    return 2 * shape.hidden * width + width + shape.hidden if width else 0


def bottleneck_work(shape: ModelShape, setting: StepSetting, layers: int) -> Bottlenecks:
    """Work of the adapters, forward and backward: 3 times the forward's products and passes, as of a trained Linear."""
    width = setting.adapter_width or 0
    if not width:
        return Bottlenecks(0.0, 0.0, 0.0)
    tokens, hidden = setting.tokens, shape.hidden
    # Both products read and write hidden and width once; the activation reads and writes width; the addition 3 hidden.
    forward = bottleneck_weights(shape, setting) + tokens * (2 * (hidden + width) + 2 * width + 3 * hidden)
    return Bottlenecks(
        flops=layers * 3.0 * 2.0 * tokens * 2.0 * hidden * width,
        moved_values=layers * PASSES * forward,
        launches=float(layers * (LAUNCHES_FORWARD + LAUNCHES_BACKWARD)),
    )


def bottleneck_saved_values(shape: ModelShape, setting: StepSetting) -> int:
    """Values one adapter keeps for the backward pass: its input, and both sides of its activation."""
    width = setting.adapter_width or 0
    return setting.tokens * (shape.hidden + 2 * width) if width else 0
