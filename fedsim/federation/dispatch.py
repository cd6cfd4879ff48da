"""Before flights leave: what the policy is told, and what of its answer is taken."""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.contracts.control import Arms, RoundContext
from fedsim.control.schedule import feasible_bounds, ratio_cap
from fedsim.errors import ConfigError
from fedsim.federation.parts import Parts
from fedsim.federation.standing import Standing
from fedsim.settings import Config

_RATIO_SLACK = 1e-6
"""Rounding that a policy's bisections may leave; what is beyond a bound by less is clipped."""


def context_of(parts: Parts, standing: Standing, version: int, clients: IntArray) -> RoundContext:
    """What the policy knows of a dispatch."""
    config, method, before = parts.config, parts.method, standing.asked[clients]
    low = high = before
    if method.prunes and method.iterative:
        low, high = feasible_bounds(
            config.prune,
            round_index=version,
            ratio_before=before,
            warmup_rounds=config.prune_warmup_rounds,
            end_round=config.prune_end_round,
            step_max=parts.step_max,
        )
    others, others_offset = standing.others(clients)
    return RoundContext(
        round_index=version,
        clients=clients,
        ratio_before=before,
        ratio_low=low,
        ratio_high=high,
        schedule_ratio=parts.schedule(version),
        ratio_max=ratio_cap(config.prune) if method.prunes else 0.0,
        step_max=parts.step_max,
        others=others,
        others_offset=others_offset,
    )


def taken_arms(parts: Parts, standing: Standing, context: RoundContext) -> tuple[FloatArray, IntArray]:
    """The policy's ratios and ranks, (P,) each: checked, clipped to their bounds and to what the clients take.

    Raises:
        ConfigError: arms that the policy may not choose.
    """
    arms = parts.policy.select(context)
    _check_arms(parts.config, context, arms)
    ratio = np.clip(arms.ratio, context.ratio_low, context.ratio_high)
    return ratio, np.minimum(arms.rank, standing.rank_limit[context.clients])


def _check_arms(config: Config, context: RoundContext, arms: Arms) -> None:
    """Refuse what a policy may not choose: a user's own may be wrong, and the clock would run on with nonsense."""
    name, count = config.control.policy, len(context.clients)
    if arms.ratio.shape != (count,) or arms.rank.shape != (count,):
        raise ConfigError(
            f"control.policy '{name}' chose ratios of shape {arms.ratio.shape} and ranks of shape {arms.rank.shape} in "
            f"round {context.round_index}; ({count},) each is needed"
        )
    within = (arms.ratio >= context.ratio_low - _RATIO_SLACK) & (arms.ratio <= context.ratio_high + _RATIO_SLACK)
    highest = config.model.lora_rank_max
    offered = (arms.rank >= 1) & (arms.rank <= highest)
    for good, what, allowed in (
        (within, arms.ratio, "within context.ratio_low and ratio_high"),
        (offered, arms.rank, f"a rank of 1 to {highest}"),
    ):
        if not good.all():  # False for NaN, too
            place = int(np.argmin(good))
            raise ConfigError(
                f"control.policy '{name}' chose {what[place]} for client {context.clients[place]} in round "
                f"{context.round_index}; it must be {allowed}"
            )
