"""The clock counts LoRA on the targeted Linears only: weights, traffic, launches, bytes, memory; whole runs too."""

import numpy as np
import pytest
from safetensors.numpy import load_file

import fedsim
from fedsim.contracts.program import LocalProgram, Phase
from fedsim.cost import workload
from fedsim.cost.ask import JobSetting, ShapeAsk
from fedsim.cost.device import load_profile
from fedsim.cost.estimate import estimate_step
from fedsim.cost.shapes import load_shape
from fedsim.cost.workload import StepSetting, kept_sums, linear_roles, lora_weights, step_work
from fedsim.errors import ConfigError
from fedsim.learn.model.linears import Role, group_width, kept_columns, kept_rows, prunable_linears
from fedsim.structure import ModelShape, Structure

BASE = load_shape("roberta-base")
GQA = ModelShape("gqa", "llama", 3, 48, 6, 2, 8, 100, vocab=50, positions=0, labels=3, gated=True)
QUERY_VALUE = frozenset({"query", "value"})


def lora_step(*roles, **changes):
    return StepSetting(4, 32, lora_roles=frozenset(roles) or None, **changes)


def job(step):
    return JobSetting.of(LocalProgram((Phase(4, 1e-3),)), step, None, sends_scores=False)


def slow_weights(shape, structure, roles, rank, lowest=0):
    """Factor by factor, from the index arrays by which factors are really cut."""
    total = 0
    for linear in prunable_linears(shape):
        if linear.role in roles and linear.layer >= lowest:
            rows, columns = kept_rows(linear, structure, shape), kept_columns(linear, structure, shape)
            total += rank * (linear.d_out if rows is None else len(rows))
            total += rank * (linear.d_in if columns is None else len(columns))
    return total


