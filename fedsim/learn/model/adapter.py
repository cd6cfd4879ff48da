"""A LoRA adapter with its classification head, as plain tensors: the first one, and a client's view of it.

The update of a Linear is ``dW = c B A`` with ``c = alpha / r`` the same at every rank, so that ranks can be mixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from fedsim.errors import ConfigError
from fedsim.learn.merge.lowrank import truncated_svd_dense
from fedsim.learn.model.backbone import Backbone
from fedsim.learn.model.linears import (
    PrunableLinear,
    Targets,
    kept_columns,
    kept_rows,
    prunable_linears,
    target_linears,
)
from fedsim.learn.model.slicing import take
from fedsim.rng import Stream, generator
from fedsim.structure import ModelShape, Structure

Factors = tuple[torch.Tensor, torch.Tensor]
"""``(A, B)`` of one Linear: ``A (rank, d_in_kept)``, ``B (d_out_kept, rank)``."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """LoRA factors by the Linear's name (see `fedsim.learn.model.linears`) and the trained head by parameter name.

    A *global* adapter has the full widths; a client's has the widths of its structure. Tensors are detached, fp32.

    Attributes:
        merged: what earlier rounds merged into the frozen weights, c included, ``(d_out, d_in)`` at full width by the
            Linear's name; empty where nothing is ever merged (all rules but ``stack``).
    """

    factors: Mapping[str, Factors]
    head: Mapping[str, torch.Tensor]
    merged: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """LoRA rank, the same for every Linear; 0 where the factors hold nothing (all is in `merged`)."""
        first, _ = next(iter(self.factors.values()))
        return int(first.shape[0])


def initial_adapter(backbone: Backbone, targets: Targets, rank: int, seed: int) -> Adapter:
    """The first global adapter: A Kaiming uniform, B zero (LoRA, arXiv 2106.09685), the backbone's initial head.

    Each Linear has its own random stream and A is drawn row by row, so that a higher rank extends a lower one.

    Raises:
        ConfigError: a rank below 1 or above the width of a target.
    """
    linears = target_linears(backbone.shape, targets)
    widest = min(min(linear.d_in, linear.d_out) for linear in linears)
    if not 1 <= rank <= widest:
        raise ConfigError(f"LoRA rank {rank} is not allowed for model '{backbone.shape.name}' (allowed: 1 to {widest})")
    places = {linear.name: place for place, linear in enumerate(prunable_linears(backbone.shape))}
    factors = {}
    for linear in linears:
        a = _kaiming_rows(rank, linear.d_in, seed, places[linear.name]).to(backbone.device)
        factors[linear.name] = (a, torch.zeros(linear.d_out, rank, device=backbone.device))
    return Adapter(factors, {name: tensor.clone() for name, tensor in backbone.initial_head.items()})


def restrict(
    adapter: Adapter, structure: Structure, rank: int, shape: ModelShape, key: tuple[int, int, int] | None
) -> Adapter:
    """A client's view of the global adapter: its first `rank` components, its kept rows and columns.

    Beyond the adapter's rank new rows of A are Kaiming uniform and new columns of B zero: the product is unchanged.

    Args:
        adapter: at full widths.
        rank: >= 1, or 0 where the adapter's is 0.
        key: (seed, client, flight) of the new rows' random stream; needed only where `rank` exceeds the adapter's.
    Raises:
        ValueError: a rank out of range, or a key is needed and missing.
    """
    if rank < min(1, adapter.rank):
        raise ValueError(f"LoRA rank {rank} is below 1")
    factors: dict[str, Factors] = {}
    for linear in prunable_linears(shape):
        if linear.name not in adapter.factors:
            continue
        a, b = adapter.factors[linear.name]
        if rank > a.shape[0]:
            a = torch.cat([a, extra_rows(rank - a.shape[0], shape, linear, key).to(a)], dim=0)
            b = torch.cat([b, b.new_zeros(b.shape[0], rank - b.shape[1])], dim=1)
        rows, columns = kept_rows(linear, structure, shape), kept_columns(linear, structure, shape)
        factors[linear.name] = (take(a[:rank], 1, columns), take(b[:, :rank], 0, rows))
    return Adapter(factors, dict(adapter.head), adapter.merged)


def folded(adapter: Adapter, alpha_over_rank: float) -> Adapter:
    """A global adapter that does alone what `adapter` and its merged updates do; itself where nothing was merged.

    Exact, not truncated: its rank is that of the largest update, the width of a layer at most.
    """
    if not adapter.merged:
        return adapter
    factors: dict[str, Factors] = {}
    for name, (a, b) in adapter.factors.items():
        update = b @ a + adapter.merged[name] / alpha_over_rank
        left, right = truncated_svd_dense(update, min(update.shape))
        factors[name] = right, left
    # Components come in descending order, and those that are not there are zero.
    rank = max(1, *(int(left.any(dim=0).sum()) for _, left in factors.values()))
    filled = {name: (_with_rows(a, rank), _with_rows(b.T, rank).T.contiguous()) for name, (a, b) in factors.items()}
    return Adapter(filled, dict(adapter.head))


def _with_rows(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    """The first `rows` rows, with rows of zeros where there are fewer."""
    missing = max(0, rows - matrix.shape[0])
    return torch.cat([matrix[:rows], matrix.new_zeros(missing, matrix.shape[1])]).contiguous()


def extra_rows(rows: int, shape: ModelShape, linear: PrunableLinear, key: tuple[int, int, int] | None) -> torch.Tensor:
    """Rows of A for a rank above the global adapter's, ``(rows, d_in)``: from the client's own stream in that flight.

    Raises:
        ValueError: there is no key.
    """
    if key is None:
        raise ValueError(f"{rows} rows beyond the adapter's rank are asked for, and there is no key for them")
    seed, client, flight = key
    return _kaiming_rows(rows, linear.d_in, seed, prunable_linears(shape).index(linear), client, flight)


def _kaiming_rows(rows: int, d_in: int, seed: int, *key: int) -> torch.Tensor:
    """Rows of A, uniform in +-1/sqrt(d_in): Kaiming uniform with a = sqrt(5), as in the LoRA authors' code and PEFT."""
    bound = d_in**-0.5
    draws = generator(seed, Stream.LORA_INIT, *key).uniform(-bound, bound, size=(rows, d_in))
    return torch.from_numpy(draws.astype(np.float32))
