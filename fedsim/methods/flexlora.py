"""FlexLoRA: LoRA ranks by device class, updates averaged at full size and truncated by SVD for each client; no pruning.

Source: FlexLoRA, arXiv 2402.11505: the server forms every ``B_k A_k``, averages by data, decomposes the mean and sends
each client the first components that its rank has room for.

Deviation: LoRA sits on every prunable Linear, as for all methods. Unspecified in the paper; we chose: classes and their
ranks (`fedsim.control.static_rank`), singular values split evenly between both factors.
"""

from __future__ import annotations

from fedsim.methods.base import Method

METHOD = Method(
    name="flexlora",
    summary="LoRA, rank by device class, mean update truncated by SVD; no pruning (FlexLoRA)",
    sources=("FlexLoRA, arXiv 2402.11505",),
    prunes=False,
    defaults={"control.policy": "static_rank", "aggregate.rule": "flexlora"},
)
