"""Reading, layering and refusing configurations."""

from __future__ import annotations

import re

import pytest
import yaml

from fedsim.errors import ConfigError
from fedsim.methods.base import Method
from fedsim.methods.catalogue import METHODS, register_method
from fedsim.runner.config import (
    build_config,
    config_hash,
    config_yaml,
    find_config,
    load_config,
    parse_overrides,
    read_tree,
)


def test_defaults_of_the_method_lie_below_the_users_keys():
    config = build_config({"method": "fedspine"})
    assert config.control.policy == "sucb"
    assert config.prune.reversible
    assert config.prune.target_scope == "fleet_mean"
    config = build_config({"method": "fedspine", "prune": {"reversible": False}}, {"control.policy": "balanced"})
    assert config.control.policy == "balanced"
    assert not config.prune.reversible
    assert config.prune.target_scope == "fleet_mean"


def test_overrides_beat_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {local_steps: 7, learning_rate: 2e-3}\n")
    config = load_config(path, parse_overrides(["train.local_steps=9", "data.alpha=1", "server.clients_per_round=all"]))
    assert config.train.local_steps == 9
    assert config.train.learning_rate == 2e-3
    assert config.data.alpha == 1.0


def test_overrides_do_not_leak_into_the_callers_mapping():
    tree = {"fleet": {"clients": 6}}
    assert build_config(tree, {"fleet.clients": 3, "train.local_steps": 5}).fleet.clients == 3
    assert tree == {"fleet": {"clients": 6}}


def test_resolved_yaml_reads_back_as_the_same_configuration():
    config = build_config({"method": "fedlora", "reward": {"weights": [1, 0, 0.5]}})
    again = build_config(yaml.safe_load(config_yaml(config)))
    assert again == config
    assert config_hash(again) == config_hash(config)
    assert config_hash(build_config({"method": "fedlora"})) != config_hash(config)


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "experiments/quickstart.yaml"])
def test_presets_are_found_by_name(name):
    assert find_config(name).name == "quickstart.yaml"


@pytest.mark.parametrize("name", ["sst2-minilm/base", "experiments/sst2-minilm/base.yaml"])
def test_presets_of_studies_are_found_by_folder_and_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name).parts[-2:] == ("sst2-minilm", "base.yaml")
    with pytest.raises(ConfigError, match=r"quickstart,.* sst2-minilm/base"):
        find_config("base")


@pytest.mark.parametrize("weights", [[1, 2], [1, 2, 3, 4], 3])
def test_a_list_of_the_wrong_length_says_how_many(weights):
    said = re.escape(f"reward.weights: value {weights} is not allowed (it should be a list of 3 numbers)")
    with pytest.raises(ConfigError, match=said):
        build_config({"reward": {"weights": weights}})


def test_a_file_beside_a_preset_s_data_name_says_how_to_take_the_name_away():
    with pytest.raises(ConfigError, match=r"data.path: value 'a.tsv' .* data.name = 'synthetic' .*data.name=null"):
        build_config({"data": {"name": "synthetic", "path": "a.tsv"}})


def test_packaged_quickstart_is_the_issue_size():
    config = load_config("quickstart")
    assert config.fleet.name == "fedspine-80"
    assert config.server.rounds >= 30
    assert config.server.clients_per_round == "all"
    assert config.train.local_steps >= 5
    assert config.train.batch_size >= 8
    assert config.server.rounds // config.evaluate.every_rounds >= 10
    assert config.cost.model == "roberta-base"


