"""FLoRA: clients' factors stacked and merged into the base every round, fresh LoRA in the next; no pruning.

Source: FLoRA, arXiv 2409.05976: stacking has no aggregation noise whatever the ranks; clients download the stack of
all participants, merge it into their frozen weights and start from new factors.

Consequences: the broadcast grows with the sum of ranks, and the clock counts it (`fedsim.federation.broadcast`, where
our choices stand for clients that missed rounds); the server's checkpoint holds a full matrix per Linear
(`fedsim.learn.merge.stacked`). With bf16 products the merged weights are rounded to bf16; the sum itself stays in fp32.
Deviation: LoRA sits on every prunable Linear, as for all methods. Unspecified in the paper; we chose: ranks by device
class (`fedsim.control.static_rank`), the scale c = alpha / r that all methods share.
"""

from __future__ import annotations

from fedsim.methods.base import Method

METHOD = Method(
    name="flora",
    summary="LoRA, rank by device class, stacked and merged into the base each round; no pruning (FLoRA)",
    sources=("FLoRA, arXiv 2409.05976",),
    prunes=False,
    defaults={"control.policy": "static_rank", "aggregate.rule": "stack"},
)
