"""Encoding, batch streams, and that padding neither changes a result nor gets a gradient."""

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fedsim.errors import DataError
from fedsim.learn.train.batches import (
    EncodedText,
    batch_stream,
    encode,
    eval_batches,
    fixed_batch,
    in_original_order,
    make_batch,
)

WORDS = ["a", "b", "c", "d", "e", "f"]
VOCAB = {word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}


def _tokenizer(types: bool, pad: bool = True, special: bool = True) -> transformers.PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if types else [])
    pads = {"pad_token": "<pad>"} if pad else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, model_input_names=names, eos_token="</s>", unk_token="<unk>", **pads
    )


def _texts(texts, pairs=None):
    return SimpleNamespace(texts=texts, pairs=pairs, labels=np.arange(len(texts)) % 2)


def _many(count: int, seed: int = 0) -> EncodedText:
    """`count` samples that tell themselves apart: the label is the sample's number."""
    lengths = np.random.default_rng(seed).integers(1, 9, count)
    ids = np.where(np.arange(9) < lengths[:, None], 5, 1).astype(np.int32)
    return EncodedText(ids, lengths, np.arange(count), None)


def test_encoding_pads_right_truncates_and_keeps_lengths():
    encoded = encode(_texts(["a b", "c", "a b c d e"]), _tokenizer(types=False), 5)
    assert encoded.input_ids.tolist() == [[0, 4, 5, 2, 1], [0, 6, 2, 1, 1], [0, 4, 5, 6, 2]]
    assert encoded.lengths.tolist() == [4, 3, 5]
    assert encoded.labels.tolist() == [0, 1, 0]
    assert encoded.token_type_ids is None
    assert len(encoded) == 3


def test_pairs_get_token_types_and_lose_the_longer_sentence_first():
    encoded = encode(_texts(["a b", "a"], ["c", "b c d e f"]), _tokenizer(types=True), 6)
    assert encoded.input_ids.tolist() == [[0, 4, 5, 2, 6, 2], [0, 4, 2, 5, 6, 2]]
    assert encoded.token_type_ids.tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    batch = make_batch(encoded, [1, 0])
    assert batch.token_type_ids.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    assert set(batch.inputs) == {"input_ids", "attention_mask", "token_type_ids"}


def test_without_a_padding_token_the_end_token_pads():
    encoded = encode(_texts(["a b", "c"]), _tokenizer(types=False, pad=False), 8)
    assert encoded.input_ids.tolist() == [[0, 4, 5, 2], [0, 6, 2, 2]]
    assert make_batch(encoded, [0, 1]).attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_empty_data_is_refused():
    with pytest.raises(DataError, match="no samples"):
        encode(_texts([]), _tokenizer(types=False), 5)
    with pytest.raises(DataError, match="text of sample 1 has no tokens"):
        encode(_texts(["a", ""]), _tokenizer(types=False, special=False), 5)
    for call in (lambda: batch_stream(_many(3), [], 2, 0, 7, 0), lambda: fixed_batch(_many(3), [], 2, 0, 7)):
        with pytest.raises(ValueError, match="client 7 has no samples"):
            call()


