"""HETLoRA: LoRA ranks by device class, padded with zeros and weighted by norm, ranks that prune themselves; no pruning.

Source: HETLoRA, arXiv 2401.06432. From the paper: a rank per client by its resources; the global factors truncated to
a client's rank; a penalty on the norms of a client's last components, those beyond the share gamma of its rank
(``train.rank_decay``), which it gives up for good when their norm shrank in local training; aggregation by
zero-padding with weights ||B_k A_k||_F.

Deviations: the paper's components are judged Linear by Linear; here a client has one rank for all Linears
(`fedsim.learn.model.adapter`), so that penalty and comparison are summed over them (`fedsim.learn.train.self_pruning`).
LoRA sits on every prunable Linear, as for all methods. The clock prices a job at the rank with which it began: the
upload of one that pruned itself is smaller by the dropped share, which is not counted; neither is the penalty's own
arithmetic. Timing-only runs and surrogates train nothing, so that ranks stay there.

Unspecified in the paper; we chose: classes and their ranks (`fedsim.control.static_rank`), gamma 0.99 and the
penalty's weight 0.005, what pads and weights mean beside this round's ranks (`fedsim.learn.merge.padded`).
"""

from __future__ import annotations

from fedsim.methods.base import Method

METHOD = Method(
    name="hetlora",
    summary="LoRA, rank by device class with self-pruning, zero-padding with norm weights; no pruning (HETLoRA)",
    sources=("HETLoRA, arXiv 2401.06432",),
    prunes=False,
    defaults={
        "control.policy": "static_rank",
        "aggregate.rule": "hetlora",
        "train.rank_decay": 0.99,
        "train.rank_penalty": 0.005,
    },
)
