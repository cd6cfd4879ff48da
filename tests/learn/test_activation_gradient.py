"""The criterion `activation_gradient`: loops over tokens and features, both engines against each other, padding."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from cohort_toys import CLIENTS, assert_same_updates, job, rule, toy
from tiny_checkpoints import ARCHITECTURES

from fedsim.contracts.program import LocalProgram, Phase
from fedsim.families.family_catalogue import find_family
from fedsim.learn.model.adapter import initial_adapter, restrict
from fedsim.learn.model.linears import Role, group_width, prunable_linears
from fedsim.learn.model.lora import LoraModel
from fedsim.learn.train.importance import activation_gradient, random_scores
from fedsim.structure import Structure

RULE = rule("activation_gradient")


def watched_model(backbone, batch, targets="all", structure=None):
    structure = structure or Structure.full(backbone.shape)
    adapter = initial_adapter(backbone, targets, 3, 1)
    draws = torch.Generator().manual_seed(2)
    for _, b in adapter.factors.values():
        b.copy_(0.2 * torch.randn(b.shape, generator=draws))
    model = LoraModel(backbone, targets, 1.5)
    model.load(structure, restrict(adapter, structure, 3, backbone.shape, None))
    with model.watching():
        loss = torch.nn.functional.cross_entropy(model.logits(batch), torch.tensor([0, 1, 2, 0, 1]))
    loss.backward()
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_the_definition(make_backbone, padded_batch, architecture):
    """Sums over tokens and features one by one, from inputs and gradients caught by other means: autograd's grad()."""
    backbone = make_backbone(architecture)
    structure = Structure.full(backbone.shape)
    structure.head_mask[0, 0] = False
    structure.channel_mask[1, [2, 3, 9]] = False
    scores = activation_gradient(watched_model(backbone, padded_batch, structure=structure))

    inputs = {}
    columns = [one for one in prunable_linears(backbone.shape) if one.role in (Role.ATTENTION_OUT, Role.DOWN)]
    for linear in columns:
        module = backbone.encoder.get_submodule(linear.name)
        module.register_forward_hook(lambda module, args, out, name=linear.name: inputs.update({name: args[0]}))
    logits = backbone.model(**padded_batch)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0, 1]))
    gradients = torch.autograd.grad(loss, [inputs[linear.name] for linear in columns])
    for linear, gradient in zip(columns, gradients, strict=True):
        x, gradient = inputs[linear.name].detach().numpy(), gradient.numpy()
        width = group_width(linear, backbone.shape)
        totals = np.zeros(x.shape[-1] // width)
        for feature in range(x.shape[-1]):
            activation = slope = 0.0
            for row in range(x.shape[0]):
                for token in range(x.shape[1]):
                    if gradient[row, token].any():
                        activation += abs(x[row, token, feature])
                        slope += abs(gradient[row, token, feature])
            totals[feature // width] += activation * slope
        is_head = linear.role == Role.ATTENTION_OUT
        found = (scores.heads if is_head else scores.channels)[linear.layer]
        kept = (structure.head_mask if is_head else structure.channel_mask)[linear.layer]
        assert np.isnan(found[~kept]).all()
        np.testing.assert_allclose(found[kept], totals / np.linalg.norm(totals), rtol=1e-10)


def test_padding_does_not_count(make_backbone, padded_batch):
    longer = {name: torch.nn.functional.pad(tensor, (0, 5)) for name, tensor in padded_batch.items()}
    one = activation_gradient(watched_model(make_backbone("bert", pooling="mean"), padded_batch))
    other = activation_gradient(watched_model(make_backbone("bert", pooling="mean"), longer))
    np.testing.assert_allclose(one.heads, other.heads, rtol=1e-10)
    np.testing.assert_allclose(one.channels, other.channels, rtol=1e-10)


def test_a_pass_that_was_not_watched_is_refused(make_backbone, padded_batch):
    model = watched_model(make_backbone("bert"), padded_batch)
    model.watched = {}
    with pytest.raises(ValueError, match="no watched input"):
        activation_gradient(model)


@pytest.mark.parametrize("pooling", ["native", "mean"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("where", ["all", "attention", "highest"])
def test_cohorts_agree_with_the_reference(tiny_folders, architecture, pooling, where):
    """Also where LoRA sits on few Linears, or so high that nothing trained leads to the first inputs."""
    paths = {role: path.split(".{}.")[1] for role, path in find_family(architecture).linears.items()}
    targets = {
        "all": "all",
        "attention": (paths[Role.QUERY], paths[Role.VALUE]),
        "highest": (paths[Role.DOWN],),
    }[where]
    own = toy(str(tiny_folders[architecture]), pooling, targets=targets)
    full = Structure.full(own.backbone.shape)
    starts = [full, own.structure(1), full, own.structure(2), own.structure(3), own.structure(3)]
    adapter = own.adapter()
    jobs = [
        job(
            adapter,
            starts[client],
            client,
            ratio=0.1 + 0.1 * client,
            rank=(1, 2, 4)[client % 3],
            scores=random_scores(own.backbone.shape, 9, client) if client % 2 else None,
            prune=True,
        )
        for client in range(CLIENTS)
    ]
    want = own.reference(RULE).train(jobs)
    assert not all(update.structure.same_as(one.start) for update, one in zip(want, jobs, strict=True))
    for sliced in (False, True):
        assert_same_updates(own.cohort(RULE, sliced).train(jobs), want, relative=1e-9, absolute=1e-11)


def test_a_round_that_estimates_nothing_leaves_the_averages(tiny_folders):
    own = toy(str(tiny_folders["bert"]))
    known = random_scores(own.backbone.shape, 9, 0)
    one = job(own.adapter(), Structure.full(own.backbone.shape), 0, scores=known)
    program = LocalProgram((Phase(3, 1e-2, estimate=False),))
    quiet = dataclasses.replace(one, request=dataclasses.replace(one.request, program=program))
    for trainer in (own.reference(RULE), own.cohort(RULE, True)):
        (update,) = trainer.train([quiet])
        assert update.scores is None or np.array_equal(update.scores.heads, known.heads)
        (update,) = trainer.train([one])
        assert not np.array_equal(update.scores.heads, known.heads)
