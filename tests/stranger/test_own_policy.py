"""A policy of one's own: whoever took longer than the fleet's mean last time works at the lowest rank."""

import json

import numpy as np
import pytest

import fedsim
from fedsim.contracts.control import Arms
from fedsim.errors import ConfigError
from fedsim.plots import write_regret_figures
from fedsim.study.reward_terms import missing_losses


class SlowAtLowRank:
    def __init__(self, inputs):
        self.ranks, self.time_s = inputs.ask.ranks, np.zeros(inputs.clients)

    def select(self, context):
        slow = self.time_s[context.clients] > self.time_s.mean()
        ratio = np.clip(context.schedule_ratio, context.ratio_low, context.ratio_high)
        return Arms(ratio, np.where(slow, self.ranks[0], self.ranks[-1]))

    def update(self, feedback):
        self.time_s[feedback.clients[feedback.arrived]] = feedback.time_s[feedback.arrived]

    def state(self):
        return {"time_s": self.time_s.copy()}

    def restore(self, state):
        self.time_s = state["time_s"].copy()


TIMING = {"method": "fedspine_uniform", "fleet": {"clients": 6}, "server": {"rounds": 4}, "train": {"engine": "none"}}


def test_it_decides_and_is_judged_as_the_package_s_own_are(tmp_path):
    fedsim.register_policy("mine", SlowAtLowRank, reads_rewards=False)
    run = fedsim.run(TIMING, out=tmp_path / "run", quiet=True, control__policy="mine")
    rows = run.client_rounds
    time_s = rows[["download_s", "compute_s", "upload_s"]].sum(axis=1).to_numpy().reshape(4, 6)
    slow = time_s[:-1] > time_s[:-1].mean(axis=1, keepdims=True)
    ranks = rows["lora_rank"].to_numpy().reshape(4, 6)
    assert (ranks[0] == 32).all()
    np.testing.assert_array_equal(ranks[1:], np.where(slow, 2, 32))
    assert missing_losses(run) is None  # rewards do not teach it, so it lacks nothing
    assert (tmp_path / "figures/regret_summary.csv") in write_regret_figures([run], tmp_path / "figures")


def test_its_facts_are_heeded(tmp_path):
    fedsim.register_policy("taught", SlowAtLowRank)
    taught = fedsim.run(TIMING, out=tmp_path / "taught", quiet=True, control__policy="taught")
    assert "no learning term" in missing_losses(taught)
    equal = {"aggregate.rule": "average_factors", "model.lora_rank": 4, "model.lora_rank_max": 4}
    with pytest.raises(ConfigError, match=r"average_factors' is not allowed with control\.policy 'taught'"):
        fedsim.run(TIMING, out=tmp_path / "refused", **equal, **{"control.policy": "taught"})


def test_one_rank_for_all_is_that_of_the_global_adapter_too(tmp_path):
    class AllAlike(SlowAtLowRank):
        def select(self, context):
            return Arms(context.ratio_low, np.full(len(context.clients), 4))

    fedsim.register_policy("alike", AllAlike, one_rank=True, reads_rewards=False, explores=False)
    small = {"local_steps": 2, "batch_size": 4, "max_length": 16}
    tree = {"method": "fedlora", "fleet": {"clients": 3}, "server": {"rounds": 2}, "train": small}
    tree |= {"data": {"max_samples": 60}, "model": {"lora_rank": 4, "lora_rank_max": 8}}
    run = fedsim.run(tree, out=tmp_path / "run", quiet=True, control__policy="alike")
    assert json.loads((run.path / "adapter" / "adapter_config.json").read_text())["r"] == 4
