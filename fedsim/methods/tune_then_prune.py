"""FedLoRA+Prune: FedIT to the end, then one cut to the target, then as many recovery rounds as asked (none by default).

Source: named by FedSpine (arXiv 2501.02438) as a sequential rival; tuning is FedIT, arXiv 2305.05644.

Unspecified in the paper; we chose: the ``prune.recovery_rounds`` are taken from ``server.rounds``, so that methods do
equal work; the cut takes one common mask by the fleet's averaged importance, which is estimated (and paid for) in
every round before it, because a run may end early at ``server.time_budget_s``, and never after it. The final accuracy
is that after the cut. ``prune.warmup_rounds`` and ``prune.end_round`` are not used.
"""

from __future__ import annotations

from fedsim.contracts.program import LocalProgram
from fedsim.methods.base import Method, pruning
from fedsim.settings import Config


def cut_round(config: Config) -> int:
    """The last round before the cut."""
    return config.server.rounds - 1 - config.prune.recovery_rounds


def is_cut(round_index: int, config: Config) -> bool:
    """Whether the cut follows this round."""
    return round_index == cut_round(config)


def is_before_cut(round_index: int, config: Config) -> bool:
    """Whether the backbone is still whole in this round."""
    return round_index <= cut_round(config)


def program(round_index: int, config: Config) -> LocalProgram:
    """Tuning, with importance until the cut."""
    return pruning(round_index, config, cuts=False, estimates=is_before_cut(round_index, config))


def schedule(round_index: int, config: Config) -> float:
    """The target in recovery rounds, and after the last round in any case."""
    return 0.0 if round_index < cut_round(config) else config.prune.target


METHOD = Method(
    name="tune_then_prune",
    summary="LoRA of one rank to the end, one-shot pruning, recovery rounds if asked (FedLoRA+Prune)",
    sources=("FedSpine, arXiv 2501.02438 (as a rival)", "FedIT, arXiv 2305.05644"),
    prunes=True,
    defaults={
        "control.policy": "uniform",
        "aggregate.rule": "average_factors",
        "prune.structure": "common",
        "prune.target_scope": "every_device",
        "prune.reversible": False,
    },
    schedule=schedule,
    iterative=False,
    cuts_after=is_cut,
    program=program,
)
