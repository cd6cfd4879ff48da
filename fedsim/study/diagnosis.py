"""Is a run ill? The failure signatures named for FedSpine (arXiv 2501.02438), looked for in a finished run's records.

Each detector is a plain function from records to a `Finding` or None, and gives its evidence. The paper names the
signatures and no thresholds: all of them are [ours], set so that a healthy run stays silent.

* `accuracy_collapse`: test accuracy falls below its own running best by more than the test set's noise explains.
* `straggler_persistence`: the devices that made most rounds of the middle third slow still make most rounds of the last
  third slow. They are chosen on one part of the run and judged on another, so that chance does not look like habit.
* `reward_dominance`: one term of the bandit's reward makes nearly all the difference between the clients of a round.
* `rank_bias`: what the global adapter learned lies mostly in components that only a minority of devices, those of high
  rank, ever hold; or clients of low rank start from a worse model than others with equal pruning. That energy gathers
  in the *first* components is no bias: the SVD of the merge orders them so, and every device holds those.

A detector that cannot judge (no accuracies, too few rounds, no bandit) says why instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fedsim.contracts.common import FloatArray, State
from fedsim.errors import FedsimError
from fedsim.records.reader import Run
from fedsim.runner.config import build_config
from fedsim.study.critical import critical_path
from fedsim.study.reward_terms import TERM_TEXT, reward_of, reward_terms
from fedsim.study.structures import component_energy

COLLAPSE_ERRORS = 3.0
"""Standard errors of a difference that a drop must exceed."""
COLLAPSE_LEAST = 0.05
"""And the least drop called a collapse, whatever the size of the test set: pruning has its ordinary price."""
PERSISTENT_DEVICES = 0.05
"""The few: this share of the devices, at least one."""
PERSISTENT_SHARE = 0.5
PERSISTENT_SLOWER = 1.5
"""Their rounds take this much longer than the round's median client: else nobody waits for them."""
LEAST_LATE_ROUNDS = 5
DOMINANT_SHARE = 0.9
RANK_ENERGY = 0.5
RANK_LOSS = 0.1
"""A loss higher by this much at the start of the job, and by three standard errors over clients."""
RANK_ERRORS = 3.0
LEAST_CLIENTS = 5

SIGNATURES: Mapping[str, str] = {
    "accuracy_collapse": "accuracy collapse",
    "straggler_persistence": "straggler persistence",
    "reward_dominance": "one reward term dominating",
    "rank_bias": "rank bias in aggregation",
}


@dataclass(frozen=True)
class Finding:
    """A signature that was found: what it says in one sentence, and the numbers that say it."""

    signature: str
    summary: str
    evidence: tuple[str, ...]


class NotJudged(Exception):  # noqa: N818 - no error: it carries the reason why a detector has nothing to go by
    """The records do not allow a judgement; the message says why."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found in one run, what was looked for and not found, and what could not be judged (with the reason)."""

    findings: tuple[Finding, ...]
    silent: tuple[str, ...]
    not_judged: Mapping[str, str]


def diagnose(run: Run, state: State) -> Diagnosis:
    """Look for every signature in a finished run.

    Args:
        state: the last checkpoint's arrays (`fedsim.study.structures.final_state`), for the global adapter.
    """
    detectors: dict[str, Callable[[], Finding | None]] = {
        "accuracy_collapse": lambda: accuracy_collapse(_measured(run), _test_size(run)),
        "straggler_persistence": lambda: straggler_persistence(_clients(run)),
        "reward_dominance": lambda: reward_dominance(
            _terms(run), _clients(run)["round"], reward_of(build_config(run.config).reward)
        ),
        "rank_bias": lambda: rank_bias(_clients(run), component_energy(state)),
    }
    findings, silent, not_judged = [], [], {}
    for name, detector in detectors.items():
        try:
            found = detector()
        except NotJudged as reason:
            not_judged[name] = str(reason)
            continue
        if found is None:
            silent.append(name)
        else:
            findings.append(found)
    return Diagnosis(tuple(findings), tuple(silent), not_judged)


