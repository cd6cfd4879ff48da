"""One round of the cohort engine against the reference, for every feature; and what must not depend on the company."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from cohort_toys import BATCH, CLIENTS, SAMPLES, Toy, assert_same_updates, job, local_program, rule, toy
from tiny_checkpoints import ARCHITECTURES

from fedsim.learn.cohort.pack import pack
from fedsim.learn.cohort.plan import cohorts
from fedsim.learn.cohort.stack import CohortStack, Member
from fedsim.learn.model.adapter import Adapter
from fedsim.learn.model.linears import Role, group_width
from fedsim.learn.train.importance import GroupScores, magnitude, random_scores
from fedsim.learn.train.jobs import Job
from fedsim.structure import Structure

TIGHT = {"relative": 1e-10, "absolute": 1e-12}
SINGLE = {"relative": 1e-3, "absolute": 2e-4}
"""float32, at a rate of 1e-2: AdamW divides a gradient by its own size, so that rounding of one near zero shows in the
weight (2e-5 was measured)."""
RANKS = (1, 2, 4, 6, 3, 4)
"""One above the global adapter's 4."""
FORMS = pytest.mark.parametrize("sliced", [False, True], ids=["masked", "sliced"])


@pytest.fixture
def bert(tiny_folders) -> Toy:
    return toy(str(tiny_folders["bert"]))


@pytest.fixture
def llama(tiny_folders) -> Toy:
    return toy(str(tiny_folders["llama"]))


def mixed_jobs(toy: Toy, rank: int = 4, **changes) -> list[Job]:
    """Six clients of mixed ranks, on mixed structures, with averages of their own, that prune to mixed ratios."""
    adapter, shape = toy.adapter(rank), toy.backbone.shape
    full = Structure.full(shape)
    starts = [full, toy.structure(1), full, toy.structure(2), toy.structure(3), toy.structure(3)]
    ratios = (0.0, 0.5, 0.3, 0.6, 0.65, 0.2)
    jobs = []
    for client in range(CLIENTS):
        scores = None if client in (0, 4) else random_scores(shape, 9, client)
        options = {"scores": scores, "rank": RANKS[client], "ratio": ratios[client], "prune": True, **changes}
        jobs.append(job(adapter, starts[client], client, **options))
    return jobs


