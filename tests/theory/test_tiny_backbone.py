"""The built-in backbone: it loads as any local folder does, and its pretraining earns its place.

The full proof, three seeds and three learning rates, is ``experiments/tiny-backbone/prove.py``.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from fedsim.data.synthetic import synthetic_corpus, vocabulary
from fedsim.resources import asset_folder
from fedsim.settings import DataSettings

TINY = asset_folder("tiny")
PROVE = Path(__file__).resolve().parents[2] / "experiments" / "tiny-backbone" / "prove.py"


@pytest.fixture(scope="module")
def prove():
    spec = importlib.util.spec_from_file_location("tiny_backbone_prove", PROVE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_folder_is_small_and_of_the_stated_shape():
    assert (TINY / "model.safetensors").stat().st_size <= 4_000_000
    config = AutoConfig.from_pretrained(TINY)
    widths = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    assert (config.model_type, widths) == ("roberta", (64, 2, 4, 256))
    assert config.max_position_embeddings >= 64 + 2


def test_only_the_classification_head_is_missing():
    _, loading = AutoModelForSequenceClassification.from_pretrained(TINY, num_labels=2, output_loading_info=True)
    assert loading["missing_keys"]
    assert all(key.startswith("classifier.") for key in loading["missing_keys"])
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]


def test_weights_are_finite_single_precision():
    with safe_open(TINY / "model.safetensors", "pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118
    assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in tensors)


def test_tokenizer_knows_every_word_and_lays_out_pairs_as_roberta_does():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    words = vocabulary()
    ids = tokenizer.convert_tokens_to_ids(list(words))
    assert len(set(ids)) == len(words) == len(tokenizer) - 5
    assert tokenizer.unk_token_id not in ids
    corpus = synthetic_corpus(DataSettings(name="synthetic"), seed=0)
    encoded = tokenizer(list(corpus.test.texts))["input_ids"]
    assert all(tokenizer.unk_token_id not in row for row in encoded)
    assert max(len(row) for row in encoded) <= 32
    pair = tokenizer("Good", "zzz")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(pair) == ["<s>", "good", "</s>", "</s>", "<unk>", "</s>"]


@pytest.mark.slow
def test_federated_lora_learns_from_pretrained_weights_what_it_cannot_from_random_ones(prove):
    """One seed and rate, fewer clients and rounds than the full proof: a smaller margin of the same direction."""
    protocol = prove.Protocol(clients=4, rounds=6, local_steps=10)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pretrained, random = (prove.federated_accuracy(TINY, start, 1e-2, 0, protocol) for start in (True, False))
    finally:
        torch.set_num_threads(threads)
    assert pretrained > 0.8
    assert random < 0.65