def accuracy_collapse(rounds: pd.DataFrame, test_size: int) -> Finding | None:
    """The deepest drop of accuracy below its running best, if it is beyond noise.

    Noise: three standard errors of the difference of two accuracies on `test_size` sentences, taken as independent
    (they share the sentences, so that the true error is smaller), and at least five points.

    Args:
        rounds: ``round end_s accuracy prune_ratio_mean lora_rank_mean``.
    Raises:
        NotJudged: fewer than three evaluations, or an unknown size of the test set.
    """
    tested = rounds.dropna(subset=["accuracy"]).reset_index(drop=True)
    if len(tested) < 3:
        raise NotJudged(f"{len(tested)} evaluations; at least 3 are needed")
    if test_size < 1:
        raise NotJudged("the size of the test set is not recorded")
    accuracy = tested["accuracy"].to_numpy()
    best = np.maximum.accumulate(accuracy)
    noise = np.sqrt((best * (1 - best) + accuracy * (1 - accuracy)) / test_size)
    limit = np.maximum(COLLAPSE_LEAST, COLLAPSE_ERRORS * noise)
    beyond = best - accuracy - limit
    worst = int(beyond.argmax())
    if beyond[worst] <= 0:
        return None
    at, last = tested.loc[worst], len(accuracy) - 1
    peak = tested.loc[int(accuracy[: worst + 1].argmax())]
    lasting = best[last] - accuracy[last] > limit[last]
    drop = best[worst] - accuracy[worst]
    return Finding(
        "accuracy_collapse",
        f"accuracy fell by {100 * drop:.1f} points below its best and "
        f"{'had not come back by the end' if lasting else 'came back by the end'}",
        (
            f"best so far {best[worst]:.3f} in round {peak['round']:.0f}, {accuracy[worst]:.3f} in round "
            f"{at['round']:.0f} (simulated {at['end_s']:.0f} s), {accuracy[last]:.3f} at the end",
            f"{100 * limit[worst]:.1f} points would pass for noise or price ({test_size} test sentences)",
            f"at the best and at the drop: mean pruning ratio {peak['prune_ratio_mean']:.2f} and "
            f"{at['prune_ratio_mean']:.2f}, mean rank {peak['lora_rank_mean']:.1f} and {at['lora_rank_mean']:.1f}",
        ),
    )


