"""Tiny random checkpoints of each architecture, with tokenizers, and a padded batch: for tests of the learner."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

ARCHITECTURES = ("bert", "roberta", "llama")
VOCAB = 60
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}


def _tokenizer(architecture: str) -> PreTrainedTokenizerFast:
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocab = {word: place for place, word in enumerate(specials + [f"w{i}" for i in range(VOCAB - len(specials))])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", 0), ("</s>", 2)]
    core.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B </s>", ends)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if architecture != "llama":
        names |= {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def _random_model(architecture: str, layers: int, **options: Any) -> Any:
    sizes = {**_SIZES, "num_hidden_layers": layers}
    if architecture == "bert":
        return BertModel(BertConfig(pad_token_id=1, **sizes), **options)
    if architecture == "roberta":
        return RobertaModel(RobertaConfig(pad_token_id=1, type_vocab_size=1, **sizes), **options)
    return LlamaModel(LlamaConfig(num_key_value_heads=2, pad_token_id=None, attention_bias=True, **sizes))


def save_tiny(architecture: str, folder: Path, layers: int = 2, **options: Any) -> Path:
    """Write weights, config and tokenizer to `folder`. LLaMA has 4 query heads on 2 key-value heads."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = _random_model(architecture, layers, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases and norms start as zeros and ones, which would hide mistakes
                    parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    _tokenizer(architecture).save_pretrained(folder)
    return folder


def make_padded_batch() -> dict[str, torch.Tensor]:
    """Five rows of 3 to 11 tokens, padded on the right with token 1."""
    lengths = torch.tensor([11, 3, 7, 10, 5])
    ids = torch.randint(5, VOCAB, (5, 11), generator=torch.Generator().manual_seed(11))
    mask = (torch.arange(11) < lengths[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}
