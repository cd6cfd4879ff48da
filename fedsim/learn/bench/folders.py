"""Model folders of a named shape with random weights: speed depends on widths, not on values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from fedsim.structure import ModelShape

_WORDS = 100


def write_random_model(shape: ModelShape, folder: Path) -> Path:
    """Write config, random weights and a word-level tokenizer of a BERT or RoBERTa shape.

    Raises:
        ValueError: a shape of another architecture.
    """
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": shape.positions,
        "pad_token_id": 1,
    }
    model: BertModel | RobertaModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # any values will do, the same each time
        if shape.architecture == "bert":
            model = BertModel(BertConfig(**sizes))
        elif shape.architecture == "roberta":
            model = RobertaModel(RobertaConfig(type_vocab_size=1, **sizes))
        else:
            raise ValueError(f"no random model of architecture '{shape.architecture}' (allowed: bert, roberta)")
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
