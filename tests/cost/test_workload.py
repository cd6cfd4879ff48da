"""Counting rules: a slow sum over single matrix products against the fast formulas, and what must follow from them."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.cost import workload
from fedsim.cost.shapes import load_shape
from fedsim.cost.workload import StepSetting, importance_work, kept_sums, linear_roles, slicing_work, step_work
from fedsim.errors import ConfigError
from fedsim.structure import ModelShape

LLAMA = ModelShape("gqa", "llama", 3, 48, 6, 2, 8, 100, vocab=50, positions=0, labels=3, gated=True)
ROBERTA = ModelShape("rob", "roberta", 4, 32, 4, 4, 8, 64, vocab=60, positions=20, labels=2, pooler_width=32)


ROLES = frozenset({"query", "key", "value", "attention_out", "gate", "up", "down"})


def layer_products(shape, heads, channels, batch, length):
    """One layer's products as (rows, inner, columns, role), role None for scores; widths really kept."""
    tokens, groups = batch * length, round(heads * shape.kv_heads)
    queries = groups * (shape.heads // shape.kv_heads)
    width, key_width, ffn = queries * shape.head_dim, groups * shape.head_dim, round(channels * shape.ffn)
    products = [(tokens, shape.hidden, width, "query")]
    products += [(tokens, shape.hidden, key_width, role) for role in ("key", "value")]
    for _ in range(batch * queries):
        products += [(length, shape.head_dim, length, None), (length, length, shape.head_dim, None)]
    products.append((tokens, width, shape.hidden, "attention_out"))
    products += [(tokens, shape.hidden, ffn, role) for role in (("gate", "up") if shape.gated else ("up",))]
    products.append((tokens, ffn, shape.hidden, "down"))
    return products


def slow_flops(shape, heads, channels, rank, setting):
    """Every product of forward and backward, one by one. heads, channels: one fraction per layer."""
    trained = {"inference": 0, "full": shape.layers, "lora": shape.layers}[setting.tuning]
    if setting.train_top_layers is not None and trained:
        trained = setting.train_top_layers
    embeddings = setting.tuning == "full" and trained == shape.layers
    lowest = shape.layers - trained
    total = 0
    for layer in range(shape.layers):
        for m, k, n, role in layer_products(shape, heads[layer], channels[layer], setting.batch_size, setting.seq_len):
            once = 2 * m * k * n
            total += once
            if layer < lowest or setting.tuning == "inference":
                continue
            input_gradient = not (layer == lowest and role in ("query", "key", "value") and not embeddings)
            weight_gradient = role is None or setting.tuning == "full"
            total += once * (input_gradient + weight_gradient)
            if setting.tuning == "lora" and role in (setting.lora_roles or ROLES):
                down, up = 2 * m * k * rank, 2 * m * rank * n
                total += 3 * (down + up)
    classifier = 2 * setting.batch_size * shape.head_weights
    return total + classifier * (1 if setting.tuning == "inference" else 3)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_flops_equal_a_slow_sum_over_products(data):
    shape = data.draw(st.sampled_from([LLAMA, ROBERTA]))
    tuning = data.draw(st.sampled_from(["lora", "full", "inference"]))
    top = data.draw(st.none() | st.integers(0, shape.layers))
    roles = data.draw(st.none() | st.sets(st.sampled_from(sorted(linear_roles(shape))), min_size=1).map(frozenset))
    setting = StepSetting(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9)), "fp32", tuning, top, roles)
    groups = data.draw(st.lists(st.integers(1, shape.kv_heads), min_size=shape.layers, max_size=shape.layers))
    kept = data.draw(st.lists(st.integers(1, shape.ffn), min_size=shape.layers, max_size=shape.layers))
    rank = data.draw(st.integers(1, 8))
    heads, channels = np.array(groups) / shape.kv_heads, np.array(kept) / shape.ffn
    fast = step_work(shape, heads, channels, rank, setting)
    assert float(fast.flops) == pytest.approx(slow_flops(shape, heads, channels, rank, setting), rel=1e-12)


@pytest.mark.parametrize("tuning", ["lora", "full", "inference"])
@pytest.mark.parametrize("top", [None, 0, 1, 3])
@pytest.mark.parametrize("shape", [LLAMA, ROBERTA])
def test_equal_layers_may_be_given_once(shape, top, tuning):
    setting = StepSetting(2, 8, "fp32", tuning, top)
    once = step_work(shape, [0.5], [0.25], 4, setting)
    each = step_work(shape, [0.5] * shape.layers, [0.25] * shape.layers, 4, setting)
    for field in ("flops", "memory_bytes", "launches", "peak_memory_bytes"):
        assert getattr(once, field) == pytest.approx(getattr(each, field), rel=1e-12)


def test_arrays_broadcast_over_leading_axes_as_single_calls():
    setting = StepSetting(2, 8)
    heads, channels, ranks = np.array([0.25, 0.5, 1.0])[:, None, None], np.array([[[0.5]]]), np.array([2, 8])
    grid = step_work(ROBERTA, heads, channels, ranks, setting)
    assert grid.flops.shape == grid.launches.shape == grid.peak_memory_bytes.shape == (3, 2)
    for i, j in np.ndindex(3, 2):
        one = step_work(ROBERTA, [heads[i, 0, 0]], [0.5], ranks[j], setting)
        assert grid.flops[i, j] == one.flops
        assert grid.memory_bytes[i, j] == one.memory_bytes
        assert grid.peak_memory_bytes[i, j] == one.peak_memory_bytes


