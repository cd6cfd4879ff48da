"""FedMP: a bandit (E-UCB) picks each device's pruning ratio alone; one LoRA rank for all.

Source: FedMP, 10.1109/ICDE53745.2022.00062: E-UCB over a growing tree of ratios (`fedsim.control.eucb`), reward of loss
reduction over the distance of a device's time from the mean.

Deviations: FedMP trains whole models and sends pruned ones out anew each round, with the rest kept at the server
(residual recovery); here LoRA is tuned on a frozen backbone, ratios are cumulative and groups do not come back, as for
every rival that prunes, and from ``prune.end_round`` on all devices go to the target. FedMP ranks filters by the sum
of absolute weights; here ``prune.criterion`` is the same for all methods (``magnitude`` gives FedMP's).

Unspecified for LoRA; we chose: arms as absolute ratios, not smooth (the bandit may jump within what a round allows),
rank ``model.lora_rank``, aggregation by dW and SVD, which knows of pruned rows.
"""

from __future__ import annotations

from fedsim.methods.base import Method

METHOD = Method(
    name="fedmp",
    summary="pruning ratio per device by the bandit E-UCB, one rank (FedMP)",
    sources=("FedMP, 10.1109/ICDE53745.2022.00062", "D-UCB, arXiv 0805.3415"),
    prunes=True,
    defaults={
        "control.policy": "e_ucb",
        "control.arms": "absolute",
        "control.smooth": False,
        "prune.target_scope": "every_device",
        "prune.reversible": False,
        "reward.kind": "fedmp",
        "aggregate.rule": "lowrank",
    },
)
