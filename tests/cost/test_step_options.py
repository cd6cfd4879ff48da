"""What a step may be beside plain LoRA: adapters, accumulation, checkpointing, cached activations, optimizers."""

import json

import numpy as np
import pytest

from fedsim.cli import main
from fedsim.cost.device import load_profile
from fedsim.cost.estimate import estimate, estimate_step
from fedsim.cost.memory import saved_bytes
from fedsim.cost.setting import StepSetting, kept_sums
from fedsim.cost.shapes import load_shape
from fedsim.cost.workload import step_work
from fedsim.errors import ConfigError

BERT, TX2 = load_shape("bert-base"), load_profile("jetson-tx2")


def work(shape=BERT, rank=8, **changes):
    return step_work(shape, [1.0], [1.0], rank, StepSetting(4, 64, **changes))


def test_a_bottleneck_is_two_products_whose_backward_is_twice_their_forward():
    wide, narrow = work(tuning="adapter", adapter_width=64), work(tuning="adapter", adapter_width=32)
    assert wide.flops - narrow.flops == 12 * 3 * 2 * 256 * 2 * 768 * 32
    assert wide.launches == narrow.launches


def test_an_adapter_sends_its_weights_and_biases():
    numbers = estimate_step(TX2, BERT, StepSetting(4, 64, tuning="adapter", adapter_width=16, train_top_layers=3))
    assert numbers["upload_bytes"] == 4 * (3 * (2 * 768 * 16 + 16 + 768) + BERT.head_weights)


def test_an_adapter_step_lies_between_inference_and_full_tuning():
    adapter = work(tuning="adapter", adapter_width=64)
    for field in ("flops", "memory_bytes", "launches", "peak_memory_bytes"):
        low, high = getattr(work(tuning="inference"), field), getattr(work(tuning="full"), field)
        # What adapters launch beside the backbone: four operations forward and eight backward, in each layer.
        assert low < getattr(adapter, field) <= high + (field == "launches") * 12 * 12


def test_accumulation_repeats_batches_and_not_the_update():
    one, eight = work(), work(micro_batches=8)
    assert eight.flops == 8 * one.flops
    assert 7.5 * one.memory_bytes < eight.memory_bytes < 8 * one.memory_bytes
    assert 7 * one.launches < eight.launches < 8 * one.launches
    assert eight.peak_memory_bytes == one.peak_memory_bytes
    assert estimate_step(TX2, BERT, StepSetting(4, 64, micro_batches=8))["samples_per_s"] == pytest.approx(
        32 / estimate_step(TX2, BERT, StepSetting(4, 64, micro_batches=8))["step_time_s"]
    )


def test_checkpointing_trades_a_forward_of_the_trained_layers_for_memory():
    plain, thrifty = work(), work(checkpointing=True)
    forward = work(tuning="inference").flops - 2 * 4 * BERT.head_weights
    assert thrifty.flops - plain.flops == pytest.approx(float(forward), rel=1e-12)
    assert thrifty.peak_memory_bytes < plain.peak_memory_bytes
    setting = StepSetting(4, 64, checkpointing=True)
    kept = kept_sums(BERT, setting, [1.0], [1.0])
    one_layer = saved_bytes(BERT, StepSetting(4, 64), kept) / 12
    assert float(saved_bytes(BERT, setting, kept)) == pytest.approx(float(one_layer) + 12 * 4 * 256 * 768)


def test_cached_activations_leave_only_the_top_layers():
    """Six of twelve layers cached cost about what the upper half alone does: DistilBERT without its embeddings."""
    cached = work(train_top_layers=6, cached_activations=True)
    half = work(load_shape("distilbert"), train_top_layers=6)
    assert cached.flops == half.flops
    assert cached.launches == half.launches
    assert cached.memory_bytes < half.memory_bytes
    assert half.peak_memory_bytes - cached.peak_memory_bytes == 4 * BERT.embedding_weights
    none = work(train_top_layers=0, cached_activations=True)
    assert none.flops == 3 * 2 * 4 * BERT.head_weights


def test_without_dropout_its_masks_are_not_kept():
    """The published peaks had it on: two hidden-wide copies a layer and the scores, with masks."""
    less = work().peak_memory_bytes - work(dropout=False).peak_memory_bytes
    assert float(less) == pytest.approx(12 * 5 * 256 * (2 * 768 + 12 * 64))


def test_a_loop_over_tensors_moves_and_launches_more():
    fused, loop = work(tuning="full"), work(tuning="full", optimizer="per_tensor")
    assert loop.flops == fused.flops
    assert loop.memory_bytes - fused.memory_bytes == pytest.approx(13 * 4 * 109.0e6, rel=0.01)
    # 16 tensors a layer, 5 of the embeddings and 2 of the head, ten operations each, for the 40 of the fused update.
    assert loop.launches - fused.launches == 10 * (16 * 12 + 5 + 2) - 40


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"micro_batches": 0}, "micro_batches is 0"),
        ({"tuning": "adapter", "adapter_width": 0}, "adapter_width is 0"),
        ({"adapter_width": 8}, "adapter_width is 8 with tuning 'lora'"),
        ({"cached_activations": True}, "cached_activations needs train_top_layers"),
        ({"tuning": "inference", "checkpointing": True}, "checkpointing is not allowed in inference"),
        ({"tuning": "inference", "micro_batches": 2}, "micro_batches is 2; it is not allowed in inference"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; allowed are fused, per_tensor, none"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        StepSetting(4, 64, **changes)


def shown(capsys, *words):
    base = ["estimate", "--device", "jetson-nano", "--batch-size", "1", "--seq-len", "64", "--json"]
    code = main([*base, *words])
    out, err = capsys.readouterr()
    return json.loads(out) if code == 0 else err


def test_the_command_states_a_published_federated_step(capsys):
    """EdgeFlowerTune's update on the wire: LoRA of rank 8 on query, key, value and output of Gemma 3 270M, 2.949 MB."""
    words = ["--model", "gemma-3-270m", "--lora-targets", "query,key,value,attention_out", "--causal-lm"]
    numbers = shown(capsys, *words, "--micro-batches", "8", "--optimizer", "per_tensor")
    assert numbers["upload_bytes"] / 1e6 == pytest.approx(2.949, abs=0.0005)
    assert numbers["step_time_low_s"] <= numbers["step_time_s"] <= numbers["step_time_high_s"]
    assert numbers == estimate(
        device="jetson-nano",
        model="gemma-3-270m",
        batch_size=1,
        seq_len=64,
        causal_lm=True,
        micro_batches=8,
        optimizer="per_tensor",
        lora_roles=frozenset({"query", "key", "value", "attention_out"}),
    )


def test_the_command_takes_every_option(capsys):
    base = ["--model", "bert-base"]
    plain = shown(capsys, *base)
    assert shown(capsys, *base, "--adapter-width", "8")["upload_bytes"] < plain["upload_bytes"]
    assert shown(capsys, *base, "--checkpointing")["step_time_s"] > plain["step_time_s"]
    assert shown(capsys, *base, "--no-dropout")["peak_memory_bytes"] < plain["peak_memory_bytes"]
    top = shown(capsys, *base, "--train-top-layers", "2")
    assert shown(capsys, *base, "--train-top-layers", "2", "--cached-activations")["flops"] < top["flops"]
    assert "unknown" in shown(capsys, *base, "--lora-targets", "quary")
    assert "only allowed where LoRA is tuned" in shown(capsys, *base, "--full", "--lora-targets", "query")
    assert np.isclose(shown(capsys, *base, "--micro-batches", "3")["flops"], 3 * plain["flops"])
