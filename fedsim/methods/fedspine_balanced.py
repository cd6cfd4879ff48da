"""FedSpine with our leveller `balanced` in the bandit's place. Beyond the paper: every choice of it is ours.

The leveller learns each device's seconds per FLOP and per byte from its completion times and solves for one common
deadline at which the fleet-mean ratio follows the schedule (`fedsim.control.balanced`).
"""

from __future__ import annotations

from fedsim.methods.base import Method

METHOD = Method(
    name="fedspine_balanced",
    summary="FedSpine with a learned cost model and a common deadline in the bandit's place (ours)",
    sources=("FedSpine, arXiv 2501.02438 (learning); the controller is fedsim's own",),
    prunes=True,
    defaults={
        "control.policy": "balanced",
        "prune.reversible": True,
        "prune.target_scope": "fleet_mean",
        "aggregate.rule": "lowrank",
    },
)
