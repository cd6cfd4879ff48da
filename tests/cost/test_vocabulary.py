"""What a language model's output over its vocabulary adds to the clock."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from fedsim.contracts.program import LocalProgram, Phase
from fedsim.cost.ask import JobSetting, ShapeAsk
from fedsim.cost.device import load_profile
from fedsim.cost.estimate import estimate_step
from fedsim.cost.memory import FRAMEWORK_BYTES, LOGIT_GROWTH
from fedsim.cost.shapes import load_shape
from fedsim.cost.workload import StepSetting, step_work
from fedsim.errors import ModelError
from fedsim.structure import ModelShape

LLAMA = ModelShape("x", "llama", 2, 8, 4, 2, 4, 12, vocab=50, positions=0, labels=0, gated=True)
TUNINGS = pytest.mark.parametrize("tuning", ["inference", "lora", "full"])


class Bare(ModelShape):
    """Blocks and embeddings alone."""

    is_language_model = False
    head_weights = 0


BARE = Bare("x", "llama", 2, 8, 4, 2, 4, 12, vocab=50, positions=0, labels=0, gated=True)


def both(setting: StepSetting, shape: ModelShape = LLAMA):
    """Work with and without the output."""
    return (step_work(one, [0.5], [0.5], 4, setting) for one in (shape, BARE))


@TUNINGS
def test_products_with_the_vocabulary_are_counted_for_every_token(tuning):
    """One product forward; one back through frozen weights; a third for their own gradient in full tuning."""
    with_output, bare = both(StepSetting(3, 7, tuning=tuning))
    once = 2 * (3 * 7) * 8 * 50
    assert float(with_output.flops - bare.flops) == once * {"inference": 1, "lora": 2, "full": 3}[tuning]
    assert float(with_output.launches) == float(bare.launches)


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("fp16", 2)])
def test_bytes_are_those_of_weights_hidden_states_and_logits(precision, size):
    tokens = 21
    product = size * (50 * 8 + tokens * (8 + 50))
    with_output, bare = both(StepSetting(3, 7, precision, "inference"))
    assert float(with_output.memory_bytes - bare.memory_bytes) == product
    with_output, bare = both(StepSetting(3, 7, precision, "lora"))
    casts = 0 if size == 4 else 2 * (2 + 4)
    loss = (6 * 4 + casts) * tokens * 50
    assert float(with_output.memory_bytes - bare.memory_bytes) == 2 * product + loss


@pytest.mark.parametrize("tied", [False, True])
def test_memory_holds_the_logits_and_the_weights_where_they_are_its_own(tied):
    shape = replace(LLAMA, tied=tied)
    weights = 0 if tied else 4 * 50 * 8
    with_output, bare = both(StepSetting(3, 7, tuning="inference"), shape)
    added = float(with_output.peak_memory_bytes - bare.peak_memory_bytes)
    assert added == pytest.approx(weights + 4 * 21 * 50, rel=1e-6)
    with_output, bare = both(StepSetting(3, 7), shape)
    added = float(with_output.peak_memory_bytes - bare.peak_memory_bytes)
    assert added == pytest.approx(weights + LOGIT_GROWTH * 2 * 4 * 21 * 50, rel=1e-6)
    assert float(bare.peak_memory_bytes) > FRAMEWORK_BYTES


def test_nothing_below_it_trained_needs_no_backward_product():
    with_output, bare = both(StepSetting(3, 7, train_top_layers=0))
    assert float(with_output.flops - bare.flops) == 2 * 21 * 8 * 50


def test_a_job_pays_for_the_output_on_every_step_whatever_is_pruned_and_sends_none_of_it():
    phases = (Phase(3, 1e-3, estimate=True), Phase(2, 1e-3, estimate=True, cut_before=True))
    job = JobSetting.of(LocalProgram(phases), StepSetting(3, 7), 2, sends_scores=True)
    asks = [ShapeAsk(shape, shape, job, (2, 4)).work([0.0, 0.0, 0.5], [0.0, 0.5, 0.5], 2) for shape in (LLAMA, BARE)]
    np.testing.assert_allclose(asks[0].flops - asks[1].flops, 5 * 2 * 2 * 21 * 8 * 50, rtol=1e-12)
    np.testing.assert_array_equal(asks[0].upload_bytes, asks[1].upload_bytes)
    np.testing.assert_array_equal(asks[0].download_bytes, asks[1].download_bytes)


def test_at_tinyllamas_size_the_output_is_a_small_share_of_time_and_a_large_one_of_memory():
    """32,000 x 2048 of 1.03 G weights: 6% of the forward products; at 512 tokens logits take 0.20 GB at the peak."""
    tx2, setting = load_profile("jetson-tx2"), StepSetting(1, 512, "fp16")
    tokens, classes = (estimate_step(tx2, load_shape("tinyllama-1.1b", labels), setting) for labels in (0, 2))
    assert 1.02 < tokens["step_time_s"] / classes["step_time_s"] < 1.12
    assert 0.19e9 < tokens["peak_memory_bytes"] - classes["peak_memory_bytes"] - 2 * 32000 * 2048 < 0.3e9


@pytest.mark.parametrize("name", ["bert-base", "roberta-base", "minilm", "tiny"])
def test_an_encoder_cannot_predict_tokens(name):
    with pytest.raises(
        ModelError, match=rf"model '{name}' is of type '(ro)?berta?', an encoder.*allowed types: llama, qwen2"
    ):
        load_shape(name, labels=0)


def test_whether_the_output_is_tied_comes_from_the_configuration(tmp_path):
    config = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 4, "num_hidden_layers": 1}
    config |= {"intermediate_size": 12, "vocab_size": 50}
    for tied in (True, False, None):
        file = tmp_path / "config.json"
        file.write_text(json.dumps(config if tied is None else config | {"tie_word_embeddings": tied}))
        shape = load_shape(str(tmp_path), labels=0)
        assert shape.tied is bool(tied)
        assert (shape.head_weights, shape.output_weights) == (0, 400)
        assert shape.all_weights == shape.prunable_weights + 400 * (1 if tied else 2)
    assert load_shape("llama-7b").output_weights == 0
