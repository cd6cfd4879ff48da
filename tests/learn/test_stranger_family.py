"""A family that the package does not know, added from outside in one file: Mistral, of which nothing stands in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from causal_toys import causal_toy
from cohort_toys import CLIENTS, assert_same_updates, job, rule, toy
from export_toys import SENTENCES, export, own_logits, random_adapter, uneven
from tiny_checkpoints import _tokenizer, tiny_config
from transformers import AutoModel, MistralForCausalLM

import fedsim
from fedsim.cost.shapes import load_shape
from fedsim.families import family_catalogue
from fedsim.families.family import DecoderBlock, Role
from fedsim.learn.export.exported import load_exported
from fedsim.learn.model.backbone import load_backbone
from fedsim.settings import ModelSettings
from fedsim.structure import ModelShape, Structure

# What a stranger writes, all of it.
MISTRAL = fedsim.Family(
    name="mistral",
    title="Mistral",
    linears={
        Role.QUERY: "layers.{}.self_attn.q_proj",
        Role.KEY: "layers.{}.self_attn.k_proj",
        Role.VALUE: "layers.{}.self_attn.v_proj",
        Role.ATTENTION_OUT: "layers.{}.self_attn.o_proj",
        Role.GATE: "layers.{}.mlp.gate_proj",
        Role.UP: "layers.{}.mlp.up_proj",
        Role.DOWN: "layers.{}.mlp.down_proj",
    },
    block=DecoderBlock(),
    pooled="last",
    biases=frozenset(),
    dropouts=("attention_dropout",),
    shapes=(ModelShape("mistral-7b", "mistral", 32, 4096, 32, 8, 128, 14336, vocab=32000, positions=0, gated=True),),
)


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(family_catalogue, "_FAMILIES", dict(family_catalogue._FAMILIES))
    fedsim.register_family(MISTRAL)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = tiny_config("mistral", 2)
        config.sliding_window = 16
        MistralForCausalLM(config).save_pretrained(tmp_path)
    _tokenizer("llama").save_pretrained(tmp_path)
    return tmp_path


def test_its_shape_carries_the_clock(folder):
    assert load_shape("mistral-7b").prunable_weights == pytest.approx(6.98e9, rel=1e-3)
    own = load_shape(str(folder), labels=0)
    assert (own.heads, own.head_groups, own.ffn, own.gated) == (4, 2, 12, True)


@pytest.mark.parametrize("predicts", [False, True], ids=["classes", "tokens"])
def test_it_is_trained_alike_by_every_engine(folder, predicts):
    own = causal_toy(str(folder)) if predicts else toy(str(folder))
    assert own.backbone.max_tokens == 16  # the sliding window
    jobs = [job(own.adapter(), own.structure(client % 3), client, ratio=0.5) for client in range(CLIENTS)]
    want = own.reference(rule()).train(jobs)
    for sliced in (False, True):
        assert_same_updates(own.cohort(rule(), sliced).train(jobs), want, relative=1e-10, absolute=1e-12)
    assert np.mean([update.loss_before - update.loss_after for update in want]) > 0


@pytest.mark.parametrize("kind", ["dense", "sliced"])
def test_it_is_exported(folder, tmp_path, kind):
    backbone = load_backbone(ModelSettings(name=str(folder)), 3, seed=3, device=torch.device("cpu"))
    adapter, structure = random_adapter(backbone), uneven(backbone.shape)
    target = export(tmp_path / "export", backbone, adapter, structure, "native", kind, merged=True)
    want = own_logits(backbone, adapter, structure)
    torch.testing.assert_close(load_exported(target).logits(SENTENCES), want, rtol=0, atol=2e-5)
    assert not torch.allclose(own_logits_of_all(folder, adapter), want, atol=1e-3)
    assert type(AutoModel.from_pretrained(target)).__name__ == (
        "SlicedMistralModel" if kind == "sliced" else "MistralModel"
    )


def own_logits_of_all(folder, adapter):
    backbone = load_backbone(ModelSettings(name=str(folder)), 3, seed=3, device=torch.device("cpu"))
    return own_logits(backbone, adapter, Structure.full(backbone.shape))
