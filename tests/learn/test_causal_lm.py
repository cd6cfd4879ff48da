"""Language models: both engines against each other and against the plain Hugging Face path."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from causal_toys import answered_text, causal_toy, save_causal
from cohort_toys import CLIENTS, Toy, assert_same_updates, job, rule
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedsim.errors import ModelError
from fedsim.learn.cohort.chunk_memory import client_bytes
from fedsim.learn.cohort.pack import pack
from fedsim.learn.cohort.stack import CohortStack, Member
from fedsim.learn.cohort.tester import CohortTester
from fedsim.learn.export.peft_folder import write_peft_folder
from fedsim.learn.model.adapter import restrict
from fedsim.learn.model.backbone import load_backbone
from fedsim.learn.train.batches import IGNORED, eval_batches, make_batch
from fedsim.learn.train.evaluate import sentences_at_once
from fedsim.learn.train.importance import random_scores
from fedsim.learn.train.jobs import Job
from fedsim.learn.train.reference import ReferenceTester
from fedsim.settings import ModelSettings
from fedsim.structure import Structure

CPU = torch.device("cpu")
TIGHT = {"relative": 1e-10, "absolute": 1e-12}
SINGLE = {"relative": 1e-3, "absolute": 2e-5}
FORMS = pytest.mark.parametrize("sliced", [False, True], ids=["masked", "sliced"])
RANKS = (1, 2, 4, 6, 3, 4)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """One checkpoint with output weights of its own, one tied to its embeddings."""
    return {tied: str(save_causal(tmp_path_factory.mktemp("causal"), tied)) for tied in (False, True)}


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """Qwen2: biases on query, key and value; tied, as it is published in small sizes."""
    return str(save_causal(tmp_path_factory.mktemp("qwen"), tied=True, architecture="qwen2"))


@pytest.fixture
def own(folders) -> Toy:
    return causal_toy(folders[False])


def mixed_jobs(toy: Toy, **changes) -> list[Job]:
    """Six clients of mixed ranks, structures and data sizes, that prune to mixed ratios in mid-job."""
    adapter, shape = toy.adapter(), toy.backbone.shape
    full = Structure.full(shape)
    starts = [full, toy.structure(1), full, toy.structure(2), toy.structure(3), toy.structure(3)]
    ratios = (0.0, 0.5, 0.3, 0.6, 0.65, 0.2)
    jobs = []
    for client in range(CLIENTS):
        scores = None if client in (0, 4) else random_scores(shape, 9, client)
        options = {"scores": scores, "rank": RANKS[client], "ratio": ratios[client], "prune": True, **changes}
        jobs.append(job(adapter, starts[client], client, **options))
    return jobs


# -- the two engines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["own output", "tied output", "qwen2"])
def test_a_round_equals_the_references(folders, qwen, which):
    """Mixed ranks, structures and data sizes, importance each step and a cut in mid-job; both forms."""
    own = causal_toy(qwen if which == "qwen2" else folders[which == "tied output"])
    jobs = mixed_jobs(own)
    want = own.reference(rule()).train(jobs)
    assert not all(update.structure.same_as(one.start) for update, one in zip(want, jobs, strict=True))
    learned = [update.loss_after < update.loss_before for update in want]
    assert any(learned) if which == "qwen2" else all(learned[2:4])
    for sliced in (False, True):
        assert_same_updates(own.cohort(rule(), sliced).train(jobs), want, **TIGHT)


def test_a_round_in_single_precision_equals_to_rounding(folders):
    own = causal_toy(folders[False], torch.float32)
    jobs = mixed_jobs(own)
    want = own.reference(rule()).train(jobs)
    for sliced in (False, True):
        assert_same_updates(own.cohort(rule(), sliced).train(jobs), want, **SINGLE)


@FORMS
def test_without_pruning_and_one_by_one(own, sliced):
    jobs = mixed_jobs(own, prune=False, scores=None, ratio=0.0)
    want = own.reference(rule(None)).train(jobs)
    assert_same_updates(own.cohort(rule(None), sliced).train(jobs), want, **TIGHT)
    assert_same_updates(own.cohort(rule(None), sliced, chunk=1).train(jobs), want, **TIGHT)


def test_nothing_but_lora_is_trained_or_sent(own):
    update = own.cohort(rule(), True).train(mixed_jobs(own)[:1])[0]
    assert dict(update.adapter.head) == {}
    assert (own.backbone.head_names, own.backbone.shape.head_weights) == ((), 0)
    assert not any(parameter.requires_grad for parameter in own.backbone.output.parameters())


# -- against the plain path -------------------------------------------------------------------------------------------


def plain(folder: str) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_hugging_faces_with_the_prompt_masked(folders, tied):
    """`labels` of -100 on prompt and padding: mean cross-entropy of the batch's response tokens, per client.

    Hugging Face takes the loss in fp32 whatever the precision.
    """
    own, model = causal_toy(folders[tied]), plain(folders[tied])
    text, full = own.data.text, Structure.full(own.backbone.shape)
    samples = [part[:4] for part in own.data.parts[1:4]]
    stack = own.stack(True, [full] * 3, (4,) * 3)
    for name, (a, b) in stack.factors.items():
        stack.factors[name] = (a.detach(), torch.zeros_like(b))
    losses = own.model.losses(pack(text, samples, own.model.pack_rule, CPU, own.dtype), stack)
    for loss, part in zip(losses, samples, strict=True):
        labels = torch.full((len(part), int(text.lengths[part].max())), -100)
        for row, sample in enumerate(part):
            kept = slice(int(text.response_start[sample]), int(text.lengths[sample]))
            labels[row, kept] = torch.from_numpy(text.input_ids[sample, kept].astype(np.int64))
        batch = make_batch(text, part)
        want = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0.0, check_dtype=False)


def test_successors_by_a_plain_loop():
    text = answered_text(20)
    chosen = np.array([3, 17, 0])
    labels = make_batch(text, chosen).labels
    want = torch.full_like(labels, IGNORED)
    for row, sample in enumerate(chosen):
        for place in range(int(text.response_start[sample]), int(text.lengths[sample])):
            want[row, place - 1] = int(text.input_ids[sample, place])
    assert torch.equal(labels, want)


def test_packed_slots_by_a_plain_loop(own):
    """One slot per token of a response, in the client's order, with its weight and the place it is predicted from."""
    text, samples = own.data.text, [part[:3] for part in own.data.parts[:3]]
    batch = pack(text, samples, own.model.pack_rule, CPU, own.dtype)
    assert batch.slots == max(int((text.lengths - text.response_start)[part].sum()) for part in samples)
    places = batch.predicting.forth(torch.arange(1, 1 + batch.clients * batch.tokens).double()[:, None])[:, 0]
    places = places.view(batch.clients, batch.slots).long() - 1
    for client, part in enumerate(samples):
        wanted, row, labels = [], client * batch.tokens, []
        for sample in part:
            start, end = int(text.response_start[sample]), int(text.lengths[sample])
            wanted += [row + place - 1 for place in range(start, end)]
            labels += text.input_ids[sample, start:end].tolist()
            row += end
        count = len(wanted)
        assert places[client].tolist() == wanted + [-1] * (batch.slots - count)
        assert batch.labels[client, :count].tolist() == labels
        assert batch.weights[client].tolist() == [1 / count] * count + [0.0] * (batch.slots - count)


