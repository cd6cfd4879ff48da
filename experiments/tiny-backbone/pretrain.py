"""Rebuild the built-in model ``tiny``: a two-layer RoBERTa pretrained on unlabelled text of the synthetic language.

    python experiments/tiny-backbone/pretrain.py [--out fedsim/assets/tiny]

Masked-language modelling (25% of the tokens; of these 80% masked, 10% random, 10% kept: Devlin et al., 1810.04805)
for a fixed number of steps, everything seeded. The folder holds config, encoder weights and tokenizer;
``AutoModelForSequenceClassification.from_pretrained`` finds all but the classification head in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM, RobertaModel

from fedsim.data.synthetic import unlabelled_text, vocabulary
from fedsim.resources import asset_folder

SEED = 0
STEPS = 2_000
BATCH_SIZE = 64
SENTENCES = 40_000
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
MASKED_FRACTION = 0.25
MAX_TOKENS = 64
THREADS = 1
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the language's own vocabulary, with RoBERTa's special tokens and pair layout."""
    ids = {word: index for index, word in enumerate((*SPECIAL, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_config(tokens: int) -> RobertaConfig:
    """The shape of `tiny`: RoBERTa counts positions from 2, hence two more than tokens."""
    return RobertaConfig(
        vocab_size=tokens,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=MAX_TOKENS + 2,
        type_vocab_size=1,
        initializer_range=0.1,  # at RoBERTa's 0.02 good and bad words were not told apart within the steps given
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )


def mask_tokens(
    ids: torch.Tensor, mask_id: int, tokens: int, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(masked ids, where to predict); special tokens are never chosen."""
    chosen = (torch.rand(ids.shape, generator=draw) < MASKED_FRACTION) & (ids >= len(SPECIAL))
    fate = torch.rand(ids.shape, generator=draw)
    noise = torch.randint(len(SPECIAL), tokens, ids.shape, generator=draw)
    masked = torch.where(chosen & (fate < 0.8), mask_id, ids)
    return torch.where(chosen & (fate >= 0.9), noise, masked), chosen


def pretrain(tokenizer: PreTrainedTokenizerFast, steps: int) -> RobertaModel:
    """Train for `steps` steps and return the encoder."""
    torch.manual_seed(SEED)
    draw = torch.Generator().manual_seed(SEED)
    order = np.random.default_rng(SEED)
    model = RobertaForMaskedLM(build_config(len(tokenizer)))
    encoded = tokenizer(list(unlabelled_text(SENTENCES, SEED)), padding=True, return_tensors="pt")
    ids, attention = encoded["input_ids"], encoded["attention_mask"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    start, running = time.perf_counter(), 0.0
    for step in range(steps):
        rows = torch.from_numpy(order.choice(SENTENCES, BATCH_SIZE, replace=False))
        length = int(attention[rows].sum(1).max())
        batch, seen = ids[rows, :length], attention[rows, :length]
        masked, chosen = mask_tokens(batch, tokenizer.mask_token_id, len(tokenizer), draw)
        hidden = model.roberta(masked, attention_mask=seen).last_hidden_state
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[chosen]), batch[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {running:.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    return model.roberta


def save(model: RobertaModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write config, weights and tokenizer, and print the weights' sha256."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for path in (
        out / "config.json",
        out / "tokenizer_config.json",
    ):  # no library version: it says nothing of the model
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("transformers_version", None)
        if "tokenizer_class" in content:  # the name that every supported version of the library knows
            content["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights = out / "model.safetensors"
    weights.chmod(0o644)
    print(f"{weights.name}: {weights.stat().st_size} bytes, sha256 {hashlib.sha256(weights.read_bytes()).hexdigest()}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=asset_folder("tiny"))
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    tokenizer = build_tokenizer()
    save(pretrain(tokenizer, arguments.steps), tokenizer, arguments.out)


if __name__ == "__main__":
    main()
