"""The terms of the bandit's reward, recovered from the records of a run.

The records hold the reward alone. Loss reduction, pruning progress and time follow from the other columns, by the rules
of `fedsim.control.reward`; the LoRA importance, which is not recorded, is what is then left of the reward.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from fedsim.contracts.common import FloatArray
from fedsim.control.policies import POLICIES
from fedsim.control.reward import RewardModel
from fedsim.control.schedule import default_step_max
from fedsim.errors import RunError
from fedsim.methods.catalogue import method_named
from fedsim.records.reader import Run
from fedsim.runner.config import build_config
from fedsim.settings import Config, RewardSettings

TERM_TEXT = {
    "loss": "the loss reduction",
    "progress": "the pruning progress",
    "importance": "the LoRA importance",
    "time": "the time penalty",
}
_TERMS = ("loss", "progress", "importance")
_PHASES = ["wait_s", "download_s", "compute_s", "upload_s"]
_LEAST_LOSS = 1e-12
_AT_TARGET = 1e-9
_TOLERANCE = 1e-6


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
        Columns ``loss progress importance`` (in [0, 1], NaN where out of use) and ``time`` (the factor 1 / (1 + kappa
        |T - T_mean| / T_mean)), NaN where nothing arrived.
    Raises:
        RunError: the policy does not read rewards, the reward is of another kind, nothing was trained, or the rewards
            were not made by these rules.
    """
    config = build_config(run.config)
    if not POLICIES.named(config.control.policy).reads_rewards:
        raise RunError(f"the policy {config.control.policy} does not read rewards")
    if config.reward.kind != "product":
        raise RunError(f"a reward of kind {config.reward.kind} has no terms that add up")
    rows = run.client_rounds
    good = (rows["outcome"] == "ok") & rows["loss_before"].notna() & rows["loss_after"].notna()
    if not good.any():
        raise RunError("nothing was trained: time is all there is to the reward")
    clients = int((run.manifest.get("fleet") or {}).get("clients") or rows["client"].max() + 1)
    terms = pd.DataFrame(index=rows.index)
    terms["loss"] = _loss(config.reward, rows, good, clients)
    terms["progress"] = _progress(config, rows, good, clients)
    time_s = rows[_PHASES].sum(axis=1).where(good)
    mean_s = time_s.groupby(rows["round"]).transform("mean")
    terms["time"] = 1.0 / (1.0 + config.reward.time_penalty * (time_s - mean_s).abs() / mean_s)
    terms["importance"] = _importance(config.reward, terms, rows["reward"], rows["round"])
    return terms[[*_TERMS, "time"]]


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


def _loss(settings: RewardSettings, rows: pd.DataFrame, good: pd.Series, clients: int) -> FloatArray:
    """The loss reduction over its running 90th percentile: rewards of a model that knows nothing else."""
    alone = settings.model_copy(update={"weights": (1.0, 0.0, 0.0), "time_penalty": 0.0, "time_share": 0.0})
    model, found = RewardModel(alone, clients), np.full(len(rows), np.nan)
    before, after = rows["loss_before"].to_numpy(), rows["loss_after"].to_numpy()
    here, nothing = good.to_numpy(), np.zeros(1)
    for places in rows.groupby("round", sort=True).indices.values():
        found[places] = model.compute(
            loss_before=before[places],
            loss_after=after[places],
            ratio_before=nothing,
            ratio=nothing,
            step_max=0.0,
            target=0.0,
            lora_importance=np.zeros(len(places)),
            time_s=np.ones(len(places)),
            arrived=here[places],
        ).reward
    return np.where(before > _LEAST_LOSS, found, np.nan)


def _progress(config: Config, rows: pd.DataFrame, good: pd.Series, clients: int) -> pd.Series:
    """Rise of the asked ratio over the largest one allowed, until the target is reached."""
    prune, asked = config.prune, config.server.clients_per_round
    step_max = prune.max_step or default_step_max(
        config.prune_warmup_rounds,
        config.prune_end_round,
        prune.target,
        clients=clients,
        participants_per_round=clients if asked == "all" else asked,
    )
    target = prune.target if method_named(config.method).prunes else 0.0
    by_client = rows["prune_ratio_target"].where(good).groupby(rows["client"])
    before = by_client.ffill().groupby(rows["client"]).shift().fillna(0.0)
    rise = ((rows["prune_ratio_target"] - before) / step_max).clip(0.0, 1.0)
    return rise.where(good & (before < target - _AT_TARGET))


def _importance(
    settings: RewardSettings, terms: pd.DataFrame, reward: pd.Series, round_index: pd.Series
) -> pd.Series | float:
    """What the reward holds beyond the other terms; NaN where it has no weight.

    Raises:
        RunError: it is no number in [0, 1] with a largest one of 1 in each round: other rules made these rewards.
    """
    weights, free = settings.weights, 1.0 - settings.time_share
    if weights[2] * free <= 0:
        return np.nan
    learning = (reward / terms["time"] - settings.time_share) / free
    in_use = weights[0] * terms["loss"].notna() + weights[1] * terms["progress"].notna() + weights[2]
    known = weights[0] * terms["loss"].fillna(0.0) + weights[1] * terms["progress"].fillna(0.0)
    found = (learning * in_use - known) / weights[2]
    largest = found.groupby(round_index).max().dropna()
    inside = found.dropna().between(-_TOLERANCE, 1 + _TOLERANCE).all()
    if not (inside and (largest - 1).abs().lt(_TOLERANCE).all()):
        raise RunError("the recorded rewards do not follow from the recorded losses and times by the rules known here")
    return found.clip(0.0, 1.0)