REFUSED = [
    ({"trian": {}}, r"unknown key 'trian'; did you mean 'train'\?"),
    (
        {"train": {"local_step": 3}},
        r"unknown key 'train.local_step'; did you mean 'local_steps'\? \(allowed in section",
    ),
    ({"train": {"local_steps": 0}}, r"train.local_steps: value 0 is not allowed .*greater than or equal to 1"),
    ({"train": {"local_steps": "ten"}}, r"train.local_steps: value 'ten' is not allowed .*integer"),
    ({"train": {"local_steps": True}}, r"train.local_steps: value True is not allowed"),
    ({"train": {"learning_rate": float("nan")}}, r"train.learning_rate: value nan"),
    ({"train": {"engine": "magic"}}, r"train.engine: value 'magic' is not allowed .*'reference'"),
    ({"server": {"clients_per_round": "some"}}, r"server.clients_per_round: value 'some'"),
    ({"server": {"mode": "asink"}}, r"unknown server.mode 'asink'; did you mean 'async'\?"),
    ({"server": {"buffer": 4}}, r"server.buffer: value 4 is not allowed with server.mode sync"),
    ({"server": {"mode": "async", "buffer": 4}}, r"server.buffer: value 4 .*mode async \(only with semi_async"),
    (
        {"server": {"staleness": {"rule": "hinge"}}},
        r"server.staleness: value hinge is not allowed with server.mode sync",
    ),
    ({"server": {"mode": "async", "staleness": {"rule": "cubic"}}}, r"server.staleness.rule: value 'cubic'"),
    ({"server": {"mode": "async", "clock": "arrays"}}, r"server.clock: value 'arrays' is not allowed with .*async"),
    ({"server": {"mode": "async", "mix": 0.0}}, r"server.mix: value 0.0"),
    (
        {"server": {"mode": "async"}, "prune": {"selection": "global"}},
        r"prune.selection: value 'global' is not allowed with server.mode async \(.*known only once it is trained",
    ),
    (
        {"server": {"mode": "semi_async"}, "method": "flora"},
        r"aggregate.rule: value 'stack' is not allowed with server.mode semi_async \(.*needs whole rounds",
    ),
    (
        {"server": {"mode": "async"}, "method": "tune_then_prune"},
        r"method: value 'tune_then_prune' is not allowed with server.mode async \(it cuts the whole fleet",
    ),
    ({"train": {"engine": "reference", "precision": "bf16"}}, r"train.precision: value .bf16. is not allowed"),
    ({"server": {"over_selection": 0.5}}, r"server.over_selection: value 0.5 .*clients_per_round all"),
    ({"prune": {"target": 1.0}}, r"prune.target: value 1.0 is not allowed .*less than 1"),
    ({"prune": {"target": -0.1}}, r"prune.target: value -0.1"),
    ({"train": 5}, r"train: value 5 is not allowed \(it should be a section"),
    ({"method": "fedspin"}, r"unknown method 'fedspin'; did you mean 'fedspine'\?"),
    ({"method": 3}, r"method: value 3"),
    ({"model": {"lora_rank": 64}}, r"model.lora_rank: value 64 is not allowed .*lora_rank_max = 32"),
    ({"train": {"local_steps": 4, "recovery_steps": 4}}, r"train.recovery_steps: value 4"),
    ({"train": {"local_steps": 4}, "prune": {"importance_every": 4}}, r"prune.importance_every: value 4"),
    ({"prune": {"warmup_rounds": 10, "end_round": 10}}, r"prune.end_round: value 10"),
    ({"server": {"rounds": 10}, "prune": {"end_round": 11}}, r"prune.end_round: value 11"),
    ({"prune": {"target": 0.9}}, r"prune.max_ratio: value 0.8"),
    ({"model": {"lora_targets": ["query"]}}, r"model.lora_targets: value \['query'\]"),
    ({"aggregate": {"rule": "average_factors"}}, r"aggregate.rule: value 'average_factors'"),
    ({"data": {"name": "synthetic", "path": "x.tsv"}}, r"data.path: value 'x.tsv'"),
    ({"data": {"task": "causal_lm"}, "model": {"pooling": "mean"}}, r"model.pooling: value 'mean' .*causal_lm"),
    ({"reward": {"weights": [1, 2]}}, r"reward.weights"),
    ({"seed": 2**64}, r"seed: value 18446744073709551616 is not allowed .*less than"),
    ({"train": {"threads": 100_000}}, r"train.threads: value 100000 is not allowed .*1024"),
    ({"train": {"torch_device": "gpu"}}, r"train.torch_device: value 'gpu' is not allowed \(auto, cpu, cuda or cuda:N"),
]


@pytest.mark.parametrize(("tree", "pattern"), REFUSED, ids=lambda value: None)
def test_refusals_are_one_sentence_naming_field_value_and_what_is_allowed(tree, pattern):
    with pytest.raises(ConfigError) as caught:
        build_config(tree)
    message = str(caught.value)
    assert re.search(pattern, message), message
    assert "\n" not in message


