"""FedSpine: LoRA tuning, iterative structured pruning, and S-UCB choosing ratio and rank per device.

Source: FedSpine, arXiv 2501.02438. From the paper: the round (choose arms, tune tau steps while importance is averaged,
prune up to the chosen cumulative ratio, go on tuning, upload, reward, aggregate), LoRA-guided importance with a moving
average, S-UCB with the parameters lambda, s and delta.

Unspecified in the paper; we chose: arms as offsets from the fleet's cubic schedule (`control.arms`), smooth play
(`control.smooth`), groups that may come back until the final cut (`prune.reversible`), the target as a fleet mean
(`prune.target_scope`), warm-up before the first cut, the reward's weights, aggregation through dW and truncated SVD.
Figures that rest on these are a reconstruction.
"""

from __future__ import annotations

from fedsim.methods.base import Method

METHOD = Method(
    name="fedspine",
    summary="LoRA + iterative structured pruning, ratio and rank per device by S-UCB",
    sources=("FedSpine, arXiv 2501.02438", "D-UCB, arXiv 0805.3415", "LoRAPrune, arXiv 2305.18403"),
    prunes=True,
    defaults={
        "control.policy": "sucb",
        "control.arms": "offset",
        "control.smooth": True,
        "prune.reversible": True,
        "prune.target_scope": "fleet_mean",
        "aggregate.rule": "lowrank",
    },
)
