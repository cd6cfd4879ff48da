"""Seconds and joules: additive, never zero, the keys of the command line."""

import json

import numpy as np
import pytest

from fedsim.cost.describe import estimate_text
from fedsim.cost.device import Rates, load_profile
from fedsim.cost.estimate import busy_energy_joules, compute_time, estimate, estimate_step, fits_memory
from fedsim.cost.shapes import load_shape
from fedsim.cost.workload import StepSetting, StepWork
from fedsim.errors import ConfigError, ProfileError
from fedsim.resources import resource_folder

TX2, BERT = load_profile("jetson-tx2"), load_shape("bert-base")
KEYS = [
    "step_time_s",
    "step_time_low_s",
    "step_time_high_s",
    "compute_s",
    "memory_s",
    "launch_s",
    "peak_memory_bytes",
    "energy_j",
    "flops",
    "memory_bytes",
    "upload_bytes",
    "fits_memory",
    "samples_per_s",
]


def rates(**changes):
    numbers = {
        "flops_per_s": 100.0,
        "memory_bytes_per_s": 50.0,
        "seconds_per_launch": 0.5,
        "busy_power_watts": 10.0,
        "idle_power_watts": 2.0,
        "radio_power_watts": 3.0,
        "usable_memory_bytes": 1000.0,
    }
    return Rates(**(numbers | changes))


def step(flops=200.0, moved=100.0, launches=4.0, peak=1000.0):
    return StepWork(*(np.asarray(value) for value in (flops, moved, launches, peak)))


def test_time_is_the_sum_of_three_terms():
    time = compute_time(step(), rates())
    assert (time.compute_s, time.memory_s, time.launch_s, time.total_s) == (2, 2, 2, 6)
    assert busy_energy_joules(time.total_s, rates()) == 60
    assert fits_memory(np.array([1000.0, 1000.5]), rates()).tolist() == [True, False]


def test_time_broadcasts_clients_over_arms():
    time = compute_time(step(flops=np.array([100.0, 200.0, 300.0])), rates(flops_per_s=np.array([[1.0], [2.0]])))
    assert time.compute_s.tolist() == [[100, 200, 300], [50, 100, 150]]


@pytest.mark.parametrize("field", ["flops_per_s", "memory_bytes_per_s", "seconds_per_launch"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_no_rate_is_an_error(field, value):
    with pytest.raises(ProfileError, match=field):
        compute_time(step(), rates(**{field: np.array([1.0, value])}))


@pytest.mark.parametrize("work", [step(0.0, 0.0, 0.0), step(flops=float("nan"))])
def test_a_missing_compute_time_is_an_error(work):
    with pytest.raises(ValueError, match="compute time must be positive"):
        compute_time(work, rates())


@pytest.mark.parametrize("tuning", ["lora", "full", "inference"])
def test_estimate_has_exactly_the_keys_and_adds_up(tuning):
    numbers = estimate_step(TX2, BERT, StepSetting(4, 256, tuning=tuning))
    assert list(numbers) == KEYS
    assert numbers["step_time_s"] == pytest.approx(numbers["compute_s"] + numbers["memory_s"] + numbers["launch_s"])
    assert numbers["samples_per_s"] == pytest.approx(4 / numbers["step_time_s"])
    assert numbers["energy_j"] == pytest.approx(12 * numbers["step_time_s"])
    assert json.loads(json.dumps(numbers)) == numbers
    assert all(word in estimate_text(numbers) for word in ("time of a step", "GFLOP", "fits in memory"))


def test_upload_by_tuning():
    def upload(**changes):
        return estimate_step(TX2, BERT, StepSetting(4, 64, **changes), lora_rank=8)["upload_bytes"]

    head = BERT.head_weights
    assert upload(tuning="inference") == 0
    assert upload() == 4 * (12 * (4 * 1536 + 2 * 3840) * 8 + head)
    assert upload(train_top_layers=3) == 4 * (3 * (4 * 1536 + 2 * 3840) * 8 + head)
    assert upload(tuning="full", train_top_layers=0) == 4 * head
    assert upload(tuning="full") == 4 * (BERT.prunable_weights + BERT.embedding_weights + head)


def test_pruning_saves_time_memory_and_traffic():
    full, half = (estimate_step(TX2, BERT, StepSetting(4, 256), prune_ratio=ratio) for ratio in (0.0, 0.5))
    for key in ("step_time_s", "compute_s", "memory_s", "peak_memory_bytes", "upload_bytes", "energy_j"):
        assert half[key] < full[key]
    assert half["launch_s"] == full["launch_s"]
    assert 0.5 < half["compute_s"] / full["compute_s"] < 0.55


def test_what_does_not_fit_is_said():
    assert not estimate_step(TX2, load_shape("llama-7b"), StepSetting(1, 128))["fits_memory"]
    assert estimate_step(TX2, BERT, StepSetting(1, 128))["fits_memory"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prune_ratio": 1.0}, "prune_ratio is 1; bert-base allows 0 to 0.97"),
        ({"prune_ratio": -0.1}, "prune_ratio is -0.1"),
        ({"lora_rank": 0}, "lora_rank is 0; bert-base allows 1 to 768"),
        ({"lora_rank": 769}, "lora_rank is 769"),
    ],
)
def test_bad_arguments_are_named(arguments, said):
    with pytest.raises(ConfigError, match=said):
        estimate_step(TX2, BERT, StepSetting(4, 64), **arguments)


def test_trained_layers_make_no_sense_in_inference():
    with pytest.raises(ConfigError, match="train_top_layers is 2; it is not allowed in inference"):
        estimate(
            device="jetson-tx2", model="bert-base", batch_size=1, seq_len=8, tuning="inference", train_top_layers=2
        )


def test_by_names_and_from_a_file_as_by_records(tmp_path):
    path = tmp_path / "board.yaml"
    path.write_text((resource_folder("device_profiles") / "jetson-tx2.yaml").read_text())
    named = {"batch_size": 2, "seq_len": 16, "mode": "Max-Q", "lora_rank": 4, "prune_ratio": 0.25, "precision": "fp16"}
    expected = estimate_step(TX2, BERT, StepSetting(2, 16, "fp16"), "Max-Q", 4, 0.25)
    for device in ("jetson-tx2", str(path)):
        assert estimate(device=device, model="bert-base", **named) == expected