def test_all_that_is_wrong_is_said_at_once_and_how_to_mend_it():
    tree = {"server": {"rounds": 4}, "prune": {"warmup_rounds": 6, "end_round": 24}, "train": {"torch_device": "gpu"}}
    with pytest.raises(ConfigError) as caught:
        build_config(tree)
    first, second, third = str(caught.value).splitlines()
    assert "prune.warmup_rounds: value 6 is not allowed (less than server.rounds = 4; null takes" in first
    assert "and prune.end_round: value 24" in second
    assert "train.torch_device" in third
    mended = build_config({**tree, "prune": {"warmup_rounds": None, "end_round": None}, "train": {}})
    assert (mended.prune_warmup_rounds, mended.prune_end_round) == (1, 3)
    with pytest.raises(ConfigError, match=r"server.rounds: value 'six'.*\n.*train.local_steps: value 'no'"):
        build_config({"server": {"rounds": "six"}, "train": {"local_steps": "no"}})


def test_unreadable_files_are_refused(tmp_path):
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        read_tree(empty)
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [1,\n")
    with pytest.raises(ConfigError, match="not readable YAML"):
        read_tree(broken)
    twice = tmp_path / "twice.yaml"
    twice.write_text("seed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match="'seed' is there twice"):
        read_tree(twice)
    listed = tmp_path / "list.yaml"
    listed.write_text("- 1\n")
    with pytest.raises(ConfigError, match="mapping"):
        read_tree(listed)
    with pytest.raises(ConfigError, match=r"no configuration file 'nowhere\.yaml'"):
        find_config("nowhere.yaml")


@pytest.mark.parametrize("item", ["train.local_steps", "=3", "seed=[1"])
def test_bad_overrides_are_refused(item):
    with pytest.raises(ConfigError, match="override"):
        parse_overrides([item])


def test_a_key_below_a_single_value_is_refused():
    with pytest.raises(ConfigError, match=r"'seed' is a single value, so 'seed.x' cannot be set"):
        build_config({"seed": 1}, {"seed.x": 1})


def test_a_registered_method_is_usable_by_name(monkeypatch):
    mine = Method("mine", "a test", (), prunes=False, defaults={"control.policy": "uniform"})
    with pytest.raises(ConfigError, match="exists already"):
        register_method("fedlora", mine)
    monkeypatch.setitem(METHODS, "mine", mine)  # registered, and gone again after the test
    assert build_config({"method": "mine"}).control.policy == "uniform"


def test_labels_say_what_is_reconstruction():
    assert METHODS["fedspine"].labels == ("reconstruction",)
    assert METHODS["fedlora"].labels == ()
    assert all(name == method.name for name, method in METHODS.items())


def test_only_a_method_of_that_name_can_be_registered():
    with pytest.raises(ConfigError, match="needs a fedsim.Method"):
        register_method("wrong", "a string")
    with pytest.raises(ConfigError, match="whose name is 'other'"):
        register_method("other", Method("mine", "a test", (), prunes=False, defaults={}))


def test_a_method_s_options_are_checked_and_written_out():
    assert build_config({"method": "fedlora"}).method_options == {}
    assert build_config({"method": "hetlora"}).method_options == {"rank_decay": 0.99, "rank_penalty": 0.005}
    own = build_config({"method": "hetlora"}, {"method_options.rank_decay": 0.5})
    assert own.method_options == {"rank_decay": 0.5, "rank_penalty": 0.005}
    assert build_config(own.model_dump(mode="json")) == own


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (
            {"method_options": {"rank_decai": 1}},
            r"'method_options\.rank_decai'; did you mean 'rank_decay'\?",
        ),
        ({"method_options": {"rank_decay": 2}}, r"method_options\.rank_decay: value 2 is not allowed"),
        ({"method_options": 3}, r"method_options: value 3 is not allowed"),
        ({"method": "fedlora", "method_options": {"rank_decay": 0.5}}, r"unknown key 'method_options\.rank_decay'"),
        ({"method": "fedlora", "train": {"rank_decay": 0.5}}, r"unknown key 'train\.rank_decay'"),
    ],
)
def test_options_that_the_method_has_not_are_named(tree, said):
    with pytest.raises(ConfigError, match=said):
        build_config({"method": "hetlora", **tree})


def test_keys_of_earlier_versions_are_read():
    before = {"method": "hetlora", "train": {"rank_decay": 0.9, "rank_penalty": 0.1, "local_steps": 7}}
    config = build_config(before)
    assert config.method_options == {"rank_decay": 0.9, "rank_penalty": 0.1}
    assert config.train.local_steps == 7
    assert before["train"]["rank_decay"] == 0.9
    assert build_config({"method": "fedlora", "train": {"rank_decay": 1.0, "rank_penalty": 0.0}}).method_options == {}
