"""Regret of recorded runs against the oracle that plays the same rounds."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

import fedsim
from fedsim.errors import RunError
from fedsim.experiment.regret import regret

CALM = """
name: calm
clients: 16
mode_period: 6
compute_jitter_sigma: 0
devices:
  - {profile: jetson-tx2, mode: uniform}
  - {profile: jetson-xavier-nx, mode: uniform}
  - {profile: jetson-agx-xavier, mode: uniform}
  - {profile: jetson-xavier-nx, mode: uniform}
links:
  near: {down_mbps: 25, up_mbps: 20, latency_ms: 5}
  far: {down_mbps: 4, up_mbps: 3, latency_ms: 5}
"""
"""Unequal devices and links without any jitter: what is expected is what happens."""

TIMING = {
    "method": "fedspine",
    "records": {"events": False},
    "model": {"name": "roberta-base", "lora_rank": 8},
    "server": {"rounds": 24, "checkpoint_every": 24},
    "train": {"engine": "none", "max_length": 128},
    "prune": {"warmup_rounds": 4, "end_round": 16},
}


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """Runs one policy on the fleet without jitter; the same run is made once."""
    folder = tmp_path_factory.mktemp("calm")
    (folder / "calm.yaml").write_text(CALM)
    known = {}

    def play(policy, **overrides):
        key = (policy, *sorted(overrides.items()))
        if key not in known:
            keys = {"fleet.name": str(folder / "calm.yaml"), "control.policy": policy, **overrides}
            known[key] = fedsim.run(TIMING, out=folder / f"run-{len(known)}", quiet=True, **keys)
        return known[key]

    return play


POLICIES = ("uniform", "random", "sucb", "e_ucb", "d_ucb_grid", "thompson", "balanced")


@pytest.mark.parametrize("policy", POLICIES)
def test_expected_times_are_those_of_a_run_without_jitter(calm, policy):
    run = calm(policy)
    own = regret(run)
    np.testing.assert_allclose(own.rounds["expected_s"], run.rounds["duration_s"], rtol=1e-12)
    rows = run.client_rounds
    busy_s = rows[["wait_s", "download_s", "compute_s", "upload_s"]].sum(axis=1)
    np.testing.assert_allclose(own.arms["expected_s"], busy_s, rtol=1e-9)
    pd.testing.assert_frame_equal(
        own.arms[["round", "client", "prune_ratio_target", "lora_rank"]],
        rows[["round", "client", "prune_ratio_target", "lora_rank"]],
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_the_total_is_the_time_that_the_oracles_own_run_saves(calm, policy):
    """Both follow the schedule here, so a whole run with the oracle in charge is the replay's independent measure."""
    own = regret(calm(policy))
    best_s = calm("oracle").rounds["duration_s"]
    np.testing.assert_allclose(own.rounds["oracle_s"], best_s, rtol=1e-12)
    assert own.total_s == pytest.approx(calm(policy).rounds["duration_s"].sum() - best_s.sum(), rel=1e-9)
    assert own.relative == pytest.approx(own.total_s / best_s.sum())
    assert own.total_s > 0.02 * best_s.sum()


def test_the_oracle_regrets_nothing_and_balanced_little(calm):
    own = regret(calm("oracle"))
    np.testing.assert_array_equal(own.rounds["regret_s"], 0.0)
    np.testing.assert_array_equal(own.arms["regret_s"], 0.0)
    np.testing.assert_array_equal(own.arms["oracle_ratio"], own.arms["prune_ratio_target"])
    assert own.total_s == own.cold_start_s == 0.0
    assert regret(calm("balanced")).total_s < 0.5 * regret(calm("uniform")).total_s


def test_jitter_does_not_blur_the_oracles_own_regret(tmp_path):
    run = fedsim.run(
        TIMING, out=tmp_path / "run", quiet=True, **{"fleet.name": "fedspine-80-modes", "control.policy": "oracle"}
    )
    assert regret(run).rounds["regret_s"].abs().max() == 0.0


def test_parts_add_up(calm):
    own = regret(calm("sucb"))
    rounds, arms, devices = own.rounds, own.arms, own.devices
    np.testing.assert_allclose(rounds["regret_s"], rounds["expected_s"] - rounds["oracle_s"])
    np.testing.assert_allclose(rounds["cumulative_regret_s"], np.cumsum(rounds["regret_s"]))
    assert rounds["cumulative_regret_s"].iloc[-1] == pytest.approx(own.total_s)
    after = own.settled_s_per_round * (len(rounds) - own.cold_start_first_round - own.cold_start_rounds)
    assert own.warmup_s + own.cold_start_s + after == pytest.approx(own.total_s)
    assert (arms["regret_s"] >= 0).all()
    slowest = arms.groupby("round")["regret_s"].max().to_numpy()
    np.testing.assert_allclose(slowest, np.maximum(0.0, rounds["regret_s"]), atol=1e-9)
    by_client = arms.groupby("client")
    np.testing.assert_allclose(devices["regret_s"], by_client["regret_s"].sum())
    np.testing.assert_allclose(devices["regret_s"], by_client["cumulative_regret_s"].last())
    assert devices["participations"].tolist() == [24] * 16
    assert devices["rounds_slowest"].sum() >= 24
    assert devices["device"].tolist()[:3] == ["jetson-tx2", "jetson-xavier-nx", "jetson-agx-xavier"]


