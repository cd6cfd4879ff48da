"""Clients' factors side by side: whose pruned features go where, and by what weight each feature is divided.

For one Linear, ``sum_i w_i scatter(dW_i)`` is a product of concatenated factors. The *pruned* side is the one that
loses features (``B`` of a row-pruned Linear, ``A'`` of a column-pruned one), the *whole* side the other (always of the
hidden width). Clients of one rank are laid out by one gather, with indices shared by all Linears that lose the same
groups: no tensor operation is done client by client.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.learn.model.adapter import Factors
from fedsim.learn.model.linears import HEAD_ROLES, PrunableLinear, group_width
from fedsim.structure import ModelShape, Structure

_BUFFER_ELEMENTS = 1 << 18
"""Least room for concatenated factors: 1 MB, so that small layers are not merged client by client."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Clients of one rank whose factors are laid side by side: component ``i * rank + k`` is client i's k-th.

    Attributes:
        clients: places among the contributions.
        rank: LoRA rank of each.
        weights: shape (clients,), fp32.
        rows: shape (features * clients,): for each feature and client the row of the clients' concatenated pruned
            sides that goes there, or the row behind the last (zeros) where the client lost the feature. None where all
            clients kept all.
    """

    clients: Sequence[int]
    rank: int
    weights: torch.Tensor
    rows: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Coverage:
    """Who keeps which features of the pruned side, for all Linears that lose the same groups.

    Attributes:
        chunks: the clients by rank, in chunks that fit the buffer.
        reciprocal: shape (features, 1), 1 / summed weight of the clients that kept a feature, 0 where none did.
        held: indices that nobody kept; None where there are none.
    """

    chunks: Sequence[Chunk]
    reciprocal: torch.Tensor
    held: torch.Tensor | None


def groups_lost(linear: PrunableLinear, shape: ModelShape) -> tuple[bool, int]:
    """Which groups of its layer a Linear loses (head groups, or else channels), and features per group."""
    return linear.role in HEAD_ROLES, group_width(linear, shape)


def sides(factors: Factors, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``(pruned (features, rank), whole (rank, other))`` of one Linear's ``(A, B)``."""
    a, b = factors
    return (a.T, b.T) if transposed else (b, a)


def concatenate(
    chunk: Chunk, pairs: Sequence[Factors], transposed: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(pruned (features, R), whole (R, other))`` whose product is the weighted sum of the clients' updates.

    Args:
        pairs: each client's factors of one Linear, in the order of ``chunk.clients``.
        transposed: whether the Linear loses columns.
        device: of the result. Where `pairs` lie elsewhere, each side is moved in one transfer.
    Returns:
        R = clients * rank components; the weights are in `whole`.
    """
    lefts = [a.T for a, _ in pairs] if transposed else [b for _, b in pairs]
    whole = torch.cat([b for _, b in pairs], dim=1).T if transposed else torch.cat([a for a, _ in pairs])
    if chunk.rows is None:
        pruned = torch.cat(lefts, dim=1).to(device)
    else:
        filled = torch.cat([*lefts, lefts[0].new_zeros((1, chunk.rank))]).to(device)
        pruned = filled.index_select(0, chunk.rows).view(-1, whole.shape[0])
    return pruned, whole.to(device) * chunk.weights.repeat_interleave(chunk.rank).unsqueeze(1)


def coverage_of(
    linear: PrunableLinear,
    structures: Sequence[Structure],
    ranks: NDArray[np.int64],
    weights: NDArray[np.float64],
    shape: ModelShape,
    device: torch.device,
) -> Coverage:
    """The coverage of one Linear, and of all others of the same `groups_lost`.

    Args:
        structures, ranks, weights: each client's, shape (P,).
    """
    is_head, width = groups_lost(linear, shape)
    masks = [one.head_mask if is_head else one.channel_mask for one in structures]
    kept = np.repeat(np.stack([mask[linear.layer] for mask in masks]), width, axis=1)
    total = np.where(kept, weights[:, None], 0.0).sum(axis=0)
    held = np.flatnonzero(total == 0.0)
    reciprocal = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0.0)
    return Coverage(
        chunks=list(_chunks(kept, ranks, weights, shape.hidden, device)),
        reciprocal=torch.from_numpy(reciprocal.astype(np.float32)).to(device).unsqueeze(1),
        held=torch.from_numpy(held).to(device) if len(held) else None,
    )


def _chunks(
    kept: NDArray[np.bool_], ranks: NDArray[np.int64], weights: NDArray[np.float64], other: int, device: torch.device
) -> Iterator[Chunk]:
    """Clients of equal rank in chunks whose factors fill at most the size of the full matrix (a client at least).

    Args:
        kept: shape (P, features).
        other: width of the whole side (every prunable Linear has the hidden width on that side).
    """
    features = kept.shape[1]
    limit = max(features * other, _BUFFER_ELEMENTS)
    for rank in np.unique(ranks).tolist():
        members = np.flatnonzero(ranks == rank)
        step = max(1, limit // (rank * (features + other)))
        for start in range(0, len(members), step):
            clients = members[start : start + step]
            yield Chunk(
                clients.tolist(),
                rank,
                torch.from_numpy(weights[clients].astype(np.float32)).to(device),
                _rows(kept[clients], device),
            )


def _rows(kept: NDArray[np.bool_], device: torch.device) -> torch.Tensor | None:
    """`Chunk.rows` of the clients whose kept features are the rows of `kept`."""
    if kept.all():
        return None
    ends = np.cumsum(kept, dtype=np.int32).reshape(kept.shape)
    rows = np.where(kept, ends - 1, ends[-1, -1]).T
    return torch.from_numpy(np.ascontiguousarray(rows).ravel()).to(device)
