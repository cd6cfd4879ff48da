"""Rebuild the built-in model ``tiny-decoder``: a two-layer LLaMA that has read text of the synthetic language.

    python experiments/tiny-backbone/pretrain_decoder.py [--out fedsim/assets/tiny-decoder]

Next-token prediction for a fixed number of steps, everything seeded. The tokenizer is that of ``tiny``. It is there so
that ``fedsim sweep experiments/causal-lm/sweep.yaml --tiny`` needs no other file; its figures answer nothing.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedsim.data.synthetic import unlabelled_text
from fedsim.resources import asset_folder

SEED = 0
STEPS = 600
BATCH_SIZE = 32
BLOCK_TOKENS = 32
SENTENCES = 20_000
LEARNING_RATE = 3e-3
THREADS = 1


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=asset_folder("tiny-decoder"))
    out = parser.parse_args().out
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(asset_folder("tiny"))
    rows = tokenizer(list(unlabelled_text(SENTENCES, SEED)))["input_ids"]  # each between <s> and </s>
    stream = np.concatenate(rows)
    whole = len(stream) // BLOCK_TOKENS * BLOCK_TOKENS
    blocks = torch.from_numpy(stream[:whole].reshape(-1, BLOCK_TOKENS).astype(np.int64))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    draws = np.random.default_rng(SEED)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        batch = blocks[torch.from_numpy(draws.choice(len(blocks), BATCH_SIZE, replace=False))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{STEPS}  loss {loss.item():.3f}", flush=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
