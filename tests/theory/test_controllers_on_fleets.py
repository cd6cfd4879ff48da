"""What the controllers are worth in simulated time, on the fleets that travel with the package (nothing is trained).

The full study with three seeds is ``experiments/policies/study.py``; here one seed holds its claims.
"""

from __future__ import annotations

import numpy as np
import pytest

import fedsim
from fedsim.resources import resource_folder

BASE = resource_folder("experiments") / "policies" / "base.yaml"
WARMUP, SETTLING, MODE_PERIOD = 10, 10, 20


@pytest.fixture(scope="module", params=["fedspine-80", "fedspine-80-modes"])
def fleet_runs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    return request.param, {
        policy: fedsim.run(
            BASE,
            out=folder / policy,
            quiet=True,
            **{"fleet.name": request.param, "control.policy": policy, "records.client_rounds": False},
        )
        for policy in ("uniform", "random", "balanced", "oracle")
    }


def test_balanced_beats_uniform_and_uniform_beats_chance(fleet_runs):
    _, runs = fleet_runs
    totals = {policy: run.manifest["simulated_s"] for policy, run in runs.items()}
    assert totals["balanced"] < totals["uniform"] < totals["random"]


def test_all_controllers_keep_the_same_mean_sparsity(fleet_runs):
    """A controller must not win by pruning more."""
    _, runs = fleet_runs
    for policy in ("random", "balanced", "oracle"):
        mine = runs[policy].rounds["prune_ratio_mean"].to_numpy()
        theirs = runs["uniform"].rounds["prune_ratio_mean"].to_numpy()
        np.testing.assert_allclose(mine, theirs, atol=0.03)  # whole heads: uniform steps all at once
        assert runs[policy].manifest["final_prune_ratio"]["mean"] == pytest.approx(0.5, abs=0.01)


def test_balanced_follows_the_oracle_within_a_tenth(fleet_runs):
    """From ten rounds after pruning begins, outside the two rounds after each change of modes."""
    fleet, runs = fleet_runs
    index = np.arange(len(runs["oracle"].rounds))
    settled = index >= WARMUP + SETTLING
    if fleet.endswith("modes"):
        settled &= index % MODE_PERIOD >= 2
    durations = {policy: runs[policy].rounds["duration_s"].to_numpy()[settled] for policy in ("balanced", "oracle")}
    assert durations["balanced"].mean() < 1.1 * durations["oracle"].mean()
    assert np.median(durations["balanced"] / durations["oracle"]) < 1.1


def test_balanced_leaves_under_half_of_uniforms_idle_share(fleet_runs):
    fleet, runs = fleet_runs
    idle = {policy: run.rounds["idle_fraction"].tail(20).mean() for policy, run in runs.items()}
    assert idle["balanced"] < 0.5 * idle["uniform"], fleet