@pytest.mark.parametrize("pooling", ["native", "mean"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_round_equals_the_references(tiny_folders, architecture, pooling):
    """Mixed ranks, structures and data sizes, importance each step and a cut in mid-job; both forms."""
    own = toy(str(tiny_folders[architecture]), pooling)
    jobs = mixed_jobs(own)
    want = own.reference(rule()).train(jobs)
    assert not all(update.structure.same_as(one.start) for update, one in zip(want, jobs, strict=True))
    for sliced in (False, True):
        assert_same_updates(own.cohort(rule(), sliced).train(jobs), want, **TIGHT)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_round_in_single_precision_equals_to_rounding(tiny_folders, architecture):
    own = toy(str(tiny_folders[architecture]), dtype=torch.float32)
    jobs = mixed_jobs(own)
    want = own.reference(rule()).train(jobs)
    for sliced in (False, True):
        assert_same_updates(own.cohort(rule(), sliced).train(jobs), want, **SINGLE)


def sharing(mask: Structure, others: list[Structure]) -> Structure:
    """The mask, with one group of each kind and layer of every other structure."""
    for other in others:
        layers = np.arange(len(mask.head_mask))
        mask.head_mask[layers, other.head_mask.argmax(axis=1)] = True
        mask.channel_mask[layers, other.channel_mask.argmax(axis=1)] = True
    return mask


VARIANTS = {
    "no steps after the cut": (rule(), {"recovery": 0}),
    "cut before the first step": (rule(), {"recovery": 3, "scores": "own"}),
    "an estimate every third step": (rule(importance_every=3), {"steps": 4, "scores": "own"}),
    "no estimate before the cut": (rule(importance_every=3), {"steps": 3, "scores": "own"}),
    "warm-up": (rule(), {"prune": False}),
    "unequal layers": (rule(selection="global"), {}),
    "a ready mask": (rule(), {"mask": "uneven"}),
    "a static criterion": (rule("magnitude"), {"guide": "magnitude", "scores": None}),
    "a random criterion": (rule("random"), {"guide": "random", "scores": None}),
    "activations times gradients": (rule("activation_gradient", importance_every=2), {"recovery": 1, "scores": "own"}),
    "no criterion": (rule(None), {"prune": False, "scores": None, "ratio": 0.0}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_way_to_prune_equals_the_references(tiny_folders, name):
    """Three clients of unlike structures and ranks, in both forms."""
    train_rule, changes = VARIANTS[name]
    architecture = ("bert", "roberta", "llama", "mpnet")[sorted(VARIANTS).index(name) % 4]
    own = toy(str(tiny_folders[architecture]))
    shape = own.backbone.shape
    values = {
        "own": random_scores(shape, 9, 1),
        "uneven": sharing(own.structure(8), [own.structure(1), own.structure(2)]),
        "magnitude": magnitude(own.backbone),
        "random": random_scores(shape, 1, 2),
    }
    changes = {key: values.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    jobs = mixed_jobs(own, **changes)[1:4]
    want = own.reference(train_rule).train(jobs)
    for sliced in (False, True):
        assert_same_updates(own.cohort(train_rule, sliced).train(jobs), want, **TIGHT)


@FORMS
@pytest.mark.parametrize("targets", [("query", "value"), ("q_proj", "v_proj"), ("output.dense",)])
def test_lora_on_some_linears_only(tiny_folders, targets, sliced):
    """Where a method does not prune; on structures that were cut before, all the same."""
    own = toy(str(tiny_folders["llama" if "q_proj" in targets else "roberta"]), targets=targets)
    jobs = mixed_jobs(own, prune=False, scores=None, ratio=0.0)[2:5]
    assert_same_updates(own.cohort(rule(None), sliced).train(jobs), own.reference(rule(None)).train(jobs), **TIGHT)


@FORMS
def test_all_ranks_above_the_adapters(bert, sliced):
    jobs = mixed_jobs(bert, rank=1, prune=False)[1:4]
    assert_same_updates(bert.cohort(rule(), sliced).train(jobs), bert.reference(rule()).train(jobs), **TIGHT)


# -- what must not depend on the company ------------------------------------------------------------------------------


@FORMS
def test_chunks_of_any_size_give_equal_updates(llama, sliced):
    jobs = mixed_jobs(llama)
    whole = llama.cohort(rule(), sliced, chunk=16).train(jobs)
    for chunk in (1, 3):
        assert_same_updates(llama.cohort(rule(), sliced, chunk).train(jobs), whole, **TIGHT)


def bits(updates):
    tensors = [t for u in updates for pair in u.adapter.factors.values() for t in pair]
    tensors += [tensor for update in updates for tensor in update.adapter.head.values()]
    numbers = [(u.loss_before, u.loss_after, u.lora_importance) for u in updates]
    scores = [array.tobytes() for u in updates if u.scores for array in (u.scores.heads, u.scores.channels)]
    return [tensor.numpy().tobytes() for tensor in tensors], np.array(numbers).tobytes(), scores


@FORMS
def test_the_same_call_twice_is_bit_equal(tiny_folders, sliced):
    own = toy(str(tiny_folders["roberta"]), dtype=torch.float32)
    jobs, trainer = mixed_jobs(own), own.cohort(rule(), sliced, chunk=4)
    assert bits(trainer.train(jobs)) == bits(trainer.train(jobs))
    assert bits(own.cohort(rule(), sliced, chunk=4).train(mixed_jobs(own))) == bits(trainer.train(jobs))


@FORMS
def test_the_order_of_jobs_does_not_matter(bert, sliced):
    jobs, order = mixed_jobs(bert), [4, 0, 5, 2, 1, 3]
    straight = bert.cohort(rule(), sliced, chunk=4).train(jobs)
    turned = bert.cohort(rule(), sliced, chunk=4).train([jobs[place] for place in order])
    assert_same_updates(turned, [straight[place] for place in order], **TIGHT)


@FORMS
def test_jobs_that_do_not_go_together_are_told_apart(bert, sliced):
    """One call with several state versions, rates, numbers of steps and cuts; no jobs at all is fine too."""
    other = bert.adapter(seed=2)
    jobs = mixed_jobs(bert)[1:5] + [dataclasses.replace(one, adapter=other) for one in mixed_jobs(bert)[1:3]]
    changes = [{}, {"rate": 1e-3}, {"steps": 5}, {"recovery": 0}, {}, {"cuts": False}]
    jobs = [
        dataclasses.replace(
            one,
            request=dataclasses.replace(
                one.request, program=local_program(**{"cuts": one.request.program.cuts} | change)
            ),
        )
        for one, change in zip(jobs, changes, strict=True)
    ]
    trainer = bert.cohort(rule(), sliced)
    assert_same_updates(trainer.train(jobs), bert.reference(rule()).train(jobs), **TIGHT)
    assert trainer.train([]) == []


@FORMS
def test_members_of_several_versions_are_one_cohort(bert, sliced):
    """Adapters of other factors, heads and ranks side by side, one per member: as each alone, and in one chunk."""
    jobs = mixed_jobs(bert)
    versions = [bert.adapter(seed=2), bert.adapter(rank=1, seed=3)]
    versions = [*(Adapter(one.factors, {k: v + n for k, v in one.head.items()}) for n, one in enumerate(versions, 1))]
    mixed = [*versions, jobs[2].adapter] * 2
    jobs = [dataclasses.replace(one, adapter=adapter) for one, adapter in zip(jobs, mixed, strict=True)]
    assert len(cohorts(jobs)) == 1
    got = bert.cohort(rule(), sliced).train(jobs)
    assert_same_updates(got, bert.reference(rule()).train(jobs), **TIGHT)
    one_version = bert.cohort(rule(), sliced).train(mixed_jobs(bert))
    name = next(iter(got[0].adapter.head))
    assert not torch.equal(got[0].adapter.head[name], one_version[0].adapter.head[name])


def test_jobs_on_other_frozen_weights_go_apart(bert):
    """Updates merged into the base are shared by a cohort, so that versions of them cannot meet in one."""
    jobs = mixed_jobs(bert)
    own = {name: torch.ones(b.shape[0], a.shape[1]) for name, (a, b) in jobs[0].adapter.factors.items()}
    changed = dataclasses.replace(jobs[0].adapter, merged=own)
    jobs = [dataclasses.replace(one, adapter=changed) if place % 2 else one for place, one in enumerate(jobs)]
    assert sorted(sorted(places) for places in cohorts(jobs)) == [[0, 2, 4], [1, 3, 5]]
    with pytest.raises(ValueError, match="share their frozen weights"):
        CohortStack(bert.base(True), [Member(one.adapter, one.start, 2, None) for one in jobs])


@FORMS
def test_one_clients_change_leaves_the_others_alone(llama, sliced):
    """Another rank, structure, ratio and average of client 2: every other client's update stays, to rounding."""
    jobs = mixed_jobs(llama)
    changed = list(jobs)
    changed[2] = job(
        jobs[0].adapter, llama.structure(7), 2, 0.65, rank=7, scores=random_scores(llama.backbone.shape, 2, 2)
    )
    one, other = (llama.cohort(rule(), sliced).train(cohort) for cohort in (jobs, changed))
    others = [0, 1, 3, 4, 5]
    assert_same_updates([one[place] for place in others], [other[place] for place in others], **TIGHT)
    assert not one[2].structure.same_as(other[2].structure)


# -- padding ----------------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("pooling", ["native", "mean"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_has_no_gradient_at_all(tiny_folders, architecture, pooling, sliced):
    """Ranks beyond a client's own, groups that it lacks, and the places of a shorter batch: exactly zero."""
    own = toy(str(tiny_folders[architecture]), pooling)
    structures, ranks = [own.structure(seed) for seed in (1, 2, 3)], (1, 4, 2)
    stack = own.stack(sliced, structures, ranks)
    batch = pack(
        own.data.text,
        [own.data.parts[client][:BATCH] for client in (0, 1, 2)],
        own.model.pack_rule,
        torch.device("cpu"),
        own.dtype,
    )
    assert {part.size for part in own.data.parts[:3]} == set(SAMPLES[:3])
    own.model.losses(batch, stack).sum().backward()
    shape = own.backbone.shape
    for linear in stack.base.targets:
        a, b = stack.factors[linear.name]
        for client, structure in enumerate(structures):
            for factor in (a, b):
                assert not factor.grad[client, ranks[client] :].any()
                assert factor.grad[client, : ranks[client]].any()
            by_head = linear.role in (Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUT)
            kept = (structure.head_mask if by_head else structure.channel_mask)[linear.layer]
            kept = np.repeat(kept, group_width(linear, shape))
            pruned = a if linear.role in (Role.ATTENTION_OUT, Role.DOWN) else b
            gone = slice(int(kept.sum()), None) if sliced else torch.from_numpy(~kept)
            assert not pruned.grad[client][:, gone].any()
            if sliced:
                assert not pruned[client][:, gone].any()


@FORMS
@pytest.mark.parametrize("pooling", ["native", "mean"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_stands_on_padding_never_shows(tiny_folders, architecture, pooling, sliced):
    """Another token on the empty places of a short batch: the same losses and gradients, bit for bit."""
    own = toy(str(tiny_folders[architecture]), pooling)
    results = []
    for filler in (1, 17):
        stack = own.stack(sliced, [own.structure(1), own.structure(2)], (4, 2))
        pack_rule = dataclasses.replace(own.model.pack_rule)
        batch = pack(own.data.text, list(own.data.parts[1:3]), pack_rule, torch.device("cpu"), own.dtype)
        used = torch.zeros(batch.input_ids.numel(), dtype=torch.bool)
        for client in range(2):
            start = client * batch.tokens
            used[start : start + int(own.data.text.lengths[own.data.parts[client + 1]].sum())] = True
        assert not used.all()
        batch.input_ids[0, ~used] = filler
        batch.labels[0, len(own.data.parts[1]) :] = filler % 3
        losses = own.model.losses(batch, stack)
        losses.sum().backward()
        results.append([losses.detach(), *(tensor.grad for tensor in stack.trained)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@FORMS
def test_a_cut_that_brings_a_group_back_or_empties_a_layer_is_refused(bert, sliced):
    full, empty = Structure.full(bert.backbone.shape), Structure.full(bert.backbone.shape)
    empty.channel_mask[1] = False
    stack = bert.stack(sliced, [bert.structure(1), full], (2, 2))
    optimizer = torch.optim.AdamW(stack.trained)
    with pytest.raises(ValueError, match="cannot bring a group back"):
        stack.prune([full, full], optimizer)
    with pytest.raises(ValueError, match="without a channel"):
        stack.prune([bert.structure(1), empty], optimizer)
    with pytest.raises(ValueError, match="without a channel"):
        bert.stack(sliced, [full, empty], (2, 2))


@FORMS
def test_adapters_and_averages_of_the_jobs_are_never_written_to(bert, sliced):
    jobs = mixed_jobs(bert)
    before = [tensor.clone() for pair in jobs[0].adapter.factors.values() for tensor in pair]
    scores = [one.scores and GroupScores(one.scores.heads.copy(), one.scores.channels.copy()) for one in jobs]
    weights = [weight.clone() for weight, _ in bert.backbone.full_weights.values()]
    bert.cohort(rule(), sliced).train(jobs)
    after = [tensor for pair in jobs[0].adapter.factors.values() for tensor in pair]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(map(torch.equal, weights, (weight for weight, _ in bert.backbone.full_weights.values())))
    for one, kept in zip(jobs, scores, strict=True):
        assert one.scores is None or np.array_equal(one.scores.heads, kept.heads)
