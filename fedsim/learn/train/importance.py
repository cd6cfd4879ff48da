"""How much each head group and each FFN channel matters.

LoRA-guided (LoRAPrune, arXiv 2305.18403): with ``W`` frozen, ``c = alpha / r`` and gradients gA, gB of the factors,
``G = gB A + B gA - gB gA`` stands in for the gradient of the merged weight (it is what a unit gradient step takes off
the product ``B A``), and ``S = |G * (W + c B A)|`` elementwise is the saliency. A group's score: sum of S over its
rows or columns of each member module, each module's vector of sums divided by its L2 norm, members added.

Activation-gradient (the salience of blocks in APT, arXiv 2401.12200): for the Linears that read heads and channels
(attention output, second of the feed-forward), a feature's score is the sum of |input| over the batch's tokens times
the sum of |gradient of that input|; a group's is the sum over its features. It needs no LoRA on these Linears. Left
out: APT's kurtosis term.

Our choices where sources are silent: the averages start at zero; a pruned group keeps its last average; a Linear's
norm is taken over the groups that it has at the moment; of the tokens those count which the loss reads through that
input (their gradient is not zero), so that padding does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.contracts.common import FloatArray
from fedsim.errors import ConfigError
from fedsim.learn.entries import CRITERIA
from fedsim.learn.model.backbone import Backbone
from fedsim.learn.model.linears import COLUMN_PRUNED, HEAD_ROLES, PrunableLinear, group_width, prunable_linears
from fedsim.learn.train.salience import salience
from fedsim.registry import loaded
from fedsim.rng import Stream, generator
from fedsim.structure import ModelShape

if TYPE_CHECKING:
    from fedsim.learn.model.lora import LoraModel

__all__ = [
    "CRITERIA",
    "DECAY",
    "Criterion",
    "GroupScores",
    "activation_gradient",
    "find_criterion",
    "lora_guided",
    "lora_importance",
    "magnitude",
    "random_scores",
    "smooth",
]

DECAY = 0.9
"""Weight of the old average, per local iteration."""

_CHUNK_ELEMENTS = 1 << 20
"""Saliency is formed for at most about this many weights at a time."""


@dataclass(frozen=True, eq=False)
class GroupScores:
    """A score for every group at full width: ``heads (layers, head_groups)``, ``channels (layers, ffn)``, float64.

    In a fresh estimate NaN marks a group that was not measured, because it is pruned.
    """

    heads: FloatArray
    channels: FloatArray

    @classmethod
    def zeros(cls, shape: ModelShape) -> GroupScores:
        """All groups equal."""
        return cls(np.zeros((shape.layers, shape.head_groups)), np.zeros((shape.layers, shape.ffn)))


def smooth(old: GroupScores | None, new: GroupScores, steps: int = 1) -> GroupScores:
    """Moving average ``0.9^steps old + (1 - 0.9^steps) new`` of an estimate that stands for `steps` iterations.

    Groups that `new` did not measure (NaN) keep their average. An estimate with an infinite score is skipped whole.

    Args:
        old: the average so far; None starts from zero.
        steps: >= 1.
    """
    if old is None:
        old = GroupScores(np.zeros_like(new.heads), np.zeros_like(new.channels))
    if np.isinf(new.heads).any() or np.isinf(new.channels).any():
        return old
    keep = DECAY**steps
    return GroupScores(_blend(old.heads, new.heads, keep), _blend(old.channels, new.channels, keep))


def _blend(old: FloatArray, new: FloatArray, keep: float) -> FloatArray:
    return np.where(np.isnan(new), old, keep * old + (1.0 - keep) * new)


@torch.no_grad()
def lora_guided(model: LoraModel) -> GroupScores:
    """LoRA-guided scores from the gradients of the last backward pass; NaN where a group is pruned.

    If any score is not finite the whole estimate is NaN, so that `smooth` skips it.

    Raises:
        ConfigError: LoRA does not sit on every prunable Linear.
        ValueError: a factor has no gradient.
    """
    if len(model.targets) < len(model.backbone.linears):
        raise ConfigError(
            "prune.criterion 'lora_guided' estimates importance from the LoRA of every prunable linear layer "
            "(model.lora_targets must be 'all')"
        )
    sums = []
    for linear in model.targets:
        a, b = model.factors(linear.name)
        if a.grad is None or b.grad is None:
            raise ValueError(f"{linear.name}: no gradient; importance is estimated after a backward pass")
        weight = model.backbone.linears[linear.name].weight
        sums.append(_saliency(weight, a, b, a.grad, b.grad, model.alpha_over_rank, _axis(linear)))
    return _collect(model.backbone.shape, model.targets, sums, model.structure.head_mask, model.structure.channel_mask)


def _axis(linear: PrunableLinear) -> int:
    """The axis of the weight along which its groups lie."""
    return 1 if linear.role in COLUMN_PRUNED else 0


def _saliency(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    grad_a: torch.Tensor,
    grad_b: torch.Tensor,
    scale: float,
    axis: int,
) -> torch.Tensor:
    """Sums of S over everything but `axis`: per row (0) or per column (1), in blocks of rows."""
    # G = gB (A - gA) + B gA in one product of inner size 2r.
    left, right = torch.cat([grad_b, b], dim=1), torch.cat([a - grad_a, grad_a], dim=0)
    d_out, d_in = weight.shape
    step = max(1, _CHUNK_ELEMENTS // d_in)
    sums = weight.new_zeros(d_in if axis == 1 else d_out)
    for start in range(0, d_out, step):
        rows = slice(start, start + step)
        saliency = left[rows] @ right
        saliency.mul_(torch.addmm(weight[rows], b[rows], a, alpha=scale)).abs_()
        if axis == 1:
            sums += saliency.sum(dim=0)
        else:
            sums[rows] = saliency.sum(dim=1)
    return sums


def _collect(
    shape: ModelShape,
    linears: tuple[PrunableLinear, ...],
    feature_sums: list[torch.Tensor],
    head_mask: NDArray[np.bool_],
    channel_mask: NDArray[np.bool_],
) -> GroupScores:
    """Feature sums of each Linear to groups: summed, normalised per module, members added, spread to full width."""
    vectors = []
    for linear, sums in zip(linears, feature_sums, strict=True):
        groups = sums.double().view(-1, group_width(linear, shape)).sum(dim=1)
        norm = torch.linalg.vector_norm(groups)
        vectors.append(groups / torch.where(norm > 0.0, norm, torch.ones_like(norm)))
    # One transfer from the device for all of them.
    flat = torch.cat(vectors).cpu().numpy()
    if not np.isfinite(flat).all():
        return GroupScores(np.full(head_mask.shape, np.nan), np.full(channel_mask.shape, np.nan))
    heads, channels = np.where(head_mask, 0.0, np.nan), np.where(channel_mask, 0.0, np.nan)
    ends = np.cumsum([len(vector) for vector in vectors])
    for linear, vector in zip(linears, np.split(flat, ends[:-1]), strict=True):
        is_head = linear.role in HEAD_ROLES
        scores, mask = (heads, head_mask) if is_head else (channels, channel_mask)
        scores[linear.layer, mask[linear.layer]] += vector
    return GroupScores(heads, channels)


@torch.no_grad()
def activation_gradient(model: LoraModel) -> GroupScores:
    """Activation-gradient scores from the last forward and backward pass, which ran under `LoraModel.watching`.

    NaN where a group is pruned, and everywhere if any score is not finite.

    Raises:
        ValueError: the pass was not watched, or there was no backward pass.
    """
    linears = tuple(one for one in prunable_linears(model.backbone.shape) if one.role in COLUMN_PRUNED)
    sums = []
    for linear in linears:
        x = model.watched.get(linear.name)
        if x is None or x.grad is None:
            raise ValueError(f"{linear.name}: no watched input with a gradient; importance is estimated after both")
        sums.append(salience(x.flatten(0, -2).unsqueeze(0), x.grad.flatten(0, -2).unsqueeze(0))[0])
    return _collect(model.backbone.shape, linears, sums, model.structure.head_mask, model.structure.channel_mask)


@torch.no_grad()
def magnitude(backbone: Backbone) -> GroupScores:
    """Scores from the frozen weights alone: |W| in the place of S. The same for every client and round."""
    linears = prunable_linears(backbone.shape)
    sums = [backbone.full_weights[linear.name][0].abs().sum(dim=1 - _axis(linear)) for linear in linears]
    shape = backbone.shape
    everything = np.ones((shape.layers, shape.head_groups), dtype=bool), np.ones((shape.layers, shape.ffn), dtype=bool)
    return _collect(shape, linears, sums, *everything)


def random_scores(shape: ModelShape, seed: int, client: int) -> GroupScores:
    """Uniform scores in [0, 1), fixed for each client: the null criterion."""
    draws = generator(seed, Stream.RANDOM_IMPORTANCE, client)
    return GroupScores(draws.random((shape.layers, shape.head_groups)), draws.random((shape.layers, shape.ffn)))


def magnitude_of(backbone: Backbone, seed: int, client: int) -> GroupScores:
    """`magnitude`, as a criterion is called."""
    return magnitude(backbone)


def random_of(backbone: Backbone, seed: int, client: int) -> GroupScores:
    """`random_scores`, as a criterion is called."""
    return random_scores(backbone.shape, seed, client)


@torch.no_grad()
def lora_importance(model: LoraModel) -> float:
    """Mean of |B * grad B| over all entries of all B, from the last backward pass: FedSpine's I (our reading).

    Raises:
        ValueError: a factor has no gradient.
    """
    total, count = [], 0
    for linear in model.targets:
        _, b = model.factors(linear.name)
        if b.grad is None:
            raise ValueError(f"{linear.name}: no gradient; importance is read after a backward pass")
        total.append((b * b.grad).abs().sum(dtype=torch.float64))
        count += b.numel()
    return float(torch.stack(total).sum()) / count


@dataclass(frozen=True)
class Criterion:
    """How groups are scored; exactly one of the first two is given.

    Attributes:
        estimate: from the model right after a backward pass; averaged over local iterations by `smooth`. NaN marks
            groups that were not measured.
        static: from (backbone, seed, client), once; no gradients, no average.
        cohort: `estimate` for clients that are trained together, from a `fedsim.learn.cohort.stack.CohortStack` to
            `fedsim.learn.cohort.scores.CohortScores`; None where there is the reference form only.
        watches: whether `estimate` reads inputs of Linears and their gradients, which are then kept for it.
        same_for_all: whether `static` ignores seed and client, so that one result serves the fleet.
    """

    estimate: Callable[[LoraModel], GroupScores] | None = None
    static: Callable[[Backbone, int, int], GroupScores] | None = None
    cohort: Callable[[Any], Any] | None = None
    watches: bool = False
    same_for_all: bool = False


def find_criterion(name: str) -> Criterion:
    """The criterion called `name`, with its functions.

    Raises:
        ConfigError: there is none.
    """
    entry = CRITERIA.named(name)
    return Criterion(
        estimate=loaded(entry.estimate),
        static=loaded(entry.static),
        cohort=loaded(entry.cohort),
        watches=entry.watches,
        same_for_all=entry.same_for_all,
    )
