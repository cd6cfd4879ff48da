"""Oracle: a physically sliced model equals the full model with masks, and the full model with zeroed weights.

And training: steps of the sliced PEFT model equal steps of a full-size PEFT model whose pruned groups are masked,
on every entry that is kept, also through a cut in the middle with the optimizer's moments kept.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from fedsim.learn.model.adapter import initial_adapter, restrict
from fedsim.learn.model.backbone import Backbone, load_backbone
from fedsim.learn.model.linears import Role, kept_columns, kept_rows, prunable_linears
from fedsim.learn.model.lora import LoraModel
from fedsim.learn.model.slicing import apply_structure
from fedsim.settings import ModelSettings
from fedsim.structure import Structure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "learn"))
from tiny_checkpoints import ARCHITECTURES, DECODERS, make_padded_batch, save_tiny

LABELS = torch.tensor([0, 2, 1, 1, 0])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_tiny(name, tmp_path_factory.mktemp(name)) for name in ARCHITECTURES}


def fresh(folders: dict[str, Path], architecture: str, attention: str = "sdpa", dtype=torch.float64) -> Backbone:
    settings = ModelSettings(name=str(folders[architecture]))
    backbone = load_backbone(settings, 3, seed=3, device=torch.device("cpu"), attention=attention)
    backbone.model.to(dtype)
    return backbone


def uneven_structure(backbone: Backbone, seed: int = 0) -> Structure:
    """Other counts in every layer: one group only in one, most in another."""
    rng = np.random.default_rng(seed)
    structure = Structure.full(backbone.shape)
    for layer in range(backbone.shape.layers):
        heads_off = backbone.shape.head_groups - 1 if layer == 0 else backbone.shape.head_groups // 2
        channels_off = backbone.shape.ffn - 1 if layer == 1 else backbone.shape.ffn // 3
        structure.head_mask[layer, rng.choice(backbone.shape.head_groups, heads_off, replace=False)] = False
        structure.channel_mask[layer, rng.choice(backbone.shape.ffn, channels_off, replace=False)] = False
    return structure


@contextlib.contextmanager
def masked(backbone: Backbone, structure: Structure) -> Iterator[None]:
    """Multiply what enters the attention output and the FFN's second projection by 0 or 1."""
    hooks = []
    for linear in prunable_linears(backbone.shape):
        columns = kept_columns(linear, structure, backbone.shape)
        if linear.role in (Role.ATTENTION_OUT, Role.DOWN) and columns is not None:
            mask = torch.zeros(linear.d_in, dtype=torch.float64)
            mask[columns] = 1.0
            module = backbone.encoder.get_submodule(linear.name)
            hooks.append(
                module.register_forward_pre_hook(lambda _, inputs, mask=mask: (inputs[0] * mask.to(inputs[0].dtype),))
            )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def zero_groups(backbone: Backbone, structure: Structure, where: str) -> None:
    """Zero the pruned rows with their biases (``rows``), or the pruned columns (``columns``), in the full weights."""
    with torch.no_grad():
        for linear in prunable_linears(backbone.shape):
            module = backbone.linears[linear.name]
            rows = kept_rows(linear, structure, backbone.shape)
            columns = kept_columns(linear, structure, backbone.shape)
            if where == "rows" and rows is not None:
                gone = np.setdiff1d(np.arange(linear.d_out), rows)
                module.weight[gone] = 0.0
                module.bias is not None and module.bias.__setitem__(gone, 0.0)
            if where == "columns" and columns is not None:
                module.weight[:, np.setdiff1d(np.arange(linear.d_in), columns)] = 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sliced_equals_masked_equals_zeroed(folders, architecture, attention, dtype):
    batch = make_padded_batch()
    backbone = fresh(folders, architecture, attention, dtype)
    assert backbone.encoder.config._attn_implementation == (attention if architecture != "mpnet" else "eager")
    structure = uneven_structure(backbone)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-6}
    with torch.no_grad():
        full = backbone.model(**batch)
        with masked(backbone, structure):
            want = backbone.model(**batch)
        apply_structure(backbone, structure)
        sliced = backbone.model(**batch)
        query = backbone.linears[prunable_linears(backbone.shape)[0].name]
        assert query.weight.shape[0] == backbone.shape.head_dim * backbone.shape.heads // backbone.shape.kv_heads
        apply_structure(backbone, Structure.full(backbone.shape))
        assert torch.equal(backbone.model(**batch), full)
        torch.testing.assert_close(sliced, want, **tolerance)
        assert (sliced - full).abs().max() > 1e-4  # the pruned groups did say something
        for where in ("rows", "columns"):
            zeroed = fresh(folders, architecture, attention, dtype)
            zero_groups(zeroed, structure, where)
            torch.testing.assert_close(zeroed.model(**batch), sliced, **tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_eager_and_sdpa_agree_when_sliced(folders, architecture):
    outputs = []
    for attention in ("eager", "sdpa"):
        backbone = fresh(folders, architecture, attention)
        apply_structure(backbone, uneven_structure(backbone))
        outputs.append(backbone.model(**make_padded_batch()).detach())
    # Eager attention of decoders takes its softmax in float32, whatever the model's precision.
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if architecture in DECODERS else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(outputs[0], outputs[1], **tolerance)


class DenseOracle:
    """A full-size PEFT model made by `get_peft_model`, trained with masks in the place of slices."""

    def __init__(self, backbone: Backbone, adapter, rank: int) -> None:
        self.backbone = backbone
        self.linears = prunable_linears(backbone.shape)
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=[x.name for x in self.linears]
        )
        self.peft = get_peft_model(backbone.encoder, config)
        with torch.no_grad():
            for linear in self.linears:
                a, b = self.factors(linear.name)
                a.copy_(adapter.factors[linear.name][0])
                b.copy_(adapter.factors[linear.name][1])
        self.head = [backbone.model.get_parameter(name) for name in backbone.head_names]

    def factors(self, name: str):
        layer = self.backbone.encoder.get_submodule(name)
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def parameters(self) -> list[torch.nn.Parameter]:
        return [factor for linear in self.linears for factor in self.factors(linear.name)] + self.head


