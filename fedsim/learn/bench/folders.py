"""Model folders of a named shape with random weights: speed depends on widths, not on values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedsim.families.family_catalogue import family_of
from fedsim.structure import ModelShape

_WORDS = 100


def write_random_model(shape: ModelShape, folder: Path) -> Path:
    """Write config, random weights and a word-level tokenizer of a shape of any family."""
    family = family_of(shape)
    keys = family.keys
    sizes: dict[str, Any] = {
        keys.vocab: shape.vocab,
        keys.hidden: shape.hidden,
        keys.layers: shape.layers,
        keys.heads: shape.heads,
        keys.ffn: shape.ffn,
        "pad_token_id": 1,
    }
    if family.causal:
        sizes |= {keys.kv_heads: shape.kv_heads, "tie_word_embeddings": shape.tied}
    else:
        sizes[keys.positions] = shape.positions
    if family.types == "ignored":
        sizes["type_vocab_size"] = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # any values will do, the same each time
        config = getattr(transformers, f"{family.title}Config")(**sizes)
        model = getattr(transformers, f"{family.title}Model")(config)
    model.save_pretrained(folder)
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = specials + [f"w{place}" for place in range(min(_WORDS, shape.vocab - len(specials)))]
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
    )
    tokenizer.save_pretrained(folder)
    return folder
