"""FedSpine with a first phase: a device tunes before it begins to estimate what it may lose.

In FedSpine (arXiv 2501.02438) importance is averaged over every step of a job. Here the first steps of a job
(``method_options.warm_steps``, null: a quarter of ``train.local_steps``) tune at the full rate and estimate nothing;
then importance is estimated, the structure is cut, and recovery follows at a rate of its own
(``method_options.recovery_rate``, a share of the round's). An estimate costs time, and the first of a job are of
weights that the last merge has just moved. All of it is ours, an example of a program in phases; no paper measures it.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedsim.contracts.program import LocalProgram, Phase
from fedsim.methods import fedspine
from fedsim.methods.base import Method, scheduled_rate
from fedsim.settings import Config, NonNegative, PositiveFloat, Section


class Options(Section):
    """``warm_steps`` come first and estimate nothing (null: a quarter of the local steps); see the module."""

    warm_steps: NonNegative | None = None
    recovery_rate: PositiveFloat = 1.0


def warm_steps(config: Config) -> int:
    """Steps before the first estimate may come: as asked, else a quarter of tau (rounded down)."""
    asked = Options.model_validate(config.method_options).warm_steps
    return config.train.local_steps // 4 if asked is None else asked


def program(round_index: int, config: Config) -> LocalProgram:
    """Tune; tune and estimate; cut; recover."""
    warm, recovery = warm_steps(config), config.local_recovery_steps
    rate, share = scheduled_rate(round_index, config), Options.model_validate(config.method_options).recovery_rate
    return LocalProgram(
        (
            Phase(warm, rate),
            Phase(config.train.local_steps - warm - recovery, rate, estimate=True),
            Phase(recovery, rate * share, cut_before=round_index >= config.prune_warmup_rounds),
        )
    )


def refuses(config: Config) -> Iterator[str]:
    """A job that would never estimate importance before its cut."""
    every, steps = config.prune.importance_every, config.train.local_steps
    last = steps - config.local_recovery_steps
    most = (last // every) * every - 1  # so that the last estimate before the cut is among those steps
    if warm_steps(config) > most >= 0:
        yield (
            f"method_options.warm_steps: value {warm_steps(config)} is not allowed (at most {most}: an estimate is due "
            f"every {every} steps, and one at least must come before the {config.local_recovery_steps} steps of "
            "recovery)"
        )


METHOD = Method(
    name="fedspine_warm",
    summary="FedSpine whose jobs tune first, then estimate, cut and recover (ours)",
    sources=("FedSpine, arXiv 2501.02438 (the rest); the phases are fedsim's own",),
    prunes=True,
    defaults=fedspine.METHOD.defaults,
    program=program,
    options=Options,
    refuses=refuses,
)