@pytest.mark.parametrize("arms", ["offset", "absolute"])
def test_lost_updates_and_sampled_clients_are_followed(calm, arms):
    """A late client keeps its ratio: if that were not followed, later rounds would cost something else."""
    keys = {
        "server.clients_per_round": 6,
        "server.over_selection": 0.4,
        "server.deadline_s": 26.0,
        "prune.reversible": False,
        "prune.max_step": 0.3,
        "control.arms": arms,
    }
    run = calm("sucb", **keys)
    assert (run.client_rounds["outcome"] == "late").any()
    own = regret(run)
    np.testing.assert_allclose(own.rounds["expected_s"], run.rounds["duration_s"], rtol=1e-12)
    assert own.arms["expected_s"].max() > 26.0
    if arms == "offset":
        np.testing.assert_allclose(own.rounds["oracle_prune_ratio_mean"], own.rounds["prune_ratio_mean"], atol=0.15)
    # 16 clients, 6 updates a round: ten rounds of its own each, 27 rounds, but only 20 may prune.
    assert (own.cold_start_first_round, own.cold_start_rounds) == (4, 20)
    assert np.isnan(own.settled_s_per_round)


def test_the_oracle_is_held_to_the_sparsity_that_was_played(calm):
    run = calm("e_ucb", **{"control.arms": "absolute"})
    own = regret(run)
    schedule = regret(calm("uniform")).rounds["prune_ratio_mean"]
    assert (own.rounds["prune_ratio_mean"] - schedule).abs().max() > 0.02
    np.testing.assert_allclose(own.rounds["oracle_prune_ratio_mean"], own.rounds["prune_ratio_mean"], atol=1e-9)


def test_the_cold_start_counts_ten_rounds_of_pruning(calm):
    own = regret(calm("uniform"))
    assert (own.cold_start_first_round, own.cold_start_rounds) == (4, 10)
    assert own.cold_start_s == pytest.approx(own.rounds["regret_s"].iloc[4:14].sum())
    assert own.warmup_s == pytest.approx(own.rounds["regret_s"].iloc[:4].sum())
    unpruned = regret(calm("uniform", method="fedlora"))
    assert (unpruned.cold_start_first_round, unpruned.cold_start_rounds) == (0, 10)
    assert (unpruned.arms["oracle_ratio"] == 0).all()


def test_a_run_that_trained_has_regret_too(tmp_path):
    small = {
        "method": "fedspine_uniform",
        "model": {"name": "tiny", "lora_rank": 4, "lora_rank_max": 8},
        "data": {"name": "synthetic", "max_samples": 120},
        "fleet": {"clients": 4},
        "server": {"rounds": 3},
        "train": {"local_steps": 2, "recovery_steps": 1, "batch_size": 4, "max_length": 16},
        "prune": {"warmup_rounds": 1, "end_round": 3, "max_step": 0.5},
        "evaluate": {"panel": 1, "max_samples": 10},
        "cost": {"model": "roberta-base", "batch_size": 8, "seq_len": 64},
    }
    run = fedsim.run(small, out=tmp_path / "run", quiet=True)
    own = regret(run)
    np.testing.assert_allclose(own.rounds["expected_s"], run.rounds["duration_s"], rtol=0.15)
    # All devices end at the target, so that in the end the oracle may choose ranks only.
    last = own.arms[own.arms["round"] == 2]
    np.testing.assert_allclose(last["oracle_ratio"], last["prune_ratio_target"], atol=1e-9)


def test_profiles_drawn_from_their_bands_are_drawn_again(tmp_path):
    keys = {"control.policy": "oracle", "fleet.clients": 8, "server.rounds": 18}
    run = fedsim.run(TIMING, out=tmp_path / "run", quiet=True, profile_draw=1, **keys)
    own = regret(run)
    assert own.total_s == 0.0
    plain = regret(fedsim.run(TIMING, out=tmp_path / "plain", quiet=True, **keys))
    assert abs(own.rounds["oracle_s"].sum() / plain.rounds["oracle_s"].sum() - 1.0) > 1e-3


def test_what_has_no_regret_says_so(calm, tmp_path):
    run = calm("uniform", **{"records.client_rounds": False})
    with pytest.raises(RunError, match=re.escape("has no client_rounds")):
        regret(run)
    other = calm("uniform")
    changed = fedsim.load(other.path)
    changed.config["fleet"]["clients"] = 20
    with pytest.raises(RunError, match="not those that its configuration draws"):
        regret(changed)
