"""Make the study's decoder: a small LLaMA with its tokenizer, trained whole on text that no test of the study sees.

    python experiments/causal-lm/pretrain.py --news train_10k.tsv.gz --dolly dolly15k_clients10.jsonl.gz

Text: AG News descriptions, and of Dolly the prompts and contexts of the *training* rows of ``base.yaml``; no response
at all, and nothing of the held-out rows. Byte-pair vocabulary of 3,000 trained on the same text; next-token training by
AdamW for a fixed number of steps, everything seeded. Writes `--out` (not part of the project) and prints its losses.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedsim.data.corpus import load_corpus
from fedsim.data.tables import Source, read_columns
from fedsim.runner.config import load_config

SEED = 0
VOCABULARY = 3_000
BLOCK_TOKENS = 64
BATCH_SIZE = 32
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
THREADS = 1
SPECIAL = ("<pad>", "<s>", "</s>")


def read_texts(news: Path, dolly: Path) -> list[str]:
    """All documents, shuffled by the seed."""
    config = load_config(Path(__file__).parent / "base.yaml", {"data.path": str(dolly)})
    train = load_corpus(config.data, config.seed).train
    prompts = [
        f"{text}\n{context}" if context else text for text, context in zip(train.texts, train.pairs, strict=True)
    ]
    source = Source("--news", news, header=False, quoting="none")
    texts = prompts + [str(row[0]) for _, row in read_columns(source, {"text": 0})]
    return [texts[place] for place in np.random.default_rng(SEED).permutation(len(texts))]


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding, so that no text is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, begin, end = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=pad)


def blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Documents between begin and end tokens, one after another, cut into rows of `BLOCK_TOKENS` tokens."""
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    stream = np.concatenate([[tokenizer.bos_token_id, *row, tokenizer.eos_token_id] for row in rows])
    whole = len(stream) // BLOCK_TOKENS * BLOCK_TOKENS
    return torch.from_numpy(stream[:whole].reshape(-1, BLOCK_TOKENS).astype(np.int64))


def build_model(vocabulary: int) -> LlamaForCausalLM:
    """Four layers, four query heads on two key-value heads, output tied to the embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def pretrain(model: LlamaForCausalLM, rows: torch.Tensor, steps: int) -> None:
    """Train for `steps` steps; the last hundredth of the rows is kept apart for the loss that is printed."""
    order, held = np.random.default_rng(SEED), rows[-len(rows) // 100 :]
    rows = rows[: -len(held)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    start = time.perf_counter()
    for step in range(steps):
        batch = rows[torch.from_numpy(order.choice(len(rows), BATCH_SIZE, replace=False))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    with torch.no_grad():
        held_loss = model(input_ids=held, labels=held).loss.item()
    print(f"held-out loss {held_loss:.3f} nats a token (perplexity {math.exp(held_loss):.1f})")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--news", type=Path, required=True)
    parser.add_argument("--dolly", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--out", type=Path, default=Path("runs/causal-lm/model"))
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    texts = read_texts(arguments.news, arguments.dolly)
    tokenizer = build_tokenizer(texts)
    rows = blocks(texts, tokenizer)
    print(f"{len(texts)} documents, {rows.numel()} tokens")
    model = build_model(len(tokenizer))
    pretrain(model, rows, arguments.steps)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
