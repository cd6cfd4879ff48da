"""Failure signatures on made-up records: silent on healthy ones, found where they were put."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up import write_run

from fedsim.control.reward import RewardModel
from fedsim.errors import RunError
from fedsim.records.reader import Run, load
from fedsim.runner.config import build_config
from fedsim.settings import RewardSettings
from fedsim.study.critical import critical_path
from fedsim.study.diagnosis import (
    NotJudged,
    accuracy_collapse,
    diagnose,
    rank_bias,
    reward_dominance,
    straggler_persistence,
)
from fedsim.study.reward_terms import missing_losses, reward_of, reward_terms

ROUNDS, CLIENTS = 30, 20


def evaluated(accuracies):
    count = len(accuracies)
    return pd.DataFrame(
        {
            "round": range(count),
            "end_s": np.arange(count) * 10.0,
            "accuracy": np.array(accuracies, dtype=float),
            "prune_ratio_mean": np.linspace(0, 0.5, count),
            "lora_rank_mean": 8.0,
        }
    )


@pytest.mark.parametrize(
    "accuracies",
    [
        [0.5, 0.7, 0.8, 0.9],
        [0.5, None, 0.9, 0.87, None, 0.88],  # 3 points of 400 sentences are noise
        [0.9, 0.9, 0.9],
    ],
)
def test_a_healthy_accuracy_is_silent(accuracies):
    assert accuracy_collapse(evaluated(accuracies), 400) is None


def test_collapse_is_found_and_whether_it_lasted():
    finding = accuracy_collapse(evaluated([0.6, None, 0.9, 0.6, 0.7]), 400)
    assert finding.summary == "accuracy fell by 30.0 points below its best and had not come back by the end"
    assert "best so far 0.900 in round 2, 0.600 in round 3 (simulated 30 s), 0.700 at the end" in finding.evidence
    assert "0.25 and 0.38" in finding.evidence[2]
    assert "came back by the end" in accuracy_collapse(evaluated([0.6, 0.9, 0.6, 0.89]), 400).summary


def test_the_noise_of_a_collapse_is_that_of_the_test_set():
    """8 points: beyond five, three standard errors are 4.1 points of 1000 sentences and 12.9 points of 100."""
    rounds = evaluated([0.8, 0.9, 0.82])
    assert accuracy_collapse(rounds, 1000) is not None
    assert accuracy_collapse(rounds, 100) is None
    assert accuracy_collapse(evaluated([0.8, 0.9, 0.86]), 1_000_000) is None


@pytest.mark.parametrize(("accuracies", "size"), [([0.9, 0.1], 400), ([None] * 9, 400), ([0.5, 0.9, 0.1], 0)])
def test_too_few_evaluations_are_not_judged(accuracies, size):
    with pytest.raises(NotJudged):
        accuracy_collapse(evaluated(accuracies), size)


def client_rounds(slow=(), factor=4.0, seed=0, phase="compute_s"):
    """Clients alike but for jitter; `slow` ones take `factor` times as long."""
    generator = np.random.default_rng(seed)
    client = np.tile(np.arange(CLIENTS), ROUNDS)
    rows = pd.DataFrame({"round": np.repeat(np.arange(ROUNDS), CLIENTS), "client": client})
    rows["device"], rows["mode"], rows["outcome"] = "jetson-tx2", "MAXN", "ok"
    for name in ("wait_s", "download_s", "compute_s", "upload_s"):
        rows[name] = 0.0 if name == "wait_s" else np.exp(0.1 * generator.standard_normal(len(rows)))
    rows.loc[rows["client"].isin(slow), phase] *= factor
    return rows


def test_the_critical_client_against_a_loop():
    rows = client_rounds(slow=(3, 4), phase="upload_s")
    rows.loc[rows["client"] == 7, "outcome"] = "dropped"
    rows.loc[rows["client"] == 7, "compute_s"] = 99.0  # nobody waited for it
    rows = rows.sample(frac=1.0, random_state=1)
    path = critical_path(rows).set_index("round")
    assert len(path) == ROUNDS
    for number, own in rows[rows["outcome"] == "ok"].groupby("round"):
        parts = own.set_index("client")
        link = parts["download_s"] + parts["upload_s"]
        busy = parts["wait_s"] + parts["compute_s"] + link
        last = busy.idxmax()
        at = path.loc[number]
        assert at["client"] == last
        assert at["link_excess_s"] == pytest.approx(link[last] - link.median())
        assert at["compute_excess_s"] == pytest.approx(parts["compute_s"][last] - parts["compute_s"].median())
        assert at["cause"] == ("link" if at["link_excess_s"] > at["compute_excess_s"] else "compute")
        assert at["median_busy_s"] == pytest.approx(busy.median())
    assert set(path["client"]) <= {3, 4}
    assert set(path["cause"]) == {"link"}


def test_rounds_that_all_clients_left_still_have_a_last_one():
    rows = client_rounds()
    rows["outcome"] = "dropped"
    assert len(critical_path(rows)) == ROUNDS
    assert len(critical_path(rows.head(0))) == 0


@pytest.mark.parametrize("seed", range(5))
def test_stragglers_by_chance_are_silent(seed):
    assert straggler_persistence(client_rounds(seed=seed)) is None


def test_a_persistent_straggler_is_found_and_named():
    finding = straggler_persistence(client_rounds(slow=(3,)))
    assert finding.summary == "the same 1 of 20 devices made 100% of the late rounds slow"
    assert "client 3 (jetson-tx2) 10" in finding.evidence[0]
    assert "compute in 10 rounds" in finding.evidence[2]


def test_a_straggler_that_was_mended_late_or_costs_little_is_silent():
    rows = client_rounds(slow=(3,))
    late = (rows["round"] >= 20) & (rows["client"] == 3)
    rows.loc[late, "compute_s"] = 0.5
    assert straggler_persistence(rows) is None
    slightly = client_rounds()
    slightly[["download_s", "compute_s", "upload_s"]] = 1.0
    slightly.loc[slightly["client"] == 3, "compute_s"] = 1.2  # always the last, by 7%
    assert straggler_persistence(slightly) is None


def test_stragglers_of_short_runs_and_of_rare_clients_are_not_judged():
    rows = client_rounds(slow=(3,))
    with pytest.raises(NotJudged, match="12 rounds"):
        straggler_persistence(rows[rows["round"] < 12])
    with pytest.raises(NotJudged, match="hardly took part"):
        straggler_persistence(rows[(rows["client"] != 3) | (rows["round"] < 20)])


def terms(spreads, seed=0):
    generator = np.random.default_rng(seed)
    names = ("loss", "progress", "importance", "time")
    table = pd.DataFrame({name: 0.5 + spreads[name] * generator.uniform(-1, 1, 600) for name in names})
    return table, pd.Series(np.repeat(np.arange(ROUNDS), CLIENTS))


REWARD = reward_of(RewardSettings(weights=(1.0, 1.0, 1.0)))


def test_balanced_terms_are_silent():
    assert reward_dominance(*terms({"loss": 0.4, "progress": 0.4, "importance": 0.4, "time": 0.1}), REWARD) is None


@pytest.mark.parametrize(("top", "said"), [("loss", "the loss reduction"), ("time", "the time penalty")])
def test_a_dominant_term_is_found_and_named(top, said):
    spreads = {"loss": 0.02, "progress": 0.02, "importance": 0.02, "time": 0.01, top: 0.45}
    finding = reward_dominance(*terms(spreads), REWARD)
    assert finding.summary.startswith(f"{said} makes ")
    assert all(word in finding.evidence[0] for word in ("loss", "progress", "importance", "time"))


def test_differences_between_rounds_do_not_count():
    """A term that is the same for all clients of a round teaches nobody anything."""
    table, round_index = terms({"loss": 0.05, "progress": 0.2, "importance": 0.2, "time": 0.1})
    table["loss"] += np.where(round_index % 2, 0.45, -0.45)
    assert reward_dominance(table, round_index, REWARD) is None


def test_a_single_varying_term_is_not_judged():
    table, round_index = terms({"loss": 0.0, "progress": 0.0, "importance": 0.0, "time": 0.3})
    table["progress"] = np.nan
    with pytest.raises(NotJudged):
        reward_dominance(table, round_index, REWARD)


def made_up_terms(**columns):
    rows = client_rounds()
    generator = np.random.default_rng(3)
    rows["outcome"] = generator.choice(["ok", "dropped"], len(rows))
    good = rows["outcome"] == "ok"
    for name in ("loss_before", "loss_after", "reward_loss", "reward_progress", "reward_importance", "reward_time"):
        rows[name] = np.where(good, generator.uniform(0.1, 1, len(rows)), np.nan)
    rows.loc[rows["round"] < 9, "reward_progress"] = np.nan
    config = build_config({"method": "fedspine", "server": {"rounds": ROUNDS}})
    run = Run(Path("made-up"), config.model_dump(mode="json"), {"status": "finished", "versions": {"fedsim": "0.0.9"}})
    run.__dict__["client_rounds"] = rows.assign(**columns)
    return run, rows, good


def test_the_terms_are_the_recorded_ones():
    run, rows, _ = made_up_terms()
    found = reward_terms(run)
    assert list(found.columns) == ["loss", "progress", "importance", "time"]
    for name in found.columns:
        np.testing.assert_array_equal(found[name], rows[f"reward_{name}"])


def test_rewards_follow_from_the_terms_as_the_reward_model_makes_them():
    config = RewardSettings(time_share=0.3, time_penalty=2.0, weights=(1.0, 0.5, 0.25))
    generator = np.random.default_rng(5)
    made = RewardModel(config, CLIENTS).compute(
        loss_before=np.ones(CLIENTS),
        loss_after=generator.uniform(0.5, 1.0, CLIENTS),
        ratio_before=np.where(np.arange(CLIENTS) < 5, 0.5, 0.1),
        ratio=generator.uniform(0.1, 0.2, CLIENTS),
        step_max=0.1,
        target=0.5,
        lora_importance=np.where(np.arange(CLIENTS) == 7, np.nan, generator.uniform(1, 2, CLIENTS)),
        time_s=generator.uniform(5, 15, CLIENTS),
        arrived=np.arange(CLIENTS) != 3,
    )
    terms = pd.DataFrame({name: getattr(made, name) for name in ("loss", "progress", "importance", "time")})
    np.testing.assert_allclose(reward_of(config)(terms), made.reward, rtol=1e-12)


def test_records_without_terms_say_so_and_who_wrote_them():
    nothing = dict.fromkeys(("reward_loss", "reward_progress", "reward_importance", "reward_time"))
    run, *_ = made_up_terms(**nothing)
    with pytest.raises(RunError, match=r"records do not hold the terms of its rewards \(written by fedsim 0\.0\.9"):
        reward_terms(run)


def ranked(handicap, seed=0):
    """Ranks 2 and 8 drawn anew each round; the low ones start at a loss higher by `handicap`, pruning costs as well."""
    generator = np.random.default_rng(seed)
    rows = client_rounds(seed=seed)
    rows["lora_rank"] = generator.choice([2, 8, 8], len(rows))
    rows["prune_ratio"] = 0.5 - 0.03 * rows["lora_rank"] + 0.05 * generator.standard_normal(len(rows))
    own = np.exp(0.3 * generator.standard_normal(CLIENTS))[rows["client"]]
    noise = np.exp(0.1 * generator.standard_normal(len(rows)))
    rows["loss_before"] = own * noise * (1 + handicap * (rows["lora_rank"] < 8)) * np.exp(rows["prune_ratio"])
    return rows


TOP = np.array([0.8, 0.15, 0.05, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("seed", range(5))
def test_fair_ranks_are_silent(seed):
    """Low ranks prune more here, and pay for it: that is the pruning's doing."""
    assert rank_bias(ranked(0.0, seed), TOP) is None


