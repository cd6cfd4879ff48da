"""What the engines are measured against: PEFT as its manual has it, one client after another, and one big batch.

No probes, no importance, no pruning: only the steps themselves. Nothing of the engines is used but the batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model

from fedsim.learn.model.adapter import Adapter
from fedsim.learn.model.backbone import Backbone
from fedsim.learn.model.linears import Targets, target_linears
from fedsim.learn.train.batches import Batch, batch_stream, make_batch, sample_stream
from fedsim.learn.train.jobs import ClientData

_ADAPTER = "default"


class PlainPeft:
    """One PEFT model of one rank.

    Args:
        backbone: unpruned; LoRA layers are put into it.
        fused: AdamW's fused form instead of its default.
        autocast: products in bf16 by torch.autocast.
    """

    def __init__(self, backbone: Backbone, targets: Targets, adapter: Adapter, alpha_over_rank: float) -> None:
        self._backbone, self._start = backbone, adapter
        self._linears = target_linears(backbone.shape, targets)
        rank = adapter.rank
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha_over_rank * rank,  # type: ignore[arg-type]  # PEFT divides by r
            lora_dropout=0.0,
            target_modules=[linear.name for linear in self._linears],
        )
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(config, backbone.encoder, adapter_name=_ADAPTER)
        backbone.model.to(backbone.device).eval()
        self._factors = {
            linear.name: tuple(
                getattr(backbone.encoder.get_submodule(linear.name), kind)[_ADAPTER].weight
                for kind in ("lora_A", "lora_B")
            )
            for linear in self._linears
        }
        self._head = {name: backbone.model.get_parameter(name) for name in backbone.head_names}
        self._trained = [factor for pair in self._factors.values() for factor in pair] + list(self._head.values())

    def sequential(
        self,
        data: ClientData,
        clients: Sequence[int],
        steps: int,
        batch_size: int,
        seed: int,
        learning_rate: float,
        fused: bool,
        autocast: bool = False,
    ) -> list[Adapter]:
        """Train client after client from the same start; what each of them would send."""
        results = []
        for client in clients:
            self._load()
            stream = batch_stream(data.text, data.parts[client], batch_size, seed, client, 0, self._backbone.device)
            optimizer = self._optimizer(learning_rate, fused)
            for _ in range(steps):
                self._step(next(stream), optimizer, autocast)
            results.append(self._read())
        return results

    def one_big_batch(
        self, data: ClientData, clients: Sequence[int], steps: int, batch_size: int, seed: int, learning_rate: float
    ) -> None:
        """The same samples step by step, all clients' in one batch, through one adapter."""
        self._load()
        streams = [sample_stream(data.parts[client], batch_size, seed, client, 0) for client in clients]
        optimizer = self._optimizer(learning_rate, fused=True)
        for _ in range(steps):
            chosen = np.concatenate([next(stream) for stream in streams])
            self._step(make_batch(data.text, chosen, self._backbone.device), optimizer, autocast=False)

    def _optimizer(self, learning_rate: float, fused: bool) -> torch.optim.Optimizer:
        options = {"fused": True} if fused else {}
        return torch.optim.AdamW(self._trained, lr=learning_rate, weight_decay=0.0, **options)  # type: ignore[arg-type]

    def _step(self, batch: Batch, optimizer: torch.optim.Optimizer, autocast: bool) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._backbone.device.type, dtype=torch.bfloat16, enabled=autocast):
            logits = self._backbone.model(**batch.inputs)
        torch.nn.functional.cross_entropy(logits.float(), batch.labels).backward()
        optimizer.step()

    @torch.no_grad()
    def _load(self) -> None:
        for name, (a, b) in self._factors.items():
            start_a, start_b = self._start.factors[name]
            a.copy_(start_a)
            b.copy_(start_b)
        for name, parameter in self._head.items():
            parameter.copy_(self._start.head[name])

    def _read(self) -> Adapter:
        factors = {name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in self._factors.items()}
        return Adapter(factors, {name: parameter.detach().clone() for name, parameter in self._head.items()})
