"""The learning rate of a round, and that whoever counts doses takes it from there."""

import numpy as np
import pytest
from test_federation import make, play

from fedsim.methods.catalogue import method_named
from fedsim.methods.rates import learning_rate, rate_share, rate_shares
from fedsim.runner.config import build_config


def configured(method, schedule="linear", rounds=10):
    tree = {
        "method": method,
        "server": {"rounds": rounds},
        "train": {"schedule": schedule, "learning_rate": 0.2, "local_steps": 4},
        "prune": {"warmup_rounds": 2, "end_round": 8},
    }
    return build_config(tree)


def test_linear_falls_to_a_little_and_constant_stays():
    method = method_named("fedlora")
    falling, level = configured("fedlora"), configured("fedlora", "constant")
    np.testing.assert_allclose([learning_rate(method, falling, r) for r in (0, 5, 9)], [0.2, 0.1, 0.02], rtol=1e-15)
    assert [learning_rate(method, level, r) for r in (0, 5, 9)] == [0.2] * 3


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_the_importance_pass_learns_nothing(schedule):
    config = configured("prune_then_tune", schedule)
    method = method_named(config.method)
    assert learning_rate(method, config, 0) == 0.0
    assert learning_rate(method, config, 1) == pytest.approx(0.18 if schedule == "linear" else 0.2)
    shares = rate_shares(method, config, 4)
    assert shares.tolist() == [rate_share(method, config, index) for index in range(4)]
    assert shares[0] == 0.0


@pytest.mark.parametrize("method", ["fedlora", "fedspine", "prune_then_tune", "tune_then_prune"])
def test_jobs_are_submitted_at_that_rate(method):
    federation, learner = make({"method": method})
    play(federation, range(4))
    parts = federation.parts
    rates = {request.version: request.program.rate for request in learner.trained}
    assert rates == {index: learning_rate(parts.method, parts.config, index) for index in range(4)}
