"""Training steps of this host, timed: what `fedsim calibrate` fits a profile to.

The model is an encoder written out in plain PyTorch, of any kept heads and channels, with LoRA on all its Linears: the
operations that `fedsim.cost.workload` counts, and nothing of this package's engines, whose savings no device has.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fedsim.cost.setting import StepSetting
from fedsim.structure import ModelShape, kept_counts

_LEAST_S, _LEAST_TIMES, _MOST_TIMES = 1.0, 3, 40


class _Linear(nn.Module):
    """A Linear, frozen under LoRA where `rank` is positive."""

    def __init__(self, d_in: int, d_out: int, rank: int, trains: bool) -> None:
        super().__init__()
        self.base = nn.Linear(d_in, d_out)
        self.base.requires_grad_(trains)
        self.down = nn.Linear(d_in, rank, bias=False) if rank else None
        self.up = nn.Linear(rank, d_out, bias=False) if rank else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x)
        if self.down is not None and self.up is not None:
            out = out + 2.0 * self.up(self.down(x))
        return out


class _Layer(nn.Module):
    """Attention over the kept heads, FFN over the kept channels, a norm after each."""

    def __init__(self, shape: ModelShape, heads: int, channels: int, rank: int, trains: bool) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, shape.head_dim
        inner, hidden = heads * shape.head_dim, shape.hidden
        self.query, self.key, self.value = (_Linear(hidden, inner, rank, trains) for _ in range(3))
        self.out = _Linear(inner, hidden, rank, trains)
        self.up, self.down = _Linear(hidden, channels, rank, trains), _Linear(channels, hidden, rank, trains)
        self.first, self.second = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape

        def by_heads(values: torch.Tensor) -> torch.Tensor:
            return values.view(batch, length, self.heads, self.head_dim).transpose(1, 2).contiguous()

        query, key, value = (by_heads(linear(x)) for linear in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / self.head_dim**0.5 + mask
        context = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, -1)
        x = self.first(x + self.out(context))
        normed: torch.Tensor = self.second(x + self.down(functional.gelu(self.up(x))))
        return normed


class HostModel(nn.Module):
    """An encoder with a classifier on its first token."""

    def __init__(self, shape: ModelShape, ratio: float, rank: int, setting: StepSetting) -> None:
        super().__init__()
        heads, channels = (int(count) for count in kept_counts(shape, ratio))
        trains = setting.tuning == "full"
        self.words = nn.Embedding(shape.vocab, shape.hidden)
        self.words.requires_grad_(trains)
        self.norm = nn.LayerNorm(shape.hidden)
        lora = rank if setting.tuning == "lora" else 0
        self.layers = nn.ModuleList(_Layer(shape, heads, channels, lora, trains) for _ in range(shape.layers))
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(trains)
        self.classifier = nn.Linear(shape.hidden, shape.labels)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.words(tokens))
        for layer in self.layers:
            x = layer(x, mask)
        logits: torch.Tensor = self.classifier(x[:, 0])
        return logits


def time_step(shape: ModelShape, ratio: float, rank: int, setting: StepSetting, device: str, threads: int) -> float:
    """Seconds of one step (or of one forward pass in inference) of `HostModel`, the median of some.

    On the CPU with one thread it is processor time, which other processes do not stretch; else wall time.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = HostModel(shape, ratio, rank, setting).to(device)
    tokens = torch.randint(0, shape.vocab, (setting.batch_size, setting.seq_len), device=device)
    labels = torch.randint(0, shape.labels, (setting.batch_size,), device=device)
    mask = torch.zeros(setting.batch_size, 1, 1, setting.seq_len, device=device)
    if setting.tuning == "inference":
        model.eval()

        @torch.no_grad()
        def once() -> None:
            model(tokens, mask)

    else:
        trained = [one for one in model.parameters() if one.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

        def once() -> None:
            optimizer.zero_grad()
            functional.cross_entropy(model(tokens, mask), labels).backward()
            optimizer.step()

    return _median_seconds(once, device, threads)


def _median_seconds(once: Callable[[], Any], device: str, threads: int) -> float:
    wait = torch.cuda.synchronize if device.startswith("cuda") else _nothing
    clock = time.process_time if device == "cpu" and threads == 1 else time.perf_counter
    once()
    wait()
    taken: list[float] = []
    while len(taken) < _MOST_TIMES and (len(taken) < _LEAST_TIMES or sum(taken) < _LEAST_S):
        began = clock()
        once()
        wait()
        taken.append(clock() - began)
    return statistics.median(taken)


def _nothing() -> None:
    return None


def micro_rates(device: str, threads: int) -> tuple[float, float, float]:
    """Operations per second of a large product, bytes per second of an addition, seconds of the smallest operation.

    Start values of a fit and no more: taken as a profile they would be off by some tens of percent.
    """
    torch.set_num_threads(threads)
    a, b = torch.randn(1024, 1024, device=device), torch.randn(1024, 1024, device=device)
    product = _median_seconds(lambda: a @ b, device, threads)
    x, y, out = (torch.randn(1 << 24, device=device) for _ in range(3))
    stream = _median_seconds(lambda: torch.add(x, y, out=out), device, threads)
    small = torch.randn(4, device=device)

    def many() -> None:
        for _ in range(200):
            small + small

    launch = _median_seconds(many, device, threads) / 200
    return 2 * 1024**3 / product, 3 * 4 * (1 << 24) / stream, launch


def device_name(device: str) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


def device_memory_bytes(device: str) -> int | None:
    """Memory of a GPU; None on the CPU."""
    if not device.startswith("cuda"):
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)
