"""LoRA in place: where it sits, its scale, loading and reading, restricting and expanding, slicing Adam's moments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_checkpoints import ARCHITECTURES

from fedsim.errors import ConfigError
from fedsim.learn.model.adapter import Adapter, initial_adapter, restrict
from fedsim.learn.model.backbone import load_backbone
from fedsim.learn.model.linears import Role, kept_columns, kept_rows, prunable_linears
from fedsim.learn.model.lora import LoraModel
from fedsim.settings import ModelSettings
from fedsim.structure import Structure


def random_adapter(backbone, rank: int, seed: int = 0) -> Adapter:
    """A global adapter whose B is not zero."""
    draws = torch.Generator().manual_seed(seed)
    adapter = initial_adapter(backbone, "all", rank, seed)
    for _, b in adapter.factors.values():
        b.copy_(0.3 * torch.randn(b.shape, generator=draws))
    return adapter


def some_structure(shape) -> Structure:
    structure = Structure.full(shape)
    structure.head_mask[0, 1] = False
    structure.channel_mask[:, 4:] = False
    return structure


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_logits_are_those_of_the_merged_weights_at_every_rank(make_backbone, padded_batch, architecture, rank):
    """W + c B A with c = alpha_over_rank whatever the rank."""
    backbone = make_backbone(architecture)
    adapter = random_adapter(backbone, rank)
    model = LoraModel(backbone, "all", 1.7)
    model.load(Structure.full(backbone.shape), adapter)
    with torch.no_grad():
        got = model.logits(padded_batch)
        merged = make_backbone(architecture)
        before = merged.model(**padded_batch)
        for name, (a, b) in adapter.factors.items():
            merged.linears[name].weight += 1.7 * (b.double() @ a.double())
        torch.testing.assert_close(got, merged.model(**padded_batch), rtol=1e-9, atol=1e-11)
        assert (got - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("targets", "roles"),
    [
        ("all", set(Role) - {Role.GATE}),
        (["query", "value"], {Role.QUERY, Role.VALUE}),
        (["output.dense"], {Role.DOWN}),
        (["attention.output.dense"], {Role.ATTENTION_OUT}),
        (["dense"], {Role.ATTENTION_OUT, Role.UP, Role.DOWN}),
    ],
)
def test_lora_sits_on_the_targets_and_nowhere_else(make_backbone, targets, roles):
    backbone = make_backbone("bert")
    model = LoraModel(backbone, targets, 2.0)
    wanted = {linear.name for linear in prunable_linears(backbone.shape) if linear.role in roles}
    found = {name for name, module in backbone.encoder.named_modules() if hasattr(module, "lora_A")}
    assert found == wanted == {linear.name for linear in model.targets}
    for linear in prunable_linears(backbone.shape):
        module = backbone.encoder.get_submodule(linear.name)
        assert getattr(module, "base_layer", module) is backbone.linears[linear.name]
    trained = {id(parameter) for parameter in backbone.model.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in model.parameters_list()}


def test_many_layers_do_not_confuse_peft(make_folder):
    """PEFT shortens lists of twenty names and more to suffixes: ``output.dense`` would take the attention along."""
    settings = ModelSettings(name=str(make_folder("bert", layers=21)))
    backbone = load_backbone(settings, 2, 0, torch.device("cpu"))
    LoraModel(backbone, ["output.dense"], 2.0)
    found = [name for name, module in backbone.encoder.named_modules() if hasattr(module, "lora_A")]
    assert found == [f"encoder.layer.{layer}.output.dense" for layer in range(21)]


def test_unknown_targets_are_refused(make_backbone):
    backbone = make_backbone("roberta")
    with pytest.raises(ConfigError, match=r"model\.lora_targets: unknown name 'quary'; did you mean 'query'"):
        LoraModel(backbone, ["quary"], 2.0)
    with pytest.raises(ConfigError, match="the list is empty"):
        LoraModel(backbone, [], 2.0)
    LoraModel(backbone, "all", 2.0)
    with pytest.raises(ValueError, match="carries LoRA already"):
        LoraModel(backbone, "all", 2.0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_model_serves_clients_of_different_rank_and_structure(make_backbone, padded_batch, architecture):
    """What a client gets does not depend on who was there before."""
    backbone = make_backbone(architecture)
    model = LoraModel(backbone, "all", 2.0)
    adapter = random_adapter(backbone, 6)
    jobs = [
        (Structure.full(backbone.shape), 6),
        (some_structure(backbone.shape), 2),
        (some_structure(backbone.shape), 4),
    ]

    def outputs(order):
        results = {}
        for place in order:
            structure, rank = jobs[place]
            model.load(structure, restrict(adapter, structure, rank, backbone.shape, None))
            optimizer = torch.optim.SGD(model.parameters_list(), lr=0.1)
            model.logits(padded_batch).sum().backward()
            optimizer.step()
            results[place] = model.logits(padded_batch).detach()
        return results

    forth, back = outputs([0, 1, 2]), outputs([2, 1, 0])
    assert all(torch.equal(forth[place], back[place]) for place in range(3))
    assert not torch.allclose(forth[1], forth[2])


def test_read_gives_back_copies_of_what_was_loaded(make_backbone):
    backbone = make_backbone("bert", dtype=torch.float32)
    model = LoraModel(backbone, "all", 2.0)
    structure = some_structure(backbone.shape)
    client = restrict(random_adapter(backbone, 4), structure, 3, backbone.shape, None)
    model.load(structure, client)
    read = model.read()
    assert read.rank == 3
    with torch.no_grad():
        for parameter in model.parameters_list():
            parameter.add_(1.0)
    for name, factors in client.factors.items():
        for loaded, got in zip(factors, read.factors[name], strict=True):
            assert torch.equal(loaded, got)
            assert not got.requires_grad
    assert all(torch.equal(client.head[name], read.head[name]) for name in backbone.head_names)
    assert all(torch.equal(backbone.initial_head[name], client.head[name]) for name in backbone.head_names)


def test_factors_that_do_not_fit_are_refused(make_backbone):
    backbone = make_backbone("bert")
    model = LoraModel(backbone, "all", 2.0)
    adapter = random_adapter(backbone, 2)
    with pytest.raises(ValueError, match="do not fit"):
        model.load(some_structure(backbone.shape), adapter)
    first = next(iter(adapter.factors))
    fewer = Adapter({first: adapter.factors[first]}, adapter.head)
    with pytest.raises(ValueError, match="factors for 1 linears"):
        model.load(Structure.full(backbone.shape), fewer)
    with pytest.raises(ValueError, match="head parameters"):
        model.load(Structure.full(backbone.shape), Adapter(adapter.factors, {}))


def test_pruning_keeps_moments_of_kept_entries_and_cannot_grow(make_backbone, padded_batch):
    backbone = make_backbone("llama")
    model = LoraModel(backbone, "all", 2.0)
    full, small = Structure.full(backbone.shape), some_structure(backbone.shape)
    model.load(full, random_adapter(backbone, 3))
    optimizer = torch.optim.AdamW(model.parameters_list(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model.logits(padded_batch).square().sum().backward()
        optimizer.step()
    before = {
        (linear.name, place): {key: value.clone() for key, value in optimizer.state[factor].items()}
        for linear in model.targets
        for place, factor in enumerate(model.factors(linear.name))
    }
    values = model.read()
    model.prune_with_optimizer(small, optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters_list()]
    assert len(optimizer.state) == len(model.parameters_list())
    for linear in model.targets:
        rows, columns = kept_rows(linear, small, backbone.shape), kept_columns(linear, small, backbone.shape)
        for place, factor in enumerate(model.factors(linear.name)):
            kept = (slice(None), columns) if place == 0 and columns is not None else (slice(None),)
            kept = (rows,) if place == 1 and rows is not None else kept
            assert torch.equal(factor, values.factors[linear.name][place][kept])
            for key in ("exp_avg", "exp_avg_sq"):
                moment = before[linear.name, place][key]
                assert moment.abs().max() > 0
                assert torch.equal(optimizer.state[factor][key], moment[kept])
            assert optimizer.state[factor]["step"] == 2
    with pytest.raises(ValueError, match="cannot bring a group back"):
        model.prune(full)
    model.load(full, random_adapter(backbone, 3))
    assert model.structure.same_as(full)


def test_initial_adapter_extends_by_rank_and_is_bounded(make_backbone):
    backbone = make_backbone("bert")
    low, high = initial_adapter(backbone, "all", 2, 9), initial_adapter(backbone, "all", 7, 9)
    other = initial_adapter(backbone, "all", 2, 10)
    seen = []
    for linear in prunable_linears(backbone.shape):
        a_low, b_low = low.factors[linear.name]
        a_high, b_high = high.factors[linear.name]
        assert torch.equal(a_high[:2], a_low)
        assert not torch.equal(other.factors[linear.name][0], a_low)
        assert b_low.shape == (linear.d_out, 2)
        assert not b_high.any()
        assert 0.8 * linear.d_in**-0.5 < a_high.abs().max() <= linear.d_in**-0.5
        seen.append(a_low[0, :4].tolist())
    assert len({tuple(row) for row in seen}) == len(seen)  # every Linear draws its own
    # A target list does not change what a Linear gets.
    some = initial_adapter(backbone, ["value"], 2, 9)
    assert all(torch.equal(a, low.factors[name][0]) for name, (a, _) in some.factors.items())
    for rank in (0, 13):
        with pytest.raises(ConfigError, match=rf"LoRA rank {rank} is not allowed .*1 to 12"):
            initial_adapter(backbone, "all", rank, 9)


def test_restricting_cuts_the_product_and_expanding_leaves_it(make_backbone):
    backbone = make_backbone("llama")
    shape, adapter = backbone.shape, random_adapter(backbone, 4)
    structure = some_structure(shape)
    cut = restrict(adapter, structure, 2, shape, None)
    wide = restrict(adapter, structure, 7, shape, (5, 3, 2))
    assert (cut.rank, wide.rank) == (2, 7)
    for linear in prunable_linears(shape):
        rows, columns = kept_rows(linear, structure, shape), kept_columns(linear, structure, shape)
        a, b = adapter.factors[linear.name]

        def part(product, rows=rows, columns=columns):
            product = product if rows is None else product[rows]
            return product if columns is None else product[:, columns]

        a_cut, b_cut = cut.factors[linear.name]
        a_wide, b_wide = wide.factors[linear.name]
        torch.testing.assert_close(b_cut @ a_cut, part(b[:, :2] @ a[:2]))
        torch.testing.assert_close(b_wide @ a_wide, part(b @ a))
        assert not b_wide[:, 4:].any()
        assert a_wide[4:].abs().min(dim=1).values.max() > 0
    again, client, round_index = (
        restrict(adapter, structure, 7, shape, key) for key in ((5, 3, 2), (5, 4, 2), (5, 3, 1))
    )
    name = prunable_linears(shape)[0].name
    assert torch.equal(again.factors[name][0], wide.factors[name][0])
    assert not torch.equal(client.factors[name][0], wide.factors[name][0])
    assert not torch.equal(round_index.factors[name][0], wide.factors[name][0])
    with pytest.raises(ValueError, match="no key"):
        restrict(adapter, structure, 5, shape, None)
    with pytest.raises(ValueError, match="below 1"):
        restrict(adapter, structure, 0, shape, None)


def test_padding_gets_no_gradient(make_backbone, padded_batch):
    """Another token under the padding changes neither the loss nor any gradient."""
    gradients = []
    for filler in (1, 1, 17):
        backbone = make_backbone("bert")
        model = LoraModel(backbone, "all", 2.0)
        model.load(Structure.full(backbone.shape), random_adapter(backbone, 2))
        ids = torch.where(padded_batch["attention_mask"].bool(), padded_batch["input_ids"], filler)
        model.logits({"input_ids": ids, "attention_mask": padded_batch["attention_mask"]}).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters_list()]))
    assert torch.equal(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-9, atol=1e-12)
    assert gradients[0].abs().max() > 1e-3


def test_building_draws_nothing_from_the_global_generator(make_backbone):
    backbone = make_backbone("roberta")
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    LoraModel(backbone, "all", 2.0)
    initial_adapter(backbone, "all", 3, 0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002
