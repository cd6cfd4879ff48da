"""FLoRA's merged base through the whole learning side: both engines, tests, checkpoints and the exported adapter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_learner import CLIENTS, make_learner, play, request, states_equal

from fedsim.learn.model.adapter import folded
from fedsim.learn.model.slicing import with_merged

STACK = {"aggregate.rule": "stack", "train.precision": "fp32"}


@pytest.mark.parametrize("architecture", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_rounds_on_a_merged_base_are_the_same_in_every_engine(tiny_folders, architecture, pruned):
    """Three rounds of mixed ranks, with a cut in the second where devices are pruned; SGD-sized rates keep float32
    rounding from growing."""
    learners = {
        engine: make_learner(tiny_folders[architecture], {**STACK, "train.engine": engine})
        for engine in ("reference", "masked", "sliced")
    }
    for round_index in range(3):
        ratio = 0.4 if pruned and round_index else 0.0
        ranks = [(client + round_index) % 3 + 1 for client in range(CLIENTS)]
        for learner in learners.values():
            play(learner, [request(c, round_index, ratio, rank=rank, rate=1e-3) for c, rank in enumerate(ranks)])
    reference = learners.pop("reference")
    assert reference._adapter.rank == 0
    largest = max(float(update.abs().max()) for update in reference._adapter.merged.values())
    assert largest > 1e-5  # something was learned
    for learner in learners.values():
        for name, update in reference._adapter.merged.items():
            torch.testing.assert_close(learner._adapter.merged[name], update, rtol=0, atol=5e-2 * largest)
        one, other = (of.evaluate(np.arange(CLIENTS), 0.3) for of in (learner, reference))
        assert one.loss == pytest.approx(other.loss, rel=1e-5)


def test_a_merged_base_goes_on_from_its_state_to_the_bit(tiny_folders):
    one, other = (make_learner(tiny_folders["roberta"], STACK) for _ in range(2))
    play(one, [request(0, rank=1), request(1, rank=3)])
    play(one, [request(0, 1, 0.3), request(2, 1, 0.5, rank=4)])
    state = one.state()
    assert [name for name in state if name.startswith("merged.")]
    other.restore({key: np.array(value) for key, value in state.items()})
    assert states_equal(one.state(), other.state())
    for learner in (one, other):
        play(learner, [request(0, 2, 0.5), request(3, 2, 0.5)])
    assert states_equal(one.state(), other.state())
    assert one.evaluate(np.arange(CLIENTS), 0.3) == other.evaluate(np.arange(CLIENTS), 0.3)


def test_a_job_keeps_the_base_it_was_dispatched_with(tiny_folders):
    learner = make_learner(tiny_folders["bert"], STACK)
    play(learner, [request(0), request(1)])
    job = learner._freeze(request(2))
    (alone,) = learner._parts.engine.trainer.train([job])
    play(learner, [request(1, 1), request(3, 1)])
    (late,) = learner._parts.engine.trainer.train([job])
    assert late.loss_before == alone.loss_before
    (fresh,) = learner._parts.engine.trainer.train([learner._freeze(request(2))])
    assert fresh.loss_before != alone.loss_before


def test_the_folded_adapter_tests_as_the_merged_base_does(tiny_folders):
    learner = make_learner(tiny_folders["llama"], STACK)
    play(learner, [request(client, rate=3e-2) for client in range(CLIENTS)])
    merged = learner._adapter
    scale = learner._parts.config.model.lora_alpha_over_rank
    plain = folded(merged, scale)
    assert plain.rank >= 1
    structures = [learner.structure(0)]
    (one,), (other,) = (learner._parts.engine.tester.measure(of, structures) for of in (merged, plain))
    (untrained,) = learner._parts.engine.tester.measure(make_learner(tiny_folders["llama"])._adapter, structures)
    assert one[1] == pytest.approx(other[1], rel=1e-5)
    assert abs(one[1] - untrained[1]) > 1e-3


def test_the_exported_adapter_of_a_merged_base_loads_in_plain_peft(tiny_folders, tmp_path):
    from peft import PeftModel
    from transformers import AutoModel

    learner = make_learner(tiny_folders["roberta"], {**STACK, "train.engine": "reference"})
    play(learner, [request(client, rate=3e-2) for client in range(CLIENTS)])
    learner.export(tmp_path)
    base = AutoModel.from_pretrained(tiny_folders["roberta"], dtype=torch.float32)
    ids = torch.tensor([[0, 7, 9, 12, 2]])
    with torch.no_grad():
        before = base.eval()(input_ids=ids).last_hidden_state.clone()
        theirs = PeftModel.from_pretrained(base, tmp_path).eval()(input_ids=ids).last_hidden_state
        tester = learner._parts.engine.tester
        tester._model.load(learner.structure(0), learner._adapter)
        ours = learner._parts.backbone.encoder(input_ids=ids).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, before, atol=1e-3)


def test_a_merge_into_half_precision_is_rounded_once():
    weight = torch.full((2, 2), 1.0, dtype=torch.bfloat16)
    small = torch.full((2, 2), 0.003)
    assert torch.equal(with_merged(weight, small), weight)  # below half a step of bf16 at 1
    assert torch.equal(with_merged(weight, 2 * small), torch.full_like(weight, 1.0078125))
    assert with_merged(weight, None) is weight