def step(logits: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(logits(), LABELS)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_sliced_equals_training_masked_on_the_kept_entries(folders, architecture, attention):
    """Three steps on a first structure, a cut with the moments kept, three steps on a smaller one."""
    rank, batch = 3, make_padded_batch()
    backbone = fresh(folders, architecture, attention)
    initial = initial_adapter(backbone, "all", rank, seed=5)
    draws = torch.Generator().manual_seed(1)
    for _, b in initial.factors.values():
        b.copy_(0.1 * torch.randn(b.shape, generator=draws))
    first = Structure.full(backbone.shape)
    first.head_mask[1, 1] = False
    first.channel_mask[:, :3] = False
    second = Structure(first.head_mask.copy(), first.channel_mask.copy())
    second.head_mask[0, 0] = False
    second.channel_mask[1, 4:9] = False

    model = LoraModel(backbone, "all", 2.0)
    model.load(first, restrict(initial, first, rank, backbone.shape, None))
    fast = torch.optim.AdamW(model.parameters_list(), lr=0.01)
    dense = DenseOracle(fresh(folders, architecture, attention), initial, rank)
    slow = torch.optim.AdamW(dense.parameters(), lr=0.01)
    losses = []
    for structure in (first, second):
        if structure is second:
            model.prune_with_optimizer(second, fast)
        with masked(dense.backbone, structure):
            for _ in range(3):
                sliced_loss = step(lambda: model.logits(batch), fast)
                dense_loss = step(lambda: dense.backbone.model(**batch), slow)
                assert sliced_loss == pytest.approx(dense_loss, rel=1e-9)
                losses.append(sliced_loss)
        trained = model.read()
        for linear in prunable_linears(backbone.shape):
            rows = kept_rows(linear, structure, backbone.shape)
            columns = kept_columns(linear, structure, backbone.shape)
            a, b = (factor.detach() for factor in dense.factors(linear.name))
            a = a if columns is None else a[:, columns]
            b = b if rows is None else b[rows]
            torch.testing.assert_close(trained.factors[linear.name][0], a, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(trained.factors[linear.name][1], b, rtol=1e-7, atol=1e-9)
        for name, parameter in zip(backbone.head_names, dense.head, strict=True):
            torch.testing.assert_close(trained.head[name], parameter.detach(), rtol=1e-7, atol=1e-9)
    assert losses[2] < losses[0]
    assert losses[5] < losses[3]