def test_a_batch_is_as_wide_as_its_longest_sample():
    encoded = _many(20)
    batch = make_batch(encoded, [3, 11, 4])
    assert batch.input_ids.shape == (3, encoded.lengths[[3, 11, 4]].max())
    assert batch.attention_mask.sum(1).tolist() == encoded.lengths[[3, 11, 4]].tolist()
    assert batch.labels.tolist() == [3, 11, 4]
    assert {tensor.dtype for tensor in (*batch.inputs.values(), batch.labels)} == {torch.int64}
    assert "token_type_ids" not in batch.inputs


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(1, 20), batch_size=st.integers(1, 12), seed=st.integers(0, 1000))
def test_stream_passes_hold_each_sample_once(samples, batch_size, seed):
    encoded, mine = _many(40), np.arange(40)[-samples:]
    size, passes = min(samples, batch_size), 3
    steps = -(-passes * samples // size)
    batches = list(islice(batch_stream(encoded, mine, batch_size, seed, 2, 5), steps))
    assert {len(batch.labels) for batch in batches} == {size}
    seen = torch.cat([batch.labels for batch in batches]).numpy()[: passes * samples].reshape(passes, samples)
    assert (np.sort(seen, axis=1) == mine).all()


def test_stream_depends_on_seed_client_and_round_alone():
    def labels(*keys, extra=0):
        return [b.labels.tolist() for b in islice(batch_stream(_many(30 + extra), np.arange(30), 8, *keys), 4)]

    assert labels(0, 1, 2) == labels(0, 1, 2, extra=10)
    streams = [labels(0, 1, 2), labels(1, 1, 2), labels(0, 2, 2), labels(0, 1, 3)]
    assert all(streams[i] != streams[j] for i in range(4) for j in range(i))
    assert labels(0, 1, 2)[:3] != labels(0, 1, 2)[1:]


def test_probe_batch_is_fixed_for_a_client():
    encoded, mine = _many(40), np.arange(5, 25)
    probe = fixed_batch(encoded, mine, 8, 0, 3)
    assert len(set(probe.labels.tolist())) == 8
    assert set(probe.labels.tolist()) <= set(mine.tolist())
    assert torch.equal(fixed_batch(encoded, mine, 8, 0, 3).labels, probe.labels)
    assert not torch.equal(fixed_batch(encoded, mine, 8, 0, 4).labels, probe.labels)
    assert fixed_batch(encoded, mine, 99, 0, 3).labels.tolist() == mine.tolist()


def test_eval_batches_hold_all_once_with_little_padding():
    encoded = _many(53)
    batches, order = eval_batches(encoded, 8)
    labels = torch.cat([batch.labels for batch in batches])
    assert torch.equal(labels, order)
    assert in_original_order(labels, order).tolist() == list(range(53))
    padded = sum(batch.input_ids.numel() for batch in batches)
    unsorted = sum(make_batch(encoded, range(s, min(s + 8, 53))).input_ids.numel() for s in range(0, 53, 8))
    assert encoded.lengths.sum() <= padded < 0.8 * unsorted


def test_first_stream_is_what_it_was():
    """Golden, from `[b.labels.tolist() for b in islice(batch_stream(_many(10), np.arange(10), 4, 7, 3, 1), 3)]`: the
    order of batches is part of every result, so a change of it must be meant."""
    batches = islice(batch_stream(_many(10), np.arange(10), 4, 7, 3, 1), 3)
    assert [batch.labels.tolist() for batch in batches] == GOLDEN_STREAM
    assert fixed_batch(_many(10), np.arange(10), 4, 7, 3).labels.tolist() == GOLDEN_PROBE


GOLDEN_STREAM = [[9, 5, 6, 7], [1, 8, 2, 3], [0, 4, 7, 1]]
GOLDEN_PROBE = [0, 4, 5, 7]


def _model(architecture: str, attention: str) -> torch.nn.Module:
    sizes = {
        "vocab_size": len(VOCAB),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "pad_token_id": 1,
        "num_labels": 2,
        "attn_implementation": attention,
    }
    torch.manual_seed(0)
    config = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}.get(
        architecture, transformers.LlamaConfig
    )(**sizes)
    return transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "llama"])
def test_padding_changes_nothing_and_gets_no_gradient(architecture, attention):
    texts = _texts(["a b c d e f", "b", "c d", "f e d c"])
    encoded = encode(texts, _tokenizer(types=architecture == "bert"), 16)
    model = _model(architecture, attention)
    outputs = []

    def keep(module, inputs, output):
        output.retain_grad()
        outputs.append(output)

    model.get_input_embeddings().register_forward_hook(keep)
    batch = make_batch(encoded, range(4))
    logits = model(**batch.inputs).logits
    torch.nn.functional.cross_entropy(logits, batch.labels).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    reached = outputs[0].grad.abs().sum(-1)
    assert (batch.attention_mask == 0).sum() == 11
    assert torch.count_nonzero(reached[batch.attention_mask == 0]) == 0
    assert torch.count_nonzero(reached[batch.attention_mask == 1]) == batch.attention_mask.sum()

    model.zero_grad()
    for index in range(4):
        alone = make_batch(encoded, [index])
        assert alone.attention_mask.all()
        one = model(**alone.inputs).logits
        torch.testing.assert_close(one[0], logits[index], rtol=0, atol=1e-6)
        (torch.nn.functional.cross_entropy(one, alone.labels) / 4).backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-6)
