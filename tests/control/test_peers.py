from __future__ import annotations

import numpy as np
import pytest

from fedsim.control.peers import Peers
from fedsim.control.reward import RewardModel
from fedsim.settings import RewardSettings


def test_the_last_so_many_are_remembered():
    peers = Peers(3)
    for number in range(1, 6):
        times, importance = peers.with_those_before(np.array([float(number)]), np.array([10.0 * number]))
    assert sorted(times.tolist()) == [3.0, 4.0, 5.0]
    assert importance.max() == 50.0
    times, _ = peers.with_those_before(np.arange(5.0), np.ones(5))  # more than there is room for: all of them
    assert times.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    times, _ = peers.with_those_before(np.array([9.0]), np.ones(1))
    assert sorted(times.tolist()) == [3.0, 4.0, 9.0]
    again = Peers(3)
    again.restore(peers.state())
    np.testing.assert_array_equal(
        again.with_those_before(np.ones(1), np.ones(1)), peers.with_those_before(np.ones(1), np.ones(1))
    )


def reward(model, time_s):
    zeros = np.zeros(len(time_s))
    return model.compute(
        loss_before=zeros + 2.0,
        loss_after=zeros + 1.0,
        ratio_before=zeros,
        ratio=zeros,
        step_max=0.0,
        target=0.0,
        lora_importance=zeros + 1.0,
        time_s=np.asarray(time_s, float),
        arrived=np.ones(len(time_s), dtype=bool),
    )


@pytest.mark.parametrize("peers", [0, 8])
def test_a_lone_slow_update_is_slow_beside_those_before_it(peers):
    """Times 1, 1, 1, 5: the mean of four is 2, the gap 3, and the factor 1 / (1 + kappa 1.5)."""
    model = RewardModel(RewardSettings(time_penalty=1.0), 4, peers=peers)
    for _ in range(3):
        reward(model, [1.0])
    found = reward(model, [5.0]).time[0]
    assert found == pytest.approx(1 / 2.5 if peers else 1.0)