def straggler_persistence(client_rounds: pd.DataFrame) -> Finding | None:
    """Devices that make rounds slow in the middle third of the run and still do in the last.

    Raises:
        NotJudged: too few rounds, or the suspects took part in too few of the late ones.
    """
    path = critical_path(client_rounds)
    count = int(client_rounds["round"].max()) + 1 if len(client_rounds) else 0
    if count < 3 * LEAST_LATE_ROUNDS:
        raise NotJudged(f"{count} rounds; at least {3 * LEAST_LATE_ROUNDS} are needed")
    middle = path[(path["round"] >= count // 3) & (path["round"] < 2 * count // 3)]
    late = client_rounds[client_rounds["round"] >= 2 * count // 3]
    few = max(1, int(PERSISTENT_DEVICES * client_rounds["client"].nunique()))
    suspects = middle["client"].value_counts().sort_index().sort_values(ascending=False, kind="stable").index[:few]
    present = set(late.loc[late["client"].isin(suspects), "round"])
    if len(present) < LEAST_LATE_ROUNDS:
        raise NotJudged("the slowest devices of the middle third hardly took part in the last third")
    judged = path[path["round"].isin(present)]
    theirs = judged[judged["client"].isin(suspects)]
    share = len(theirs) / len(judged)
    slower = float((theirs["busy_s"] / theirs["median_busy_s"]).mean()) if len(theirs) else 0.0
    if share < PERSISTENT_SHARE or slower < PERSISTENT_SLOWER:
        return None
    before = middle["client"].isin(suspects).mean()
    counts = theirs.groupby(["client", "device"]).size().sort_values(ascending=False)
    causes = theirs["cause"].value_counts()
    who = ", ".join(f"client {client} ({device}) {times}" for (client, device), times in counts.items())
    return Finding(
        "straggler_persistence",
        f"the same {few} of {client_rounds['client'].nunique()} devices made {share:.0%} of the late rounds slow",
        (
            f"rounds made slow in the last third, of {len(judged)} with any of them: {who}",
            f"those rounds took {slower:.2f} times as long as the round's median client",
            "cause: " + ", ".join(f"{cause} in {times} rounds" for cause, times in causes.items()),
            f"chosen by the middle third, of which they made {before:.0%} of the rounds slow",
        ),
    )


def reward_dominance(
    terms: pd.DataFrame, round_index: pd.Series, reward: Callable[[pd.DataFrame], pd.Series]
) -> Finding | None:
    """One term that makes nearly all the difference between rewards, in the last half of the run.

    A term's share: the variance of the rewards within rounds when only that term varies and the others stand at their
    round's mean, over the sum of these variances.

    Args:
        terms: a row per client round, NaN where a term is out of use: the columns of `reward_terms`.
        round_index: round of each row.
        reward: makes rewards of such a table.
    Raises:
        NotJudged: fewer than two terms ever vary.
    """
    late = (round_index >= (round_index.max() + 1) // 2).to_numpy() & terms.notna().any(axis=1).to_numpy()
    own, rounds = terms[late].reset_index(drop=True), round_index[late].reset_index(drop=True)
    means = own.groupby(rounds).transform("mean")
    spread = {}
    for name in own.columns:
        played = reward(means.assign(**{name: own[name]}))
        spread[name] = float((played - played.groupby(rounds).transform("mean")).pow(2).mean())
    total = sum(spread.values())
    varying = [name for name, value in spread.items() if value > 1e-12]
    if len(varying) < 2 or not math.isfinite(total):
        raise NotJudged("fewer than two terms of the reward vary between clients")
    top = max(spread, key=lambda name: spread[name])
    if spread[top] / total < DOMINANT_SHARE:
        return None
    shares = ", ".join(f"{TERM_TEXT[name]} {value / total:.0%}" for name, value in spread.items())
    return Finding(
        "reward_dominance",
        f"{TERM_TEXT[top]} makes {spread[top] / total:.0%} of the difference between rewards",
        (
            f"variance within rounds, last half of the run, when one term varies alone: {shares}",
            f"mean of each term: {', '.join(f'{TERM_TEXT[name]} {own[name].mean():.2f}' for name in own.columns)}",
        ),
    )


def rank_bias(client_rounds: pd.DataFrame, energy: FloatArray) -> Finding | None:
    """What the high ranks learned stays theirs, or low ranks start worse.

    Args:
        client_rounds: ``round client lora_rank prune_ratio outcome loss_before``.
        energy: share of the global adapter's energy by component; empty where it is not known.
    Raises:
        NotJudged: nothing was trained, or all clients have one rank.
    """
    rows = client_rounds[(client_rounds["outcome"] == "ok") & client_rounds["loss_before"].gt(0)]
    rows = rows[rows["round"] >= (client_rounds["round"].max() + 1) // 2]
    if not len(rows):
        raise NotJudged("nothing was trained")
    ranks = rows["lora_rank"]
    if ranks.nunique() < 2:
        raise NotJudged(f"all clients have rank {ranks.iloc[0]}")
    median = float(ranks.median())
    low = (ranks < median) if (ranks < median).any() else (ranks <= median)
    evidence = []
    if len(energy):
        holders = np.array([(ranks > component).mean() for component in range(len(energy))])
        minority = float(energy[holders < 0.5].sum())
        if minority > RANK_ENERGY:
            first = int(np.argmax(holders < 0.5))
            evidence.append(
                f"{minority:.0%} of the global adapter's energy lies in components {first + 1} to {len(energy)}, which "
                f"at most {holders[first]:.0%} of the clients hold (median rank {median:g})"
            )
    worse, error = _handicap(rows, low)
    if worse > math.log1p(RANK_LOSS) and worse > RANK_ERRORS * error:
        evidence.append(
            f"clients below rank {ranks[~low].min()} start their jobs at a loss {math.expm1(worse):.0%} higher than "
            f"others at equal pruning ({worse / error:.1f} standard errors over clients)"
        )
    if not evidence:
        return None
    return Finding("rank_bias", "the aggregated adapter serves high ranks better than low ones", tuple(evidence))


def _handicap(rows: pd.DataFrame, low: pd.Series) -> tuple[float, float]:
    """By how much low rank raises log loss_before at equal round and pruning ratio, and its standard error.

    Least squares on within-round deviations; the error is clustered by client, whose data makes its losses alike.
    Returns (0, inf) where a kind has too few clients.
    """
    if min(rows.loc[low, "client"].nunique(), rows.loc[~low, "client"].nunique()) < LEAST_CLIENTS:
        return 0.0, math.inf
    table = pd.DataFrame({"y": np.log(rows["loss_before"]), "low": low.astype(float), "ratio": rows["prune_ratio"]})
    within = table - table.groupby(rows["round"]).transform("mean")
    x, y = within[["low", "ratio"]].to_numpy(), within["y"].to_numpy()
    inverse = np.linalg.pinv(x.T @ x)
    slope = inverse @ (x.T @ y)
    scores = pd.DataFrame(x * (y - x @ slope)[:, None]).groupby(rows["client"].to_numpy()).sum().to_numpy()
    variance = (inverse @ (scores.T @ scores) @ inverse)[0, 0]
    return (float(slope[0]), math.sqrt(variance)) if variance > 0 else (0.0, math.inf)


def _measured(run: Run) -> pd.DataFrame:
    if run.is_surrogate:
        raise NotJudged("its accuracies are a fitted model's")
    if not run.rounds["accuracy"].notna().any():
        raise NotJudged("no accuracy was evaluated")
    return run.rounds


def _test_size(run: Run) -> int:
    data: Mapping[str, Any] = run.manifest.get("data") or {}
    return int(data.get("test") or 0)


def _clients(run: Run) -> pd.DataFrame:
    if not run.has("client_rounds"):
        raise NotJudged("the run recorded no clients")
    return run.client_rounds


def _terms(run: Run) -> pd.DataFrame:
    _clients(run)
    try:
        return reward_terms(run)
    except FedsimError as reason:
        raise NotJudged(str(reason)) from None
