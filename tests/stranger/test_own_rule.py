"""An aggregation rule of one's own: half of the way from the previous adapter to the mean of the factors."""

import pytest
import torch
from safetensors.torch import load_file

import fedsim
from fedsim.errors import ConfigError
from fedsim.learn.merge.rules import average_factors
from fedsim.learn.model.adapter import Adapter

SMALL = {
    "method": "fedlora",
    "data": {"max_samples": 60},
    "model": {"lora_rank": 4, "lora_rank_max": 8},
    "fleet": {"clients": 3},
    "server": {"rounds": 1},
    "train": {"local_steps": 2, "batch_size": 4, "max_length": 16},
}
TIMING = {**SMALL, "method": "flora", "train": {"engine": "none"}, "server": {"rounds": 4, "clients_per_round": 2}}


def half_way(merging):
    whole, before = average_factors(merging), merging.previous
    mix = {
        name: tuple((old + new) / 2 for old, new in zip(before.factors[name], factors, strict=True))
        for name, factors in whole.factors.items()
    }
    return Adapter(mix, {name: (before.head[name] + new) / 2 for name, new in whole.head.items()})


def test_it_merges(tmp_path):
    fedsim.register_rule("half_way", half_way, equal_ranks=True)
    runs = [
        fedsim.run(SMALL, out=tmp_path / rule, quiet=True, aggregate__rule=rule)
        for rule in ("average_factors", "half_way")
    ]
    whole, half = (load_file(run.path / "adapter" / "adapter_model.safetensors") for run in runs)
    b = [name for name in whole if "lora_B" in name]  # zero before the first round
    assert len(b) >= 8
    assert all(whole[name].any() and torch.equal(half[name], whole[name] / 2) for name in b)


def test_its_facts_are_heeded(tmp_path):
    fedsim.register_rule("half_way", half_way, equal_ranks=True)
    with pytest.raises(
        ConfigError, match=r"'half_way' is not allowed with control\.policy 'static_rank' \(it needs equal"
    ):
        fedsim.run(TIMING, out=tmp_path / "refused", aggregate__rule="half_way")
    # What clients download hangs on a fact; torch, where the functions are, is not needed for it.
    fedsim.register_rule("stacks", "fedsim.learn.merge.stacked:stack", sends_stacks=True)
    fedsim.register_rule("adapters", "fedsim.learn.merge.stacked:stack")
    down = {
        rule: fedsim.run(TIMING, out=tmp_path / rule, quiet=True, aggregate__rule=rule).rounds["bytes_down"].tolist()
        for rule in ("stack", "stacks", "adapters", "lowrank")
    }
    assert down["stacks"] == down["stack"]
    assert down["adapters"] == down["lowrank"]
    assert down["stacks"] != down["adapters"]