@FORMS
def test_padding_neither_shows_nor_gets_a_gradient(own, sliced):
    results = []
    for filler in (1, 17):
        stack = own.stack(sliced, [own.structure(1), own.structure(2)], (4, 2))
        batch = pack(own.data.text, list(own.data.parts[1:3]), own.model.pack_rule, CPU, own.dtype)
        used = torch.zeros(batch.input_ids.numel(), dtype=torch.bool)
        for client in range(2):
            start = client * batch.tokens
            used[start : start + int(own.data.text.lengths[own.data.parts[client + 1]].sum())] = True
        assert not used.all()
        batch.input_ids[0, ~used] = filler
        batch.labels[batch.weights == 0] = filler
        losses = own.model.losses(batch, stack)
        losses.sum().backward()
        results.append([losses.detach(), *(tensor.grad for tensor in stack.trained)])
        assert all(tensor.isfinite().all() for tensor in results[-1])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# -- testing ----------------------------------------------------------------------------------------------------------


def test_accuracy_and_loss_are_over_all_response_tokens(own):
    """Both testers against a loop over single samples, on several structures."""
    text, adapter = answered_text(90, seed=4), own.adapter()
    structures = [Structure.full(own.backbone.shape), own.structure(2), own.structure(1)]
    reference = ReferenceTester(own.lora_model, eval_batches(text, 64)[0]).measure(adapter, structures)
    cohort = CohortTester(own.model, own.base(True), text).measure(adapter, structures)
    np.testing.assert_allclose(cohort, reference, rtol=1e-10)
    for structure, (accuracy, loss) in zip(structures, cohort, strict=True):
        own.lora_model.load(structure, restrict(adapter, structure, adapter.rank, own.backbone.shape, None))
        right, lost, count = 0, 0.0, 0
        for sample in range(len(text)):
            ids = torch.from_numpy(text.input_ids[sample, : text.lengths[sample]].astype(np.int64))
            with torch.no_grad():
                logits = own.lora_model.logits({"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]})
            for place in range(int(text.response_start[sample]), len(ids)):
                scores = logits[0, place - 1].log_softmax(dim=-1)
                right += int(scores.argmax() == ids[place])
                lost -= float(scores[ids[place]])
                count += 1
        assert accuracy == right / count
        assert loss == pytest.approx(lost / count, rel=1e-10)
        assert math.exp(loss) > 1.0


def test_few_sentences_at_once_where_their_logits_are_large(own):
    shape = own.backbone.shape
    assert sentences_at_once(shape, 13) == 64
    assert sentences_at_once(shape, 1 << 22) == 1
    assert sentences_at_once(shape, 20_000) == (1 << 24) // (20_000 * shape.vocab)


def test_memory_of_a_client_counts_its_logits_and_not_the_shared_output(own):
    """Twice the tokens, twice the logits; the output's weights, which all clients share, are not a client's."""
    base, adapter = own.base(False), own.adapter()
    few, many = (client_bytes(own.model, base, adapter, 4, length, False) for length in (6, 11))
    logit_bytes = 8 * own.backbone.shape.vocab
    assert many - few > 4 * 5 * logit_bytes * 3  # the log-softmax that is kept, and twice the largest
    assert few < 200_000


# -- loading and saving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_the_adapter_loads_onto_the_plain_causal_model(folders, tied, tmp_path):
    own = causal_toy(folders[tied])
    adapter, full = own.adapter(), Structure.full(own.backbone.shape)
    write_peft_folder(tmp_path, own.backbone, adapter, ModelSettings(name=folders[tied]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    model = PeftModel.from_pretrained(plain(folders[tied]), str(tmp_path)).eval()
    assert model.peft_config["default"].task_type == "CAUSAL_LM"
    own.lora_model.load(full, adapter)
    batch = make_batch(own.data.text, np.arange(5))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch.inputs).logits, own.lora_model.logits(batch), rtol=0.0, atol=0.0)
        bare = plain(folders[tied])(**batch.inputs).logits
        assert not torch.allclose(bare, own.lora_model.logits(batch))


def load(folder) -> object:
    return load_backbone(ModelSettings(name=str(folder)), 0, seed=3, device=CPU)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "mpnet"])
