"""Testing on packed sentences against the reference tester."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cohort_toys import toy, toy_text
from tiny_checkpoints import ARCHITECTURES

from fedsim.learn.cohort.tester import CohortTester
from fedsim.learn.train.batches import eval_batches
from fedsim.learn.train.reference import ReferenceTester
from fedsim.structure import Structure

SENTENCES = 150
"""More than two batches of 64, and a last one that is not full."""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("pooling", ["native", "mean"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_equals_the_reference(tiny_folders, architecture, pooling, dtype):
    own, text = toy(str(tiny_folders[architecture]), pooling, dtype), toy_text(SENTENCES, seed=2)
    structures = [Structure.full(own.backbone.shape), own.structure(1), own.structure(2), own.structure(1)]
    adapter = own.adapter()
    # A head that tells classes apart: else nearly all logits are equal, and so is every answer.
    adapter = type(adapter)(adapter.factors, {name: 20 * tensor for name, tensor in adapter.head.items()})
    batches, _ = eval_batches(text, 64)
    want = ReferenceTester(own.lora_model, batches).measure(adapter, structures)
    mine = CohortTester(own.model, own.base(True), text).measure(adapter, structures)
    assert [accuracy for accuracy, _ in mine] == [accuracy for accuracy, _ in want]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose([loss for _, loss in mine], [loss for _, loss in want], rtol=tolerance)
    assert mine[1] == mine[3]
    assert len({loss for _, loss in mine}) == 3
    assert len({accuracy for accuracy, _ in mine}) > 1


def test_structures_that_are_alike_are_measured_once(tiny_folders, monkeypatch):
    own = toy(str(tiny_folders["bert"]))
    tester, calls = CohortTester(own.model, own.base(True), toy_text(10)), []
    real = tester._measure_one
    monkeypatch.setattr(tester, "_measure_one", lambda *parts: calls.append(None) or real(*parts))
    full = Structure.full(own.backbone.shape)
    results = tester.measure(own.adapter(), [full, own.structure(1), Structure.full(own.backbone.shape)])
    assert len(calls) == 2
    assert results[0] == results[2] != results[1]
