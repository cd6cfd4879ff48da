"""The terms of the bandit's reward, as the records of a run hold them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from fedsim.control.policies import POLICIES
from fedsim.errors import RunError
from fedsim.records.reader import Run
from fedsim.runner.config import build_config
from fedsim.settings import RewardSettings

TERM_TEXT = {
    "loss": "the loss reduction",
    "progress": "the pruning progress",
    "importance": "the LoRA importance",
    "time": "the time penalty",
}
_TERMS = ("loss", "progress", "importance")


def missing_losses(run: Run) -> str | None:
    """What stood in for the losses in the rewards of a timing-only run; None where they had some, or nobody reads them.

    The policy of such a run was taught by times alone: it may choose other arms where models are trained.
    """
    config = build_config(run.config)
    if config.train.engine != "none" or not POLICIES.named(config.control.policy).reads_rewards:
        return None
    if config.reward.kind == "fedmp":
        return "every loss reduction counted as 1"
    return "no learning term (loss reduction, pruning progress, LoRA importance) was in use"


def reward_terms(run: Run) -> pd.DataFrame:
    """Terms of every client round's reward, in the order and with the index of ``client_rounds``.

    Returns:
        Columns ``loss progress importance`` (in [0, 1], NaN where out of use) and ``time`` (the factor for time), NaN
        where nothing arrived.
    Raises:
        RunError: the policy does not read rewards, the reward is of another kind, nothing was trained, or the records
            do not hold the terms.
    """
    config = build_config(run.config)
    if not POLICIES.named(config.control.policy).reads_rewards:
        raise RunError(f"the policy {config.control.policy} does not read rewards")
    if config.reward.kind != "product":
        raise RunError(f"a reward of kind {config.reward.kind} has no terms that add up")
    rows = run.client_rounds
    if not (rows["loss_before"].notna() & rows["loss_after"].notna()).any():
        raise RunError("nothing was trained: time is all there is to the reward")
    terms = pd.DataFrame({name: rows[f"reward_{name}"].astype(float) for name in (*_TERMS, "time")})
    if terms.isna().all(axis=None):
        raise RunError(f"the run's records do not hold the terms of its rewards ({run.stated.origin})")
    return terms


def reward_of(settings: RewardSettings) -> Callable[[pd.DataFrame], pd.Series]:
    """The function from terms to rewards, the ``product`` of `fedsim.control.reward`."""
    weights = np.array(settings.weights)

    def reward(terms: pd.DataFrame) -> pd.Series:
        values = terms[list(_TERMS)].to_numpy()
        in_use = weights * ~np.isnan(values)
        total = in_use.sum(axis=1)
        weighted = (in_use * np.nan_to_num(values)).sum(axis=1)
        learning = np.divide(weighted, total, out=np.ones(len(terms)), where=total > 0)
        return (settings.time_share + (1 - settings.time_share) * learning) * terms["time"]

    return reward