def test_an_encoder_is_refused(tiny_folders, architecture):
    with pytest.raises(ModelError, match=rf"of type '{architecture}', an encoder, and .*'causal_lm' needs a decoder"):
        load(tiny_folders[architecture])


def test_a_checkpoint_without_output_weights_is_refused(tiny_folders):
    with pytest.raises(ModelError, match=r"has no output weights \(lm_head\)"):
        load(tiny_folders["llama"])


def test_in_bf16_the_whole_model_is_one_copy_and_logits_are_in_fp32(folders):
    backbone = load_backbone(ModelSettings(name=folders[True]), 0, 3, CPU, products=torch.bfloat16)
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.bfloat16}
    assert backbone.output.weight is backbone.encoder.embed_tokens.weight
    assert backbone.shape.tied
    toy = causal_toy(folders[True], torch.float32)
    low = Toy(backbone, "native", "all", torch.float32, toy.data)
    members = [Member(toy.adapter(), Structure.full(backbone.shape), 4, None)]
    stacks = [CohortStack(one.base(False, kind), members) for one, kind in ((low, torch.bfloat16), (toy, None))]
    batch = pack(toy.data.text, [toy.data.parts[2][:5]], toy.model.pack_rule, CPU, torch.float32)
    got, want = (one.model.logits(batch, stack) for one, stack in zip((low, toy), stacks, strict=True))
    assert got.dtype == torch.float32
    assert float((got - want).abs().max()) < 0.05 * float(want.abs().max())
