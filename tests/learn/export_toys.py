"""Random adapters and structures, and exports of them: for tests of exported folders."""

from __future__ import annotations

import numpy as np
import torch

from fedsim.learn.export.card import ExportFacts
from fedsim.learn.export.exported import write_export
from fedsim.learn.model.adapter import Adapter, initial_adapter, restrict
from fedsim.learn.model.lora import LoraModel
from fedsim.settings import ModelSettings
from fedsim.structure import Structure

RANK, SCALE = 3, 2.0
SENTENCES = ["w1 w2 w3 w9", "w4", "w7 w8 w9 w10 w11 w12 w13"]
TOLERANCE = 2e-5  # fp32: a merged or zero-padded product adds up in another order; logits are about 5


def random_adapter(backbone, targets="all"):
    """Every factor and the head drawn at random: B = 0 would hide mistakes."""
    generator = torch.Generator().manual_seed(5)
    start = initial_adapter(backbone, targets, RANK, seed=0)
    factors = {name: (a, 0.3 * torch.randn(b.shape, generator=generator)) for name, (a, b) in start.factors.items()}
    return Adapter(factors, {name: torch.randn(one.shape, generator=generator) for name, one in start.head.items()})


def uneven(shape, seed=0):
    """A structure whose layers keep unequal counts, never group 0 of layer 0 where there is another."""
    rng = np.random.default_rng(seed)
    heads, channels = rng.random((shape.layers, shape.head_groups)) < 0.5, rng.random((shape.layers, shape.ffn)) < 0.5
    heads[0], channels[0] = np.arange(shape.head_groups) == shape.head_groups - 1, np.arange(shape.ffn) % 3 == 1
    heads[1:, -1] = channels[1:, 2] = True
    return Structure(heads, channels)


def export(folder, backbone, adapter, structure, pooling, kind, merged, names=("bad", "fair", "good")):
    facts = ExportFacts(
        whose="client 3",
        format=kind,
        merged=merged,
        architecture=backbone.shape.architecture,
        pooling=pooling,
        label_names=names,
        max_length=6,
        lora_rank=adapter.rank,
        lora_scale=SCALE,
        prune_ratio=structure.ratio(backbone.shape),
        kept_heads=tuple(structure.heads_kept.tolist()),
        kept_channels=tuple(structure.channels_kept.tolist()),
        notes=("A note.",),
        run={"method": "fedspine", "seed": 7, "labels": ["reconstruction"]},
    )
    write_export(folder, backbone, adapter, structure, ModelSettings(name=str(folder), pooling=pooling), facts)
    return folder


def encoded(backbone):
    inputs = dict(backbone.tokenizer(SENTENCES, padding=True, truncation=True, max_length=6, return_tensors="pt"))
    if backbone.shape.architecture != "bert":
        inputs.pop("token_type_ids", None)
    return inputs


@torch.no_grad()
def own_logits(backbone, adapter, structure, targets="all"):
    """Our forward pass: sliced Linears and PEFT layers of the reference engine."""
    model = LoraModel(backbone, targets, SCALE)
    model.load(structure, restrict(adapter, structure, adapter.rank, backbone.shape, None))
    return model.logits(encoded(backbone))
