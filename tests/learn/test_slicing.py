"""Swapping widths in place: references kept, nothing copied that need not be, bad structures refused."""

from __future__ import annotations

import pytest
import torch
from tiny_checkpoints import ARCHITECTURES

from fedsim.learn.model.linears import prunable_linears
from fedsim.learn.model.slicing import apply_structure
from fedsim.structure import ModelShape, Structure


def weights_in_memory(backbone) -> int:
    return sum(linear.weight.numel() for linear in backbone.linears.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_left_are_what_the_ratio_says_and_full_restores_the_same_tensors(make_backbone, architecture):
    backbone = make_backbone(architecture)
    before = {name: (linear.weight, linear.bias) for name, linear in backbone.linears.items()}
    copies = {name: weight.clone() for name, (weight, _) in before.items()}
    structure = Structure.full(backbone.shape)
    structure.head_mask[0, 0] = False
    structure.channel_mask[1, 2:7] = False
    apply_structure(backbone, structure)
    share = weights_in_memory(backbone) / backbone.shape.prunable_weights
    assert share == pytest.approx(1.0 - structure.ratio(backbone.shape), abs=1e-12)
    untouched = [linear for linear in prunable_linears(backbone.shape) if linear.layer == 1 and linear.d_in == 16]
    assert backbone.linears[untouched[0].name].weight is before[untouched[0].name][0]  # nothing to slice, no copy
    apply_structure(backbone, Structure.full(backbone.shape))
    for name, linear in backbone.linears.items():
        assert linear.weight is before[name][0]
        assert linear.bias is before[name][1]
        assert torch.equal(linear.weight, copies[name])
        assert (linear.out_features, linear.in_features) == tuple(linear.weight.shape)
    assert not any(linear.weight.requires_grad for linear in backbone.linears.values())


def test_grouped_queries_go_with_their_key_value_head(make_backbone):
    backbone = make_backbone("llama")
    structure = Structure.full(backbone.shape)
    structure.head_mask[:, 0] = False
    apply_structure(backbone, structure)
    sizes = {linear.role.value: backbone.linears[linear.name] for linear in prunable_linears(backbone.shape)[:7]}
    full = {linear.role.value: backbone.full_weights[linear.name] for linear in prunable_linears(backbone.shape)[:7]}
    # head_dim 4; queries 2 and 3 read key-value head 1.
    assert torch.equal(sizes["query"].weight, full["query"][0][8:16])
    assert torch.equal(sizes["query"].bias, full["query"][1][8:16])
    assert torch.equal(sizes["key"].weight, full["key"][0][4:8])
    assert torch.equal(sizes["value"].bias, full["value"][1][4:8])
    assert torch.equal(sizes["attention_out"].weight, full["attention_out"][0][:, 8:16])
    assert sizes["attention_out"].bias is full["attention_out"][1]


def test_unfit_structures_are_refused(make_backbone):
    backbone = make_backbone("bert")
    empty = Structure.full(backbone.shape)
    empty.head_mask[1] = False
    with pytest.raises(ValueError, match="without a head group or without a channel"):
        apply_structure(backbone, empty)
    other = ModelShape("other", "bert", 3, 16, 4, 4, 4, 12, 60, 40)
    with pytest.raises(ValueError, match="does not fit model"):
        apply_structure(backbone, Structure.full(other))