def test_role_names_are_the_learners():
    assert linear_roles(GQA) == {role.value for role in Role}
    for shape in (GQA, BASE):
        assert linear_roles(shape) == {linear.role.value for linear in prunable_linears(shape)}
        for linear in prunable_linears(shape):
            assert (linear.role.value in workload.HEAD_ROLES) == (
                group_width(linear, shape)
                == shape.head_dim * (1 if linear.role in (Role.KEY, Role.VALUE) else shape.heads // shape.kv_heads)
            )


def test_query_and_value_of_roberta_base_at_rank_8():
    step = lora_step(*QUERY_VALUE)
    factors = 12 * 2 * 8 * (768 + 768)
    assert factors == 294_912
    assert float(lora_weights(BASE, kept_sums(BASE, step, [1.0], [1.0]), 8)) == factors
    work = ShapeAsk(BASE, BASE, job(step), (2, 8)).work(0.0, 0.0, 8)
    assert float(work.upload_bytes) == float(work.download_bytes) == 4 * (factors + BASE.head_weights)
    numbers = estimate_step(load_profile("jetson-tx2"), BASE, step, lora_rank=8)
    assert numbers["upload_bytes"] == 4 * (factors + BASE.head_weights)


@pytest.mark.parametrize("top", [None, 2])
@pytest.mark.parametrize("shape", [GQA, ModelShape("rob", "roberta", 4, 32, 4, 4, 8, 64, vocab=60, positions=20)])
def test_weights_of_every_role_equal_the_factors_of_uneven_structures(shape, top):
    structure = Structure.full(shape)
    structure.head_mask[0, 1] = structure.head_mask[2, 0] = False
    structure.channel_mask[1, 5:] = structure.channel_mask[2, :9] = False
    heads, channels = structure.heads_kept / shape.head_groups, structure.channels_kept / shape.ffn
    lowest = 0 if top is None else shape.layers - top
    sets = [{role} for role in linear_roles(shape)] + [QUERY_VALUE, {"up", "down"}, linear_roles(shape)]
    for roles in sets:
        kept = kept_sums(shape, lora_step(*roles, train_top_layers=top), heads, channels)
        assert float(lora_weights(shape, kept, 3)) == pytest.approx(
            slow_weights(shape, structure, roles, 3, lowest), rel=1e-12
        ), roles


def test_grouped_queries_have_narrow_keys_and_values():
    kept = kept_sums(GQA, lora_step(*QUERY_VALUE), [1.0], [1.0])
    # Six query heads of 8, two key-value heads of 8, hidden 48.
    assert float(lora_weights(GQA, kept, 4)) == 3 * 4 * ((48 + 48) + (48 + 16))


@pytest.mark.parametrize("shape", [BASE, GQA])
def test_what_a_step_asks_beyond_a_step_without_lora(shape):
    """Bytes, launches, operations and memory of the branch are sums over the Linears that carry it."""
    parts = {role: step_work(shape, [0.5], [0.5], 8, lora_step(role)) for role in sorted(linear_roles(shape))}
    every = step_work(shape, [0.5], [0.5], 8, lora_step())
    named = step_work(shape, [0.5], [0.5], 8, lora_step(*linear_roles(shape)))
    query_value = step_work(shape, [0.5], [0.5], 8, lora_step(*QUERY_VALUE))
    for field in ("flops", "memory_bytes", "launches", "peak_memory_bytes"):
        values = {role: float(getattr(work, field)) for role, work in parts.items()}
        assert float(getattr(named, field)) == float(getattr(every, field))
        # Without LoRA: from the n sets of one role each and the set of all n.
        without = (sum(values.values()) - float(getattr(every, field))) / (len(values) - 1)
        assert float(getattr(query_value, field)) == pytest.approx(
            values["query"] + values["value"] - without, rel=1e-9
        )
        assert without < min(values.values())
    per_linear = workload.LORA_LAUNCHES_FORWARD + workload.LORA_LAUNCHES_BACKWARD
    missing = len(parts) - 2
    assert float(every.launches - query_value.launches) == pytest.approx(shape.layers * missing * per_linear)


def test_a_branch_passes_over_its_own_linears_only():
    step = lora_step("down")
    more = step_work(BASE, [1.0], [1.0], 8, lora_step("down", "up")).memory_bytes
    less = step_work(BASE, [1.0], [1.0], 8, step).memory_bytes
    weights = 12 * 8 * (768 + 3072)
    passes = 4 * workload.LORA_PASSES * step.tokens * 12 * (768 + 3072)
    assert float(more - less) == pytest.approx(passes + workload.ADAMW_PASSES * 4 * weights, rel=1e-9)


def test_a_gate_is_refused_where_there_is_none():
    with pytest.raises(ConfigError, match="lora_roles: roberta-base has no 'gate' \\(allowed: attention_out, down"):
        ShapeAsk(GQA, BASE, job(lora_step("gate", "up")), (2, 8))


RUN = {
    "method": "fedlora",
    "model": {"name": "tiny", "lora_rank": 4, "lora_rank_max": 8},
    "data": {"name": "synthetic", "max_samples": 120},
    "fleet": {"clients": 4},
    "server": {"rounds": 2},
    "train": {"local_steps": 2, "batch_size": 4, "max_length": 16, "engine": "none"},
    "evaluate": {"every_rounds": 2, "panel": 2, "max_samples": 20},
}


def run(out, targets, **sections):
    config = {**RUN, **{name: {**RUN.get(name, {}), **keys} for name, keys in sections.items()}}
    config["model"] = {**config["model"], "lora_targets": targets}
    return fedsim.run(config, out=out, quiet=True)


def test_runs_on_query_and_value_are_faster_and_send_less(tmp_path):
    clock = {"model": "roberta-base", "batch_size": 8, "seq_len": 64}
    every = run(tmp_path / "all", "all", cost=clock)
    named = run(tmp_path / "six", ["query", "key", "value", "dense"], cost=clock)
    few = run(tmp_path / "few", ["query", "value"], cost=clock)
    assert few.rounds["duration_s"].sum() < every.rounds["duration_s"].sum()
    assert (few.client_rounds["compute_s"] < every.client_rounds["compute_s"]).all()
    assert (few.client_rounds["peak_memory_bytes"] < every.client_rounds["peak_memory_bytes"]).all()
    np.testing.assert_allclose(few.client_rounds["bytes_up"], 4 * (12 * 2 * 4 * (768 + 768) + BASE.head_weights))
    np.testing.assert_array_equal(named.client_rounds["compute_s"], every.client_rounds["compute_s"])


@pytest.mark.parametrize("targets", ["all", ["query", "value"], ["output.dense"]])
def test_upload_bytes_are_those_of_the_factors_that_are_trained(tmp_path, targets):
    trained = run(tmp_path / "trained", targets, train={"engine": "auto"})
    arrays = load_file(trained.path / "adapter" / "adapter_model.safetensors")
    factors = sum(array.size for name, array in arrays.items() if "lora_" in name)
    head = sum(array.size for array in load_file(trained.path / "adapter" / "head.safetensors").values())
    np.testing.assert_allclose(trained.client_rounds["bytes_up"], 4 * (factors + head))


@pytest.mark.parametrize(
    ("targets", "model", "said"),
    [
        (["quary"], "tiny", "model.lora_targets: unknown name 'quary'; did you mean 'query'"),
        ([], "tiny", "model.lora_targets: the list is empty"),
        (
            ["gate_proj"],
            "tinyllama-1.1b",
            "model.lora_targets: value \\['gate_proj'\\] is not allowed with the clock's",
        ),
    ],
)
def test_bad_targets_are_refused_without_training(tmp_path, targets, model, said):
    with pytest.raises(ConfigError, match=said):
        run(tmp_path / "bad", targets, model={"name": model}, cost={"model": "roberta-base"})
