"""Exported folders load with plain transformers and peft, and give the logits of our own forward pass."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from causal_toys import save_causal
from export_toys import RANK, SCALE, SENTENCES, TOLERANCE, encoded, export, own_logits, random_adapter, uneven
from peft import PeftModel
from safetensors.torch import load_file
from tiny_checkpoints import ARCHITECTURES, DECODERS
from transformers import AutoConfig, AutoModel, BertConfig

from fedsim.errors import ModelError, RunError
from fedsim.learn.export.card import FORMATS
from fedsim.learn.export.exported import load_exported
from fedsim.learn.export.small_models import SlicedBertConfig, SlicedBertModel
from fedsim.learn.model.backbone import load_backbone
from fedsim.learn.model.linears import kept_columns, kept_rows, prunable_linears
from fedsim.settings import ModelSettings
from fedsim.structure import Structure


def card_logits(folder):
    """What the code in the folder's README.md gives, run as it stands there."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    names = {"folder": str(folder), "sentences": SENTENCES}
    exec(code, names)
    return code, names["logits"]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("pooling", ["native", "mean"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_loaders_give_our_logits(make_backbone, tmp_path, architecture, pooling, kind, merged):
    backbone = make_backbone(architecture, pooling=pooling, dtype=torch.float32)
    adapter, structure = random_adapter(backbone), uneven(backbone.shape)
    folder = export(tmp_path / "export", backbone, adapter, structure, pooling, kind, merged)
    want = own_logits(backbone, adapter, structure)
    full = own_logits(make_backbone(architecture, pooling=pooling, dtype=torch.float32), adapter, full_of(backbone))
    assert (want - full).abs().max() > 0.05  # pruning changes this model
    exported = load_exported(folder)
    torch.testing.assert_close(exported.logits(SENTENCES), want, rtol=0, atol=TOLERANCE)
    code, logits = card_logits(folder)
    torch.testing.assert_close(logits, want, rtol=0, atol=TOLERANCE)
    assert ("fedsim" in code) == (kind == "sliced")
    assert ("peft" in code) == (not merged)
    assert (folder / "adapter").exists() == (not merged)
    assert ("AutoModelForSequenceClassification" in code) == (pooling == "native" and architecture not in DECODERS)
    assert exported.facts.label_names == ("bad", "fair", "good")
    assert AutoConfig.from_pretrained(folder).id2label == {0: "bad", 1: "fair", 2: "good"}


def full_of(backbone):
    return Structure.full(backbone.shape)


@pytest.mark.parametrize("pooling", ["native", "mean"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dense_folders_give_our_hidden_states_through_plain_auto_model(make_backbone, tmp_path, architecture, pooling):
    backbone = make_backbone(architecture, pooling=pooling, dtype=torch.float32)
    adapter, structure = random_adapter(backbone), uneven(backbone.shape)
    folder = export(tmp_path / "export", backbone, adapter, structure, pooling, "dense", False)
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), str(folder / "adapter"))
    inputs = encoded(backbone)
    with torch.no_grad():
        hidden = plain(**inputs).last_hidden_state
        own_logits(backbone, adapter, structure)  # leaves structure and LoRA in the backbone
        want = backbone.encoder(**inputs).last_hidden_state
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(hidden[kept], want[kept], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dense_weights_vanish_exactly_where_pruned_and_nowhere_else(make_backbone, tmp_path, architecture, merged):
    backbone = make_backbone(architecture, pooling="mean", dtype=torch.float32)
    adapter, structure = random_adapter(backbone), uneven(backbone.shape)
    folder = export(tmp_path / "export", backbone, adapter, structure, "mean", "dense", merged)
    tensors = load_file(folder / "model.safetensors")
    for linear in prunable_linears(backbone.shape):
        weight, bias = (None if one is None else one.detach() for one in backbone.full_weights[linear.name])
        if merged:
            a, b = adapter.factors[linear.name]
            weight = weight + SCALE * b @ a
        rows, columns = kept_rows(linear, structure, backbone.shape), kept_columns(linear, structure, backbone.shape)
        stays = torch.zeros(weight.shape, dtype=torch.bool)
        stays[np.ix_(np.arange(linear.d_out) if rows is None else rows, slice_of(columns, linear.d_in))] = True
        want = torch.where(stays, weight, torch.zeros(()))
        torch.testing.assert_close(tensors[f"{linear.name}.weight"], want, rtol=0, atol=1e-6)
        assert (tensors[f"{linear.name}.weight"][~stays] == 0).all()
        if bias is not None:
            want_bias = bias.clone() if rows is None else torch.zeros_like(bias)
            if rows is not None:
                want_bias[rows] = bias[rows]
            assert torch.equal(tensors[f"{linear.name}.bias"], want_bias)
    if not merged:
        factors = load_file(folder / "adapter" / "adapter_model.safetensors")
        for linear in prunable_linears(backbone.shape):
            a, b = (factors[f"base_model.model.{linear.name}.lora_{which}.weight"] for which in "AB")
            assert a.shape == (RANK, linear.d_in)
            assert b.shape == (linear.d_out, RANK)


def slice_of(indices, size):
    return np.arange(size) if indices is None else indices


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sliced_files_hold_what_is_kept_and_no_more(make_backbone, tmp_path, architecture):
    backbone = make_backbone(architecture, pooling="mean", dtype=torch.float32)
    adapter, structure = random_adapter(backbone), uneven(backbone.shape)
    folder = export(tmp_path / "export", backbone, adapter, structure, "mean", "sliced", True)
    tensors, shape = load_file(folder / "model.safetensors"), backbone.shape
    names = {f"{linear.name}.weight" for linear in prunable_linears(shape)}
    kept = sum(tensor.numel() for name, tensor in tensors.items() if name in names)
    assert kept == round((1 - structure.ratio(shape)) * shape.prunable_weights)
    masks = load_file(folder / "structure.safetensors")
    assert np.array_equal(masks["head_mask"].numpy(), structure.head_mask)
    assert np.array_equal(masks["channel_mask"].numpy(), structure.channel_mask)
    assert json.loads((folder / "config.json").read_text())["kept_heads"] == structure.heads_kept.tolist()


def test_lora_on_some_linears_only(make_backbone, tmp_path):
    backbone = make_backbone("bert", dtype=torch.float32)
    adapter, structure = random_adapter(backbone, ["query", "output.dense"]), uneven(backbone.shape, seed=4)
    folder = export(tmp_path / "export", backbone, adapter, structure, "native", "sliced", False)
    want = own_logits(backbone, adapter, structure, ["query", "output.dense"])
    torch.testing.assert_close(load_exported(folder).logits(SENTENCES), want, rtol=0, atol=TOLERANCE)


def test_sliced_models_are_made_from_a_configuration_too():
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 12, "num_hidden_layers": 2}
    small = AutoModel.from_config(SlicedBertConfig(**sizes, vocab_size=20, kept_heads=[1, 4], kept_channels=[5, 12]))
    assert isinstance(small, SlicedBertModel)
    assert small.encoder.layer[0].attention.self.query.weight.shape == (4, 16)
    assert small.encoder.layer[0].output.dense.weight.shape == (16, 5)
    assert small.encoder.layer[1].attention.self.query.weight.shape == (16, 16)
    assert small(torch.tensor([[1, 2, 3]])).last_hidden_state.shape == (1, 3, 16)
    whole = AutoModel.from_config(SlicedBertConfig(**sizes, vocab_size=20))
    assert whole.num_parameters() == AutoModel.from_config(BertConfig(**sizes, vocab_size=20)).num_parameters()


@pytest.mark.parametrize("kept", [[1], [0, 4], [1, 5]])
def test_counts_that_cannot_be_are_refused(kept):
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 12, "num_hidden_layers": 2}
    with pytest.raises(ValueError, match=r"kept_heads is .*2 counts from 1 to 4 are needed"):
        AutoModel.from_config(SlicedBertConfig(**sizes, vocab_size=20, kept_heads=kept))


def test_the_card_says_where_it_comes_from(make_backbone, tmp_path):
    backbone = make_backbone("roberta", dtype=torch.float32)
    folder = export(tmp_path / "e", backbone, random_adapter(backbone), uneven(backbone.shape), "native", "dense", True)
    card = (folder / "README.md").read_text()
    for words in ("client 3", "reconstruction", "A note.", "| seed | 7 |", f"rank {RANK}"):
        assert words in card
    modes = {path.name: path.stat().st_mode for path in folder.glob("*.*")}
    assert len(set(modes.values())) == 1, modes


def test_folders_that_are_no_export_or_damaged_are_named(make_backbone, tmp_path):
    with pytest.raises(ModelError, match="not a folder that fedsim export wrote"):
        load_exported(tmp_path)
    backbone = make_backbone("bert", dtype=torch.float32)
    adapter, structure = random_adapter(backbone), uneven(backbone.shape)
    folder = export(tmp_path / "e", backbone, adapter, structure, "native", "dense", True)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="damaged"):
        load_exported(folder)
    with pytest.raises(RunError, match="cannot write the export"):
        export(tmp_path / "e", backbone, adapter, structure, "native", "dense", True)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("llama", True), ("qwen2", True)])
def test_language_models_give_our_logits(tmp_path, architecture, tied, kind, merged):
    settings = ModelSettings(name=str(save_causal(tmp_path / "base", tied, architecture=architecture)))
    backbone = load_backbone(settings, 0, seed=3, device=torch.device("cpu"))
    adapter, structure = random_adapter(backbone), uneven(backbone.shape)
    folder = export(tmp_path / "export", backbone, adapter, structure, "native", kind, merged, names=())
    want = own_logits(backbone, adapter, structure)
    assert want.shape == (3, encoded(backbone)["input_ids"].shape[1], backbone.shape.vocab)
    kept = encoded(backbone)["attention_mask"].bool()
    exported, (code, logits) = load_exported(folder), card_logits(folder)
    torch.testing.assert_close(exported.logits(SENTENCES)[kept], want[kept], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(logits[kept], want[kept], rtol=0, atol=TOLERANCE)
    assert "AutoModelForCausalLM" in code
    assert ("fedsim" in code) == (kind == "sliced")
    assert not (folder / "head.safetensors").exists()
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != tied