def test_low_ranks_that_start_worse_are_found():
    finding = rank_bias(ranked(0.5), TOP)
    assert len(finding.evidence) == 1
    assert finding.evidence[0].startswith("clients below rank 8 start their jobs at a loss ")
    gap = float(finding.evidence[0].split("a loss ")[1].split("%")[0])
    assert gap == pytest.approx(50, abs=8)


def test_energy_that_only_a_minority_holds_is_found():
    rows = ranked(0.0)
    rows["lora_rank"] = np.where(rows["client"] < 5, 8, 2)
    finding = rank_bias(rows, TOP[::-1])
    assert finding.evidence == (
        "100% of the global adapter's energy lies in components 3 to 8, which at most 25% of the clients hold "
        "(median rank 2)",
    )


def test_one_rank_or_no_training_is_not_judged():
    rows = ranked(0.0)
    with pytest.raises(NotJudged, match="all clients have rank 8"):
        rank_bias(rows.assign(lora_rank=8), TOP)
    with pytest.raises(NotJudged, match="nothing was trained"):
        rank_bias(rows.assign(loss_before=math.nan), TOP)


def test_a_whole_run_says_what_could_not_be_judged(tmp_path):
    timing = load(write_run(tmp_path / "timing", "fedlora", rounds=16, clients=16, with_accuracy=False))
    verdict = diagnose(timing, {})
    assert verdict.findings == ()
    assert verdict.not_judged["accuracy_collapse"] == "no accuracy was evaluated"
    assert "does not read rewards" in verdict.not_judged["reward_dominance"]
    bare = load(write_run(tmp_path / "bare", "fedlora", rounds=16, clients=16, client_rounds=False))
    verdict = diagnose(bare, {})
    assert verdict.silent == ("accuracy_collapse",)
    assert set(verdict.not_judged.values()) == {"the run recorded no clients"}


def test_ranks_by_class_read_no_rewards():
    """Nobody is misled by a reward that nobody reads."""
    config = build_config({"method": "hetlora", "train": {"engine": "none"}})
    run = Run(Path("made-up"), config.model_dump(mode="json"), {"status": "finished"})
    with pytest.raises(RunError, match="static_rank does not read rewards"):
        reward_terms(run)
    assert missing_losses(run) is None


def test_what_stood_in_for_losses_follows_the_kind_of_reward():
    for kind, said in (("product", "no learning term"), ("fedmp", "every loss reduction counted as 1")):
        config = build_config({"method": "fedspine", "train": {"engine": "none"}, "reward": {"kind": kind}})
        run = Run(Path("made-up"), config.model_dump(mode="json"), {"status": "finished"})
        assert said in missing_losses(run)
