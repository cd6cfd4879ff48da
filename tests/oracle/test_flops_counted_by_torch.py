"""Our counting rules against somebody else's counter: torch's FlopCounterMode over Hugging Face's own models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "learn"))
from tiny_checkpoints import ARCHITECTURES, tiny_config

from fedsim.cost.setting import StepSetting
from fedsim.cost.shapes import load_shape
from fedsim.cost.workload import step_work

BATCH, LENGTH = 3, 10


def counted(architecture, folder, tuning, ffn=None):
    """(torch's count, ours) of the base model without a head."""
    config = tiny_config(architecture, 2)
    if ffn is not None:
        setattr(config, "hidden_dim" if architecture == "distilbert" else "intermediate_size", ffn)
    config._attn_implementation = "eager"
    config.save_pretrained(folder)
    kind = type(config).__name__.replace("Config", "Model")
    options = {"add_pooling_layer": False} if architecture in ("bert", "roberta", "mpnet") else {}
    model = getattr(transformers, kind)(config, **options)
    tokens = torch.randint(5, 50, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter:
        out = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
        if tuning == "full":
            out.sum().backward()
    return counter.get_total_flops(), load_shape(str(folder)), config


@pytest.mark.parametrize("tuning", ["inference", "full"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_family_forward_and_backward(architecture, tuning, tmp_path):
    theirs, shape, _ = counted(architecture, tmp_path, tuning)
    ours = step_work(shape, [1.0], [1.0], 0, StepSetting(BATCH, LENGTH, tuning=tuning))
    head = 2 * BATCH * shape.head_weights * (3 if tuning == "full" else 1)
    # Rotary positions multiply a 1 x length outer product per half head: a few operations that are not counted here.
    assert theirs == pytest.approx(float(ours.flops) - head, rel=0.005)


@pytest.mark.parametrize("tuning", ["inference", "full"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pruned_channels(architecture, tuning, tmp_path):
    """A model with 3 of 4 channels is the whole one at a kept share of 0.75."""
    whole = tmp_path / "whole"
    _, shape, _ = counted(architecture, whole, "inference")
    theirs, _, _ = counted(architecture, tmp_path / "pruned", tuning, ffn=shape.ffn * 3 // 4)
    ours = step_work(shape, [1.0], [0.75], 0, StepSetting(BATCH, LENGTH, tuning=tuning))
    head = 2 * BATCH * shape.head_weights * (3 if tuning == "full" else 1)
    assert theirs == pytest.approx(float(ours.flops) - head, rel=0.005)
