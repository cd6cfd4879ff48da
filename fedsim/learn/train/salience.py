"""Activations that keep their gradient, and the activation-gradient score of their features (see `importance`)."""

from __future__ import annotations

import torch


def watchable(x: torch.Tensor) -> torch.Tensor:
    """`x`, made to keep its gradient; a leaf in its place where nothing trained leads to it."""
    x = x if x.requires_grad else x.detach().requires_grad_(True)
    x.retain_grad()
    return x


def salience(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Sum of |x| times sum of |grad| over the tokens with a gradient: ``(C, T, features)`` to ``(C, features)``.

    In float64.
    """
    read = (grad != 0.0).any(dim=2, keepdim=True)
    activation = (x.abs() * read).sum(dim=1, dtype=torch.float64)
    return activation * grad.abs().sum(dim=1, dtype=torch.float64)
