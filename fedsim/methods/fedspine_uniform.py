"""FedSpine's learning under one schedule and one rank for all devices: isolates what the controller is worth.

Source: the uniform configuration that FedSpine (arXiv 2501.02438) measures its controller against.
Unspecified in the paper; we chose: the cubic schedule of Zhu and Gupta (arXiv 1710.01878), rank `model.lora_rank`,
every device at the target, no group coming back.
"""

from __future__ import annotations

from fedsim.methods.base import Method

METHOD = Method(
    name="fedspine_uniform",
    summary="FedSpine with one pruning schedule and one rank for all devices",
    sources=("FedSpine, arXiv 2501.02438", "Zhu and Gupta, arXiv 1710.01878"),
    prunes=True,
    defaults={
        "control.policy": "uniform",
        "prune.reversible": False,
        "prune.target_scope": "every_device",
        "aggregate.rule": "lowrank",
    },
    baseline=2,
)
