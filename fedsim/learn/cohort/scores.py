"""Group importance of a whole cohort: what `fedsim.learn.train.importance` says of one client, for all at once.

The saliency of a weight exists for a few clients at a time only (``_BLOCK_ELEMENTS`` weights), and one transfer per
estimate brings the scores of all clients to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedsim.contracts.common import FloatArray
from fedsim.errors import ConfigError
from fedsim.learn.cohort.axes import Widths
from fedsim.learn.cohort.stack import CohortStack
from fedsim.learn.model.linears import COLUMN_PRUNED, HEAD_ROLES, PrunableLinear, group_width, prunable_linears
from fedsim.learn.train.importance import DECAY, Criterion, GroupScores
from fedsim.learn.train.salience import salience

_BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 27}
"""Saliency is formed for at most about this many weights at a time: what a processor's cache, or a card, holds."""


@dataclass(frozen=True, eq=False)
class CohortScores:
    """Averaged scores of all clients: ``heads (C, layers, head_groups)``, ``channels (C, layers, ffn)``, float64."""

    heads: FloatArray
    channels: FloatArray

    @classmethod
    def of(cls, scores: Sequence[GroupScores | None], widths: Widths) -> CohortScores:
        """The clients' averages so far; zeros where there is none."""
        shape = widths.shape
        heads = np.zeros((len(scores), shape.layers, shape.head_groups))
        channels = np.zeros((len(scores), shape.layers, shape.ffn))
        for client, own in enumerate(scores):
            if own is not None:
                heads[client], channels[client] = own.heads, own.channels
        return cls(heads, channels)

    def client(self, client: int) -> GroupScores:
        """One client's."""
        return GroupScores(self.heads[client].copy(), self.channels[client].copy())

    def smoothed(self, new: CohortScores, steps: int) -> CohortScores:
        """As `fedsim.learn.train.importance.smooth`, for every client by itself."""
        keep = DECAY**steps
        infinite = np.isinf(new.heads).any(axis=(1, 2)) | np.isinf(new.channels).any(axis=(1, 2))
        usable = np.logical_not(infinite).reshape(-1, 1, 1)

        def blend(old: FloatArray, estimate: FloatArray) -> FloatArray:
            known = usable & ~np.isnan(estimate)
            return np.where(known, keep * old + (1.0 - keep) * np.where(known, estimate, 0.0), old)

        return CohortScores(blend(self.heads, new.heads), blend(self.channels, new.channels))


Estimate = Callable[[CohortStack], CohortScores]


def find_estimate(criterion: Criterion | None) -> Estimate | None:
    """The cohort's form of a criterion; None where it needs no gradients.

    Raises:
        ConfigError: the criterion has the reference form only.
    """
    if criterion is None or criterion.estimate is None:
        return None
    if criterion.cohort is None:
        raise ConfigError(
            "prune.criterion: this criterion has no form for cohorts (set train.engine to 'reference', or register it "
            "with cohort=...)"
        )
    return criterion.cohort


@torch.no_grad()
def lora_guided_cohort(stack: CohortStack) -> CohortScores:
    """LoRA-guided scores from the gradients of the last backward pass (see `fedsim.learn.train.importance`).

    NaN where a group is pruned, and everywhere for a client with a score that is not finite.

    Raises:
        ConfigError: LoRA does not sit on every prunable Linear.
    """
    base = stack.base
    if len(base.targets) < len(base.backbone.linears):
        raise ConfigError(
            "prune.criterion 'lora_guided' estimates importance from the LoRA of every prunable linear layer "
            "(model.lora_targets must be 'all')"
        )
    return _collect(stack, base.targets, lambda linear: _group_sums(stack, linear))


@torch.no_grad()
def activation_gradient_cohort(stack: CohortStack) -> CohortScores:
    """Activation-gradient scores from the last forward pass, watched, and its backward pass; NaN as above.

    Raises:
        ValueError: the pass was not watched, or there was no backward pass.
    """
    shape, watched = stack.base.backbone.shape, stack.watched or {}

    def sums(linear: PrunableLinear) -> torch.Tensor:
        x = watched.get(linear.name)
        if x is None or x.grad is None:
            raise ValueError(f"{linear.name}: no watched input with a gradient; importance is estimated after both")
        features = salience(x, x.grad).view(stack.clients, -1, group_width(linear, shape))
        return stack.widths.groups(linear).spread(features.sum(dim=2))

    return _collect(stack, [one for one in prunable_linears(shape) if one.role in COLUMN_PRUNED], sums)


