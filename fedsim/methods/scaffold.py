"""SCAFFOLD: FedIT whose clients correct each gradient by what the fleet's would be.

Source: SCAFFOLD, arXiv 1910.06378: the server holds a control variate c, each client its own c_k, all zero at first;
a client's gradients g become ``g - c_k + c``; after the job its variate is, by option II,
``c_k - c + (x - y) / (K eta)``; the server adds the sum of the clients' changes over the number of all clients.

What we chose, as local steps are AdamW's for all methods: the corrected gradient is what AdamW gets, and the new
variate is the mean of the job's own uncorrected gradients. Under SGD that is option II to the letter:
``(x - y) / (K eta)`` is the mean corrected gradient. Under AdamW it is no gradient (every entry moves by about eta
whatever its gradient), and cannot stand for one. Corrections are of what is trained, LoRA's factors and the head: under
``average_factors`` they keep their meaning from round to round, and no other rule is allowed. The server's step is 1.

The clock counts traffic twice (the variate comes down with the adapter, its change goes up), 2 operations a weight and
step (correction, running mean), their passes, and three more copies of what is trained in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedsim.contracts.common import IntArray
from fedsim.contracts.program import ExtraCost, LocalProgram, Objective, Tensor, Trained
from fedsim.methods.base import Method, tuning
from fedsim.settings import Config


@dataclass(frozen=True)
class Correction:
    """The inner product of a correction and what is trained: its gradient is the correction."""

    correction: Trained

    def penalty(self, now: Trained, start: Trained, ranks: IntArray) -> Tensor:
        """Of each client, (C,)."""
        return sum((w * own).flatten(1).sum(dim=1) for w, own in now.pairs(self.correction))


@dataclass(frozen=True)
class ControlVariates:
    """Implements `fedsim.contracts.program.RememberingObjective`."""

    extra_cost = ExtraCost(flops=2.0, memory_bytes=24.0, peak_memory_bytes=12.0, download_bytes=4.0, upload_bytes=4.0)

    def penalty(self, now: Trained, start: Trained, ranks: IntArray) -> Tensor:
        """Without variates: none."""
        return next(now.tensors()).new_zeros(len(ranks))

    def carried(self, shared: Trained, own: Trained) -> Trained:
        """``c - c_k``."""
        return shared.combined(own, lambda server, client: server - client)

    def carrying(self, carried: Trained) -> Objective:
        """The penalty whose gradient is what each client carries."""
        return Correction(carried)

    def kept(self, carried: Trained, gradient: Trained, now: Trained, start: Trained) -> Trained:
        """The new ``c_k``: the mean gradient without its correction."""
        return gradient.combined(carried, lambda mean, correction: mean - correction)

    def merged(self, shared: Trained, change: Trained, clients: int) -> Trained:
        """``c`` and the clients' changes over the number of all clients."""
        return shared.combined(change, lambda server, total: server + total / clients)


def program(round_index: int, config: Config) -> LocalProgram:
    """Tuning with corrected gradients."""
    return tuning(round_index, config, ControlVariates())


def refuses(config: Config) -> Iterator[str]:
    """Rules under which factors change their meaning from one merge to the next."""
    if config.aggregate.rule != "average_factors":
        yield (
            f"aggregate.rule: value {config.aggregate.rule!r} is not allowed with method scaffold (average_factors: "
            "control variates belong to the factors as they are, and another rule makes new ones)"
        )


METHOD = Method(
    name="scaffold",
    summary="LoRA of one rank, gradients corrected by control variates, mean of the factors (SCAFFOLD)",
    sources=("SCAFFOLD, arXiv 1910.06378", "FedIT, arXiv 2305.05644"),
    prunes=False,
    defaults={"control.policy": "uniform", "aggregate.rule": "average_factors"},
    program=program,
    refuses=refuses,
)
