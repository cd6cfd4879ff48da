"""Importance: a slow transcription of the formulas, the identities behind them, and what is done with the unusual."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_checkpoints import ARCHITECTURES

from fedsim.errors import ConfigError
from fedsim.learn.model.adapter import initial_adapter, restrict
from fedsim.learn.model.linears import Role, group_width, kept_columns, kept_rows, prunable_linears
from fedsim.learn.model.lora import LoraModel
from fedsim.learn.model.slicing import apply_structure
from fedsim.learn.train import importance as importance_module
from fedsim.learn.train.importance import (
    CRITERIA,
    GroupScores,
    find_criterion,
    lora_guided,
    lora_importance,
    magnitude,
    random_scores,
    smooth,
)
from fedsim.structure import Structure

SCALE = 1.5


def trained_model(make_backbone, batch, architecture: str, structure: Structure | None = None) -> LoraModel:
    """A model with B off zero, right after a backward pass."""
    backbone = make_backbone(architecture)
    structure = structure if structure is not None else Structure.full(backbone.shape)
    adapter = initial_adapter(backbone, "all", 3, 1)
    draws = torch.Generator().manual_seed(2)
    for _, b in adapter.factors.values():
        b.copy_(0.2 * torch.randn(b.shape, generator=draws))
    model = LoraModel(backbone, "all", SCALE)
    model.load(structure, restrict(adapter, structure, 3, backbone.shape, None))
    torch.nn.functional.cross_entropy(model.logits(batch), torch.tensor([0, 1, 2, 0, 1])).backward()
    return model


def some_structure(shape) -> Structure:
    structure = Structure.full(shape)
    structure.head_mask[0, 0] = False
    structure.channel_mask[1, [2, 3, 9]] = False
    return structure


def slow_lora_guided(model: LoraModel) -> tuple[np.ndarray, np.ndarray]:
    """The formulas, entry by entry, with Python loops over groups."""
    shape, structure = model.backbone.shape, model.structure
    heads = np.where(structure.head_mask, 0.0, np.nan)
    channels = np.where(structure.channel_mask, 0.0, np.nan)
    for linear in prunable_linears(shape):
        a, b = model.factors(linear.name)
        w = model.backbone.linears[linear.name].weight.detach().numpy()
        ga, gb = a.grad.numpy(), b.grad.numpy()
        a, b = a.detach().numpy(), b.detach().numpy()
        g = gb @ a + b @ ga - gb @ ga
        s = np.abs(g * (w + SCALE * b @ a))
        by_column = linear.role in (Role.ATTENTION_OUT, Role.DOWN)
        kept = kept_columns(linear, structure, shape) if by_column else kept_rows(linear, structure, shape)
        features = np.arange(s.shape[1 if by_column else 0]) if kept is None else kept
        width = group_width(linear, shape)
        totals: dict[int, float] = {}
        for place, feature in enumerate(features):
            line = s[:, place] if by_column else s[place]
            totals[feature // width] = totals.get(feature // width, 0.0) + float(line.sum())
        norm = sum(total**2 for total in totals.values()) ** 0.5
        scores = channels if linear.role in (Role.GATE, Role.UP, Role.DOWN) else heads
        for group, total in totals.items():
            scores[linear.layer, group] += total / norm
    return heads, channels


@pytest.mark.parametrize("chunk", [1, 37, 1 << 20])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_guided_equals_the_slow_transcription(
    make_backbone, padded_batch, monkeypatch, architecture, pruned, chunk
):
    monkeypatch.setattr(importance_module, "_CHUNK_ELEMENTS", chunk)
    structure = some_structure(make_backbone(architecture).shape) if pruned else None
    model = trained_model(make_backbone, padded_batch, architecture, structure)
    heads, channels = slow_lora_guided(model)
    scores = lora_guided(model)
    np.testing.assert_allclose(scores.heads, heads, rtol=1e-9)
    np.testing.assert_allclose(scores.channels, channels, rtol=1e-9)
    assert np.isnan(scores.heads).any() == pruned


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_stand_in_gradient(make_backbone, padded_batch, architecture):
    """gA = c B' dL/dW and gB = c dL/dW A' with the merged weight's exact gradient; G is one step's change of B A."""
    model = trained_model(make_backbone, padded_batch, architecture)
    merged = make_backbone(architecture)
    for name in merged.head_names:
        merged.model.get_parameter(name).requires_grad_(False)
    for name, linear in merged.linears.items():
        a, b = model.factors(name)
        linear.weight = torch.nn.Parameter(linear.weight.detach() + SCALE * (b @ a).detach())
    torch.nn.functional.cross_entropy(merged.model(**padded_batch), torch.tensor([0, 1, 2, 0, 1])).backward()
    for name, linear in merged.linears.items():
        a, b = model.factors(name)
        exact = linear.weight.grad
        torch.testing.assert_close(a.grad, SCALE * b.T @ exact, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(b.grad, SCALE * exact @ a.T, rtol=1e-8, atol=1e-12)
        g = b.grad @ a + b @ a.grad - b.grad @ a.grad
        step = b @ a - (b - b.grad) @ (a - a.grad)
        torch.testing.assert_close(g, step, rtol=1e-8, atol=1e-12)


def test_lora_importance_is_the_mean_over_all_entries(make_backbone, padded_batch):
    model = trained_model(make_backbone, padded_batch, "llama")
    entries = np.concatenate(
        [np.abs((b * b.grad).detach().numpy()).ravel() for _, b in (model.factors(x.name) for x in model.targets)]
    )
    assert lora_importance(model) == pytest.approx(entries.mean(), rel=1e-12)
    assert lora_importance(model) > 0.0


def test_gradients_and_full_targets_are_needed(make_backbone, padded_batch):
    backbone = make_backbone("bert")
    model = LoraModel(backbone, "all", 2.0)
    model.load(Structure.full(backbone.shape), initial_adapter(backbone, "all", 2, 0))
    with pytest.raises(ValueError, match="no gradient"):
        lora_guided(model)
    with pytest.raises(ValueError, match="no gradient"):
        lora_importance(model)
    few = make_backbone("bert")
    model = LoraModel(few, ["query", "value"], 2.0)
    model.load(Structure.full(few.shape), initial_adapter(few, ["query", "value"], 2, 0))
    model.logits(padded_batch).sum().backward()
    with pytest.raises(ConfigError, match=r"prune\.criterion 'lora_guided'.*model\.lora_targets must be 'all'"):
        lora_guided(model)
    assert lora_importance(model) == 0.0  # B is zero before the first step


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_changes_no_average(make_backbone, padded_batch, bad):
    model = trained_model(make_backbone, padded_batch, "bert")
    average = smooth(None, lora_guided(model))
    model.factors(model.targets[0].name)[1].grad[0, 0] = bad
    after = smooth(average, lora_guided(model))
    assert np.array_equal(after.heads, average.heads)
    assert np.array_equal(after.channels, average.channels)


def test_moving_average_keeps_what_was_not_measured():
    """Golden by hand: 0.9 * 1 + 0.1 * 3 = 1.2; 0.9^2 = 0.81, 0.81 * 1 + 0.19 * 3 = 1.38."""
    old = GroupScores(np.array([[1.0, 2.0]]), np.array([[4.0]]))
    new = GroupScores(np.array([[3.0, np.nan]]), np.array([[4.0]]))
    np.testing.assert_allclose(smooth(old, new).heads, [[1.2, 2.0]])
    np.testing.assert_allclose(smooth(old, new, steps=2).heads, [[1.38, 2.0]])
    np.testing.assert_allclose(smooth(None, new, steps=2).heads, [[0.57, 0.0]])
    infinite = GroupScores(np.array([[3.0, np.inf]]), np.array([[7.0]]))
    assert smooth(old, infinite) is old
    assert smooth(None, infinite).channels[0, 0] == 0.0
    # One estimate that stands for k steps weighs as k equal estimates.
    same = GroupScores(np.array([[3.0, 5.0]]), np.array([[2.0]]))
    slow = old
    for _ in range(5):
        slow = smooth(slow, same)
    np.testing.assert_allclose(smooth(old, same, steps=5).heads, slow.heads, rtol=1e-12)


def test_a_group_without_any_signal_scores_lowest_and_zero_modules_do_not_divide(make_backbone, padded_batch):
    model = trained_model(make_backbone, padded_batch, "bert")
    for linear in model.targets:
        for factor in model.factors(linear.name):
            if linear.layer == 0 and linear.role == Role.UP:
                factor.grad.zero_()
            if linear.layer == 1 and linear.role in (Role.QUERY, Role.KEY, Role.VALUE):
                with torch.no_grad():
                    b = model.factors(linear.name)[1]
                    b[4:8], b.grad[4:8] = 0.0, 0.0
            if linear.layer == 1 and linear.role == Role.ATTENTION_OUT:
                with torch.no_grad():
                    a = model.factors(linear.name)[0]
                    a[:, 4:8], a.grad[:, 4:8] = 0.0, 0.0
    scores = lora_guided(model)
    assert np.isfinite(scores.channels).all()
    assert scores.channels[0].max() <= 1.0  # down alone, normalised
    assert scores.heads[1, 1] == 0.0
    assert scores.heads[1].argmin() == 1


def test_magnitude_reads_the_unpruned_weights(make_backbone):
    backbone = make_backbone("llama")
    want = magnitude(backbone)
    heads = np.zeros_like(want.heads)
    for linear in prunable_linears(backbone.shape):
        if linear.role in (Role.GATE, Role.UP, Role.DOWN):
            continue
        weight = backbone.full_weights[linear.name][0].detach().abs().numpy()
        lines = weight.sum(axis=0 if linear.role == Role.ATTENTION_OUT else 1)
        groups = lines.reshape(-1, group_width(linear, backbone.shape)).sum(axis=1)
        heads[linear.layer] += groups / np.linalg.norm(groups)
    np.testing.assert_allclose(want.heads, heads, rtol=1e-9)
    apply_structure(backbone, some_structure(backbone.shape))
    assert np.array_equal(magnitude(backbone).channels, want.channels)


def test_random_scores_belong_to_a_client(make_backbone):
    shape = make_backbone("bert").shape
    first, again, other = (random_scores(shape, 4, client) for client in (7, 7, 8))
    assert np.array_equal(first.channels, again.channels)
    assert not np.array_equal(first.channels, other.channels)
    assert first.heads.shape == (2, 4)
    assert first.channels.shape == (2, 12)


def test_criteria_by_name(make_backbone):
    backbone = make_backbone("bert")
    assert find_criterion("lora_guided").static is None
    by_magnitude, by_chance = find_criterion("magnitude").static, find_criterion("random").static
    assert np.array_equal(by_magnitude(backbone, 0, 1).heads, magnitude(backbone).heads)
    assert np.array_equal(by_chance(backbone, 3, 1).heads, random_scores(backbone.shape, 3, 1).heads)
    with pytest.raises(ConfigError, match=r"unknown prune\.criterion 'magnitud'; did you mean 'magnitude'"):
        find_criterion("magnitud")
    for criterion in map(find_criterion, CRITERIA.built_in):
        assert (criterion.estimate is None) != (criterion.static is None)