def _collect(
    stack: CohortStack, linears: Sequence[PrunableLinear], sums: Callable[[PrunableLinear], torch.Tensor]
) -> CohortScores:
    """Group sums ``(C, groups)`` of each Linear, normalised by client and Linear, members added; NaN as above."""
    widths, shape, device = stack.widths, stack.base.backbone.shape, stack.base.backbone.device
    masks = torch.from_numpy(np.concatenate([widths.head_masks, widths.channel_masks], axis=2)).to(device)
    totals = torch.zeros(masks.shape, dtype=torch.float64, device=device)
    for linear in linears:
        columns = slice(shape.head_groups) if linear.role in HEAD_ROLES else slice(shape.head_groups, None)
        # What a mask hides must not enter the norm either.
        groups = sums(linear) * masks[:, linear.layer, columns]
        norm = torch.linalg.vector_norm(groups, dim=1, keepdim=True)
        totals[:, linear.layer, columns] += groups / torch.where(norm > 0.0, norm, torch.ones_like(norm))
    finite = totals.isfinite().all(dim=2).all(dim=1)
    known = torch.where(masks & finite[:, None, None], totals, torch.nan).cpu().numpy()
    return CohortScores(known[:, :, : shape.head_groups], known[:, :, shape.head_groups :])


def _group_sums(stack: CohortStack, linear: PrunableLinear) -> torch.Tensor:
    """Sum of the saliency over each group of one Linear, ``(C, groups)`` in float64, zero where a client lacks it."""
    a, b = stack.factors[linear.name]
    if a.grad is None or b.grad is None:
        raise ValueError(f"{linear.name}: no gradient; importance is estimated after a backward pass")
    weight, _ = stack.frozen(linear)
    # G = gB (A - gA) + B gA in one product of inner size 2r.
    left, right = torch.cat([b.grad, b], dim=1), torch.cat([a - a.grad, a.grad], dim=1)
    summed_axis = 1 if linear.role in COLUMN_PRUNED else 2
    per_client = a.shape[2] * b.shape[2]
    block = max(1, _BLOCK_ELEMENTS.get(a.device.type, 1 << 18) // per_client)
    sums = []
    for start in range(0, stack.clients, block):
        some = slice(start, start + block)
        own = weight[some] if weight.dim() == 3 else weight
        saliency = torch.bmm(left[some].transpose(1, 2), right[some])
        merged = torch.baddbmm(
            own.to(a.dtype).expand(saliency.shape), b[some].transpose(1, 2), a[some], alpha=stack.base.alpha_over_rank
        )
        sums.append(saliency.mul_(merged).abs_().sum(dim=summed_axis))
    features = torch.cat(sums).double()
    width = group_width(linear, stack.base.backbone.shape)
    return stack.widths.groups(linear).spread(features.view(stack.clients, -1, width).sum(dim=2))


@torch.no_grad()
def lora_importance_cohort(stack: CohortStack) -> torch.Tensor:
    """Every client's mean of |B * grad B| over its own entries of all B, ``(C,)`` in float64: FedSpine's I."""
    total = torch.zeros(stack.clients, dtype=torch.float64, device=stack.base.backbone.device)
    counts = np.zeros(stack.clients)
    shape, widths = stack.base.backbone.shape, stack.widths
    for linear in stack.base.targets:
        _, b = stack.factors[linear.name]
        if b.grad is None:
            raise ValueError(f"{linear.name}: no gradient; importance is read after a backward pass")
        total += (b * b.grad).abs().sum(dim=(1, 2), dtype=torch.float64)
        rows = np.full(stack.clients, linear.d_out)
        if linear.role not in COLUMN_PRUNED:
            masks = widths.head_masks if linear.role in HEAD_ROLES else widths.channel_masks
            rows = masks[:, linear.layer].sum(axis=1) * group_width(linear, shape)
        counts += rows * stack.ranks
    return total / torch.from_numpy(counts).to(total.device)