@pytest.mark.parametrize("tuning", ["lora", "full", "inference"])
def test_pruning_shrinks_operations_bytes_and_memory_but_not_launches(tuning):
    setting = StepSetting(4, 32, "fp32", tuning)
    shares = np.array([[1.0], [0.75], [0.5], [0.25]])
    work = step_work(load_shape("bert-base"), shares, shares, 8, setting)
    for series in (work.flops, work.memory_bytes, work.peak_memory_bytes):
        assert all(more > less for more, less in pairwise(series))
    assert len(set(work.launches.tolist())) == 1


def test_lora_adds_launches_over_frozen_layers_and_rank_adds_none():
    shape = load_shape("bert-base")
    frozen = step_work(shape, [1.0], [1.0], 8, StepSetting(4, 32, train_top_layers=0))
    lora = step_work(shape, [1.0], [1.0], np.array([2, 32]), StepSetting(4, 32))
    full = step_work(shape, [1.0], [1.0], 0, StepSetting(4, 32, tuning="full"))
    per_linear = workload.LORA_LAUNCHES_FORWARD + workload.LORA_LAUNCHES_BACKWARD
    assert lora.launches[0] - full.launches == pytest.approx(12 * 6 * per_linear)
    assert full.launches > frozen.launches
    assert lora.launches[0] == lora.launches[1]
    assert lora.flops[1] > lora.flops[0]


def test_full_tuning_is_three_forwards_and_lora_about_two():
    shape = load_shape("bert-base")
    flops = {
        tuning: float(step_work(shape, [1.0], [1.0], 8, StepSetting(4, 256, tuning=tuning)).flops)
        for tuning in ("inference", "full", "lora")
    }
    assert flops["full"] == pytest.approx(3 * flops["inference"], rel=1e-9)
    assert flops["lora"] / flops["inference"] == pytest.approx(2.0, abs=0.1)
    # Design: 12 layers of 2N(4 h h + 2 h d) + 4 N s h.
    assert flops["inference"] == pytest.approx(
        12 * (2 * 1024 * (4 * 768**2 + 2 * 768 * 3072) + 4 * 1024 * 256 * 768), rel=1e-4
    )


def test_gradients_and_moments_of_full_tuning_need_more_memory_than_lora():
    shape = load_shape("roberta-base")
    peaks = [
        float(step_work(shape, [1.0], [1.0], 8, StepSetting(8, 128, tuning=tuning)).peak_memory_bytes)
        for tuning in ("inference", "lora", "full")
    ]
    assert peaks[0] < peaks[1] < peaks[2]
    weights = 4 * (shape.prunable_weights + shape.embedding_weights)
    assert weights + workload.FRAMEWORK_BYTES < peaks[0] < 1.1 * weights + workload.FRAMEWORK_BYTES


def test_half_precision_moves_and_holds_less_but_computes_as_much():
    shape = load_shape("bert-base")
    single, half = (step_work(shape, [1.0], [1.0], 8, StepSetting(4, 64, precision)) for precision in ("fp32", "fp16"))
    assert half.flops == single.flops
    assert half.memory_bytes < 0.6 * single.memory_bytes
    assert half.peak_memory_bytes < single.peak_memory_bytes


def test_importance_and_slicing_are_work():
    kept = kept_sums(ROBERTA, StepSetting(1, 4), [1.0], [1.0])
    estimate = importance_work(ROBERTA, kept, [2, 8])
    assert (estimate.flops == ROBERTA.prunable_weights * (8 * np.array([2, 8]) + 6)).all()
    assert estimate.launches == 4 * 6 * workload.IMPORTANCE_LAUNCHES
    change = slicing_work(ROBERTA, np.array(1000.0), "fp32")
    assert (change.flops, change.memory_bytes) == (0, 8000)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, 8), "batch_size is 0"),
        ((1, 0), "seq_len is 0"),
        ((1, 8, "int4"), "precision is 'int4'"),
        ((1, 8, "fp32", "prefix"), "tuning is 'prefix'; allowed are lora, full, adapter, inference"),
        ((1, 8, "fp32", "adapter"), "adapter_width is None with tuning 'adapter'"),
        ((1, 8, "fp32", "full", -1), "train_top_layers is -1"),
        ((1, 8, "fp32", "lora", None, frozenset()), "lora_roles is empty; it must name at least one of attention_out"),
        ((1, 8, "fp32", "lora", None, frozenset({"quary"})), "lora_roles: unknown role 'quary'; did you mean 'query'"),
    ],
)
def test_bad_setting_is_named(arguments, said):
    with pytest.raises(ConfigError, match=said):
        StepSetting(*arguments)


def test_more_trained_layers_than_the_model_has():
    with pytest.raises(ConfigError, match="train_top_layers is 5; rob has 4 layers"):
        step_work(ROBERTA, [1.0], [1.0], 1, StepSetting(1, 4, train_top_layers=5))
