"""What a round of control costs in memory: that of its participants, whatever the size of the fleet."""

import tracemalloc

import numpy as np
import pytest
from control_toys import ToyAsk

from fedsim.contracts.control import Feedback, RoundContext
from fedsim.control.policies import PolicyInputs, make_policy
from fedsim.control.reward import RewardModel
from fedsim.settings import ControlSettings, RewardSettings

ASK = ToyAsk()


def _round(policy, reward, index, ids):
    size = ids.size
    low, high = np.zeros(size), np.full(size, 0.6)
    arms = policy.select(RoundContext(index, ids, low, low, high, 0.3, 0.8, 0.6))
    work = ASK.work(low, arms.ratio, arms.rank)
    time_s = work.flops / 1e12 * (1.0 + ids % 3)
    here = np.ones(size, dtype=bool)
    rewards = reward.compute(
        loss_before=np.ones(size),
        loss_after=np.full(size, 0.9) - 0.01 * (ids % 7),
        ratio_before=low,
        ratio=arms.ratio,
        step_max=0.6,
        target=0.5,
        lora_importance=np.ones(size),
        time_s=time_s,
        arrived=here,
    )
    policy.update(Feedback(index, ids, low, arms.ratio, arms.rank, work, time_s, here, rewards.reward))


def _peak_bytes(name, clients, participants):
    """Largest memory of a later round beyond what was held before it."""
    policy = make_policy(PolicyInputs(ControlSettings(policy=name), clients=clients, ask=ASK, seed=0, fixed_rank=8))
    reward = RewardModel(RewardSettings(), clients)
    ids = np.sort(np.random.default_rng(0).choice(clients, participants, replace=False))
    for index in range(9):
        _round(policy, reward, index, ids)
    tracemalloc.start()
    try:
        _round(policy, reward, 9, ids)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["uniform", "random", "sucb", "e_ucb", "d_ucb_grid", "thompson", "balanced"])
def test_clients_that_do_not_take_part_cost_nothing(name):
    small, large = _peak_bytes(name, 500, 30), _peak_bytes(name, 100_000, 30)
    assert large < small + 50_000, "half a byte per idle client would be as much"


@pytest.mark.parametrize("name", ["uniform", "sucb", "e_ucb", "d_ucb_grid", "thompson", "balanced"])
def test_memory_of_a_full_round_is_bounded_per_client(name):
    # 300 MB at 131,072 clients.
    assert _peak_bytes(name, 20_000, 20_000) < 2_280 * 20_000
