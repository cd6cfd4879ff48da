"""FedProx: FedIT with a pull towards what each client was sent.

Source: FedProx, arXiv 1812.06127: a client minimises its loss plus ``mu / 2 ||w - w_start||^2``, w being what it
trains; the server averages by data.

Deviations: w is LoRA's factors and the head, as nothing else is trained, so that the distance is that of the factors,
not of their product; local steps are AdamW's, as for all methods; no client does less work than another (the paper's
inexact local solutions): every one runs ``train.local_steps``.

The clock counts the penalty's gradient as one pass over what is trained (3 operations a weight and step; weight, start
and gradient read, gradient written), and a copy of the start in memory. Unspecified in the paper for LoRA; we chose:
mu 0.01, within the range that it searches (0.001 to 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.contracts.common import IntArray
from fedsim.contracts.program import ExtraCost, LocalProgram, Tensor, Trained
from fedsim.methods.base import Method, tuning
from fedsim.settings import Config, NonNegativeFloat, Section


class Options(Section):
    """``mu`` weighs the squared distance from the start; 0 is FedIT."""

    mu: NonNegativeFloat = 0.01


@dataclass(frozen=True)
class Proximal:
    """``mu / 2`` times the squared distance of all that is trained from where it started."""

    mu: float
    extra_cost = ExtraCost(flops=3.0, memory_bytes=16.0, peak_memory_bytes=4.0)

    def penalty(self, now: Trained, start: Trained, ranks: IntArray) -> Tensor:
        """Of each client, (C,)."""
        return 0.5 * self.mu * sum(((w - first) ** 2).flatten(1).sum(dim=1) for w, first in now.pairs(start))


def program(round_index: int, config: Config) -> LocalProgram:
    """Tuning, held back."""
    return tuning(round_index, config, Proximal(Options.model_validate(config.method_options).mu))


METHOD = Method(
    name="fedprox",
    summary="LoRA of one rank, held near what was sent by a proximal term, mean of the factors (FedProx)",
    sources=("FedProx, arXiv 1812.06127", "FedIT, arXiv 2305.05644"),
    prunes=False,
    defaults={"control.policy": "uniform", "aggregate.rule": "average_factors"},
    program=program,
    options=Options,
)
