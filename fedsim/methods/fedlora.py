"""FedLoRA (FedIT): LoRA of one rank on every device, no pruning, data-weighted mean of the factors.

Source: FedIT, arXiv 2305.05644 (federated averaging of LoRA weights).
Deviation: FedIT tunes query and value of LLaMA; here LoRA sits on every prunable Linear (`model.lora_targets`), so that
all methods train the same parameters.
"""

from __future__ import annotations

from fedsim.methods.base import Method

METHOD = Method(
    name="fedlora",
    summary="LoRA of one rank, no pruning, mean of the factors (FedIT)",
    sources=("FedIT, arXiv 2305.05644",),
    prunes=False,
    defaults={"control.policy": "uniform", "aggregate.rule": "average_factors"},
    labels=(),
    baseline=1,
)
