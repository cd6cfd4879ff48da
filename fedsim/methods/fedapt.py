"""FedAPT: APT on every device, without a controller: activation-gradient salience, one cubic schedule, growing ranks.

Source: APT, arXiv 2401.12200 (adaptive pruning and tuning of one model); FedSpine (arXiv 2501.02438) names its
federated form as a rival without saying how it is put together. From APT: blocks are pruned by the product of summed
|activation| and summed |gradient| (`fedsim.learn.train.importance`), sparsity follows a cubic schedule, and ranks grow
where adapters are salient (`fedsim.control.rank_growth`).

Deviations: no self-distillation; no kurtosis term in the salience; the hidden width is not pruned, heads and channels
are; a device has one rank for all its Linears, so that ranks grow by device, not by layer, and the rule knows the other
devices' salience; no time enters it. The clock prices an estimate as a LoRA-guided one (an upper bound).

Unspecified in either source; we chose: aggregation is FedSpine's (dW and SVD), so that the rival differs in pruning and
ranks alone; every device by its own mask; the first rank is ``model.lora_rank``; salience of a device's adapter is mean
|B * grad B|, which is all of the reward here.
"""

from __future__ import annotations

from fedsim.methods.base import Method

METHOD = Method(
    name="fedapt",
    summary="APT per device: activation-gradient pruning on a common schedule, ranks growing by salience; no bandit",
    sources=("APT, arXiv 2401.12200", "FedSpine, arXiv 2501.02438 (as a rival)"),
    prunes=True,
    defaults={
        "control.policy": "rank_growth",
        "prune.criterion": "activation_gradient",
        "prune.target_scope": "every_device",
        "prune.reversible": False,
        "reward.kind": "product",
        "reward.weights": [0.0, 0.0, 1.0],
        "reward.time_penalty": 0.0,
        "reward.time_share": 0.0,
        "aggregate.rule": "lowrank",
    },
)
