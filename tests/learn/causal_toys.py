"""A tiny random causal language model, and prompts with responses for `cohort_toys.CLIENTS` clients."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from cohort_toys import SAMPLES, Toy
from tiny_checkpoints import VOCAB, _tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fedsim.learn.model.backbone import load_backbone
from fedsim.learn.train.batches import EncodedText
from fedsim.learn.train.jobs import ClientData
from fedsim.settings import ModelSettings


def save_causal(folder: Path, tied: bool = False, layers: int = 2, architecture: str = "llama") -> Path:
    """Weights, config and tokenizer: 4 query heads on 2 key-value heads, norms and biases not at their defaults."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        is_llama = architecture == "llama"
        config_class, own = (LlamaConfig, {"attention_bias": True}) if is_llama else (Qwen2Config, {})
        model = (LlamaForCausalLM if is_llama else Qwen2ForCausalLM)(
            config_class(
                vocab_size=VOCAB,
                hidden_size=16,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=12,
                max_position_embeddings=40,
                initializer_range=0.3,
                tie_word_embeddings=tied,
                bos_token_id=0,
                eos_token_id=2,
                pad_token_id=None,
                **own,
            )
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    _tokenizer(architecture).save_pretrained(folder)
    return folder


def answered_text(samples: int, seed: int = 0, longest: int = 13) -> EncodedText:
    """Random prompts of 1 to 6 tokens with responses of 1 token and more; any token may occur anywhere."""
    draw = np.random.default_rng(seed)
    starts = draw.integers(1, 7, samples)
    lengths = starts + draw.integers(1, longest - 6, samples)
    real = np.arange(lengths.max()) < lengths[:, None]
    ids = np.where(real, draw.integers(0, VOCAB, real.shape), 2).astype(np.int32)
    return EncodedText(ids, lengths, np.zeros(samples, dtype=np.int64), None, starts)


@lru_cache(maxsize=8)
def causal_toy(folder: str, dtype: torch.dtype = torch.float64) -> Toy:
    """The toy of a checkpoint folder, as a language model."""
    backbone = load_backbone(ModelSettings(name=folder), 0, seed=3, device=torch.device("cpu"))
    backbone.model.to(dtype)
    order = np.random.default_rng(1).permutation(sum(SAMPLES))
    data = ClientData(answered_text(sum(SAMPLES)), tuple(np.split(order, np.cumsum(SAMPLES)[:-1])))
    return Toy(backbone, "native", "all", dtype, data)
