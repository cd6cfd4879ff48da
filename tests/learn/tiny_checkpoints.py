"""Tiny random checkpoints of each family, with tokenizers, and a padded batch: for tests of the learner."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from fedsim.families.family_catalogue import family_names, find_family

ARCHITECTURES = ("bert", "roberta", "distilbert", "mpnet", "llama", "qwen2")
DECODERS = family_names(causal=True)
VOCAB = 60


def _tokenizer(architecture: str) -> PreTrainedTokenizerBase:
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    if architecture == "qwen2":  # the library reads a folder of this type with its own tokenizer, whatever it says
        pieces = [*specials, "w", "\u0120", "\u0120w", *"0123456789"]
        pieces += [f"filler{i}" for i in range(VOCAB - len(pieces))]
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        vocab = {piece: place for place, piece in enumerate(pieces)}
        return Qwen2Tokenizer(vocab=vocab, merges=[("\u0120", "w")], **names)
    vocab = {word: place for place, word in enumerate(specials + [f"w{i}" for i in range(VOCAB - len(specials))])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", 0), ("</s>", 2)]
    core.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B </s>", ends)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if architecture not in DECODERS:
        names |= {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


_OWN = {
    "bert": {"pad_token_id": 1},
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": {"pad_token_id": 1},
    "mpnet": {"pad_token_id": 0},  # it counts positions from token 1 on all the same
    "llama": {"num_key_value_heads": 2, "pad_token_id": None, "attention_bias": True},
}
"""What a family's configuration has besides its widths; of another decoder, LLaMA's but for `attention_bias`."""


def tiny_config(architecture: str, layers: int) -> Any:
    """Widths 16, 4 heads, 12 channels; a decoder has 2 key-value heads."""
    family = find_family(architecture)
    assert family is not None
    keys = family.keys
    sizes = {
        keys.vocab: VOCAB,
        keys.hidden: 16,
        keys.heads: 4,
        keys.ffn: 12,
        keys.positions: 40,
        keys.layers: layers,
        "initializer_range": 0.3,
    }
    own = _OWN.get(architecture, {"num_key_value_heads": 2, "pad_token_id": None})
    return getattr(transformers, f"{family.title}Config")(**sizes, **own)


def _random_model(architecture: str, layers: int, **options: Any) -> Any:
    config = tiny_config(architecture, layers)
    return getattr(transformers, type(config).__name__.replace("Config", "Model"))(config, **options)


def save_tiny(architecture: str, folder: Path, layers: int = 2, **options: Any) -> Path:
    """Write weights, config and tokenizer to `folder`. Decoders have 4 query heads on 2 key-value heads."""
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
