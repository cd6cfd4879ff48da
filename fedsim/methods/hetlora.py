"""HETLoRA: LoRA ranks by device class, padded with zeros and weighted by norm, ranks that prune themselves; no pruning.

Source: HETLoRA, arXiv 2401.06432. From the paper: a rank per client by its resources; the global factors truncated to
a client's rank; a penalty on the norms of a client's last components, those beyond the share gamma of its rank
(``method_options.rank_decay``), which it gives up for good when their norm shrank in local training; aggregation by
zero-padding with weights ||B_k A_k||_F.

Deviations: the paper's components are judged Linear by Linear; here a client has one rank for all Linears
(`fedsim.learn.model.adapter`), so that penalty and comparison are summed over them. LoRA sits on every prunable Linear,
as for all methods. The clock prices a job at the rank with which it began: the upload of one that pruned itself is
smaller by the dropped share, which is not counted; neither is the penalty's own arithmetic. Timing-only runs and
surrogates train nothing, so that ranks stay there.

Unspecified in the paper; we chose: classes and their ranks (`fedsim.control.static_rank`), gamma 0.99 and the
penalty's weight 0.005, what pads and weights mean beside this round's ranks (`fedsim.learn.merge.padded`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from fedsim.contracts.common import IntArray
from fedsim.contracts.program import LocalProgram, Tensor, Trained
from fedsim.learn.entries import RULES
from fedsim.methods.base import Method, tuning
from fedsim.settings import Config, NonNegativeFloat, Section


class Options(Section):
    """``rank_decay`` is gamma; 1 gives up nothing. ``rank_penalty`` weighs the norm of a client's last components."""

    rank_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.99
    rank_penalty: NonNegativeFloat = 0.005


def kept_rank(rank: int, decay: float) -> int:
    """Components that a client of `rank` keeps in any case, >= 1."""
    return max(1, int(decay * rank + 1e-9))


@dataclass(frozen=True)
class SelfPruning:
    """Rank self-pruning: a client gives up LoRA components that its data does not want.

    A client of rank r keeps ``floor(gamma r)`` components for sure (one at least); those behind them are its *tail*.
    While it trains, its loss carries ``weight * sum over Linears ||A_tail||_F ||B_tail||_F``; if that sum is smaller
    after the job than before it, the tail is dropped, and the client's rank is the smaller one from then on. After a
    cut both sums are over the rows and columns that are left.
    """

    decay: float
    weight: float

    def tail_norms(self, trained: Trained, ranks: IntArray) -> Tensor:
        """Sum over Linears of ``||A_tail|| ||B_tail||``, (C,), with gradients (zero where a norm is zero)."""
        first, _ = next(iter(trained.factors.values()))
        places = np.arange(first.shape[1])
        keep = np.array([kept_rank(rank, self.decay) for rank in ranks.tolist()])[:, None]
        tail = first.new_tensor((places >= keep) & (places < ranks[:, None])).unsqueeze(-1)
        total = first.new_zeros(len(ranks))
        for a, b in trained.factors.values():
            total = total + (a * tail).norm(dim=(1, 2)) * (b * tail).norm(dim=(1, 2))
        return total

    def penalty(self, now: Trained, start: Trained, ranks: IntArray) -> Tensor:
        """The weighted norms of the tails, (C,)."""
        return self.weight * self.tail_norms(now, ranks)

    def ranks_after(self, now: Trained, start: Trained, ranks: IntArray) -> IntArray:
        """The rank without the tail where that shrank, (C,)."""
        shrank = (self.tail_norms(now, ranks) < self.tail_norms(start, ranks)).tolist()
        return np.array(
            [kept_rank(rank, self.decay) if less else rank for rank, less in zip(ranks.tolist(), shrank, strict=True)]
        )


def program(round_index: int, config: Config) -> LocalProgram:
    """Tuning under the penalty."""
    options = Options.model_validate(config.method_options)
    return tuning(round_index, config, SelfPruning(options.rank_decay, options.rank_penalty))


def refuses(config: Config) -> Iterator[str]:
    """Unequal ranks under a rule that needs equal ones."""
    decay = Options.model_validate(config.method_options).rank_decay
    rule = RULES.get(config.aggregate.rule)
    if rule is not None and rule.equal_ranks and decay < 1.0:
        yield (
            f"method_options.rank_decay: value {decay} is not allowed with aggregate.rule {rule.name} (clients that "
            "give up components have unequal ranks: use 1, or another rule)"
        )


METHOD = Method(
    name="hetlora",
    summary="LoRA, rank by device class with self-pruning, zero-padding with norm weights; no pruning (HETLoRA)",
    sources=("HETLoRA, arXiv 2401.06432",),
    prunes=False,
    defaults={"control.policy": "static_rank", "aggregate.rule": "hetlora"},
    program=program,
    options=Options,
    refuses=refuses,
)
