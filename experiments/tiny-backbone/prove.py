"""Does pretraining earn its place? Federated LoRA from the pretrained encoder against the same encoder at random.

    python experiments/tiny-backbone/prove.py [--seeds 0 1 2] [--rates 2e-3 5e-3 1e-2] [--model fedsim/assets/tiny]

A plain loop of PEFT models and no simulator: FedAvg of LoRA factors and head over Dirichlet(10) clients. It stands
apart from the package's own training on purpose, so that one can be held against the other. Bar: at the best of the
same learning rates the pretrained weights pass 90% test accuracy and random weights stay under 80%.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from fedsim.data.partition import partition
from fedsim.data.synthetic import synthetic_corpus
from fedsim.resources import asset_folder
from fedsim.settings import DataSettings


@dataclass(frozen=True)
class Protocol:
    """The federated run. LoRA of rank 8 and alpha 16 on every Linear of the blocks."""

    clients: int = 16
    rounds: int = 12
    local_steps: int = 10
    batch_size: int = 8
    pooling: str = "native"


class MeanPooled(nn.Module):
    """Encoder, mean over the tokens that are not padding, one linear layer."""

    def __init__(self, encoder: nn.Module, labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits, shape (batch, labels)."""
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.classifier((hidden * weight).sum(1) / weight.sum(1))


def build_model(folder: Path, pretrained: bool, pooling: str, seed: int) -> nn.Module:
    """A classifier with LoRA; the encoder's weights from `folder`, or at random with the same config."""
    torch.manual_seed(seed)
    if pooling == "mean":
        encoder = (
            AutoModel.from_pretrained(folder)
            if pretrained
            else AutoModel.from_config(AutoConfig.from_pretrained(folder))
        )
        base: nn.Module = MeanPooled(encoder, labels=2)
    elif pretrained:
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    else:
        base = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder, num_labels=2))
    targets = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and ".layer." in name]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=["classifier"])
    return get_peft_model(base, lora)


def logits_of(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of a batch, cut to its longest sentence."""
    length = int(mask.sum(1).max())
    out = model(input_ids=ids[:, :length], attention_mask=mask[:, :length])
    return out if isinstance(out, torch.Tensor) else out.logits


def federated_accuracy(folder: Path, pretrained: bool, rate: float, seed: int, protocol: Protocol) -> float:
    """Test accuracy after the last round."""
    settings = DataSettings(name="synthetic")
    corpus = synthetic_corpus(settings, seed)
    shares = partition(corpus.train, settings, protocol.clients, seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, test = (
        tokenizer(list(part.texts), padding=True, return_tensors="pt") for part in (corpus.train, corpus.test)
    )
    labels, test_labels = torch.from_numpy(corpus.train.labels), torch.from_numpy(corpus.test.labels)
    model = build_model(folder, pretrained, protocol.pooling, seed)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    state = {name: weight.detach().clone() for name, weight in trained.items()}
    sizes = np.array([len(share) for share in shares], dtype=float)
    for round_index in range(protocol.rounds):
        total = {name: torch.zeros_like(weight) for name, weight in state.items()}
        for client, share in enumerate(shares):
            with torch.no_grad():
                for name, weight in trained.items():
                    weight.copy_(state[name])
            optimizer = torch.optim.AdamW(
                trained.values(), lr=rate * (1 - round_index / protocol.rounds), weight_decay=0.0
            )
            order = np.random.default_rng((seed, round_index, client)).permutation(share)
            stream = itertools.cycle(order)
            for _ in range(protocol.local_steps):
                rows = torch.tensor(list(itertools.islice(stream, protocol.batch_size)))
                logits = logits_of(model, train["input_ids"][rows], train["attention_mask"][rows])
                optimizer.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(logits, labels[rows]).backward()
                optimizer.step()
            for name, weight in trained.items():
                total[name] += weight.detach() * (sizes[client] / sizes.sum())
        state = total
    with torch.no_grad():
        for name, weight in trained.items():
            weight.copy_(state[name])
        guess = logits_of(model, test["input_ids"], test["attention_mask"]).argmax(1)
    return float((guess == test_labels).double().mean())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=asset_folder("tiny"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 5e-3, 1e-2])
    parser.add_argument("--clients", type=int, default=Protocol.clients)
    parser.add_argument("--rounds", type=int, default=Protocol.rounds)
    parser.add_argument("--local-steps", type=int, default=Protocol.local_steps)
    parser.add_argument("--pooling", choices=("native", "mean"), default=Protocol.pooling)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    protocol = Protocol(arguments.clients, arguments.rounds, arguments.local_steps, pooling=arguments.pooling)
    print(protocol)
    for pretrained in (True, False):
        for rate in arguments.rates:
            start = time.perf_counter()
            runs = [federated_accuracy(arguments.model, pretrained, rate, seed, protocol) for seed in arguments.seeds]
            weights = "pretrained" if pretrained else "random"
            listed = " ".join(f"{accuracy:.3f}" for accuracy in runs)
            seconds = time.perf_counter() - start
            print(f"{weights:10}  rate {rate:g}  mean {np.mean(runs):.3f}  ({listed})  {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
