"""Regret of recorded runs against the oracle that plays the same rounds."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest

import fedsim
from fedsim.contracts.control import Work
from fedsim.cost.shapes import load_shape
from fedsim.errors import RunError
from fedsim.fleet.fleet import load_fleet
from fedsim.methods.catalogue import METHODS as KNOWN
from fedsim.methods.catalogue import method_named
from fedsim.runner.build import priced
from fedsim.runner.config import build_config
from fedsim.study.regret import _of_some, regret

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


METHODS = {
    "fedspine": "sucb",
    "fedspine_uniform": "uniform",
    "fedspine_balanced": "balanced",
    "fedlora": "uniform",
    "hetlora": "static_rank",
    "flexlora": "static_rank",
    "flora": "static_rank",
    "prune_then_tune": "uniform",
    "fedprox": "uniform",
    "fedadam": "uniform",
    "scaffold": "uniform",
    "fedspine_warm": "sucb",
    "tune_then_prune": "uniform",
    "fedapt": "rank_growth",
    "fedmp": "e_ucb",
}
"""Every method, with its policy."""
BUILT_IN = set(KNOWN)  # now: other tests may register methods of their own
SOME = {"server.clients_per_round": 6, "prune.recovery_rounds": 8}


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_times_are_those_of_its_run(calm, method):
    """Among them stacks that clients fetch late, and rounds in which no importance is estimated."""
    run = calm(METHODS[method], method=method, **SOME)
    own = regret(run)
    np.testing.assert_allclose(own.rounds["expected_s"], run.rounds["duration_s"], rtol=1e-12)
    assert (own.rounds["oracle_s"] > 0).all()
    assert own.total_s >= 0


def test_every_method_is_tested():
    assert set(METHODS) == BUILT_IN


@pytest.mark.parametrize("method", ["fedlora", "hetlora", "flora", "prune_then_tune", "tune_then_prune"])
def test_the_oracles_rounds_by_brute_force(calm, method):
    """Where no device chooses its ratio, each rank of each device is priced alone, on the job that it really does.

    Under stacks the download is that of all ranks merged since the client last took part, and the rank the smallest.
    """
    run = calm(METHODS[method], method=method, **SOME)
    config = build_config(run.config)
    kind, shape = method_named(config.method), load_shape(config.model.name, 2)
    fleet = load_fleet(config.fleet, config.cost.precision, config.seed)
    sent, received = 0, dict.fromkeys(range(16), 0)
    quiet = 0
    for index, arms in regret(run).arms.groupby("round"):
        program = kind.local_program(index, config)
        quiet += kind.prunes and not program.estimates
        ask = priced(config, kind, shape, shape)(program)
        times_s = {}
        for client, ratio in zip(arms["client"], arms["oracle_ratio"], strict=True):
            for rank in ask.ranks.tolist():
                work = ask.work(ratio, ratio, rank)
                if method == "flora":
                    fetched = ask.work(ratio, ratio, sent - received[client]).download_bytes
                    work = dataclasses.replace(work, download_bytes=fetched)
                times_s[client, rank] = fleet.expected_seconds(index, np.array([client]), work).item()
        clients, smallest = arms["client"].tolist(), int(ask.ranks[0])
        deadline_s = max(times_s[client, smallest] for client in clients)
        largest = {
            client: max(rank for rank in ask.ranks.tolist() if times_s[client, rank] <= deadline_s * (1 + 1e-12))
            for client in clients
        }
        chosen = {client: smallest if method == "flora" else largest[client] for client in clients}
        assert arms["oracle_rank"].tolist() == [chosen[client] for client in clients]
        expected = [times_s[client, chosen[client]] for client in clients]
        np.testing.assert_allclose(arms["oracle_expected_s"], expected, rtol=1e-9)
        for client in clients:
            received[client] = sent
        sent += sum(chosen.values())
    # prune_then_tune estimates in its first round alone, tune_then_prune in the last before its cut.
    assert (quiet > 0) == (method in ("prune_then_tune", "tune_then_prune"))


def test_larger_ranks_cost_time_under_stacks(calm):
    """No choice of ranks is faster than the oracle's: others only make later downloads longer."""
    own = regret(calm("static_rank", method="flora", **SOME))
    assert (own.rounds["regret_s"] >= -1e-9).all()
    assert own.rounds["regret_s"].iloc[-6:].mean() > own.rounds["regret_s"].iloc[0]


def test_a_part_of_a_large_rounds_work_is_that_of_its_clients():
    work = Work(*(np.arange(12.0).reshape(6, 2),) * 3, np.ones((1, 2)), np.arange(6.0)[:, None], np.array(3.0))
    some = _of_some(work, np.array([1, 3, 5, 7, 9, 11]), np.array([5, 7]))
    np.testing.assert_array_equal(some.flops, [[4, 5], [6, 7]])
    np.testing.assert_array_equal(some.download_bytes, [[2], [3]])
    assert some.peak_memory_bytes is work.peak_memory_bytes
    assert some.upload_bytes is work.upload_bytes


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
