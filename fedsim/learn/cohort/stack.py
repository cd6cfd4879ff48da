"""A cohort's weights: frozen ones shared or sliced per client, LoRA factors and heads stacked over clients.

Two forms. *Sliced*: every client's weights have its own widths (padded to the widest of the cohort; shared where all
keep the same). *Masked*: all share the unpruned weights, and a mask hides pruned heads and channels from the two
projections that read them. Both are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedsim.contracts.program import Trained
from fedsim.learn.cohort.axes import Widths
from fedsim.learn.cohort.kernels import Frozen, StackedFactors
from fedsim.learn.model.adapter import Adapter, extra_rows
from fedsim.learn.model.backbone import Backbone
from fedsim.learn.model.linears import COLUMN_PRUNED, HEAD_ROLES, PrunableLinear, group_width, prunable_linears
from fedsim.learn.model.slicing import check_structure, with_merged
from fedsim.structure import Structure


@dataclass(frozen=True, eq=False)
class Base:
    """What every cohort of a run is cut from.

    Attributes:
        targets: the Linears that carry LoRA.
        alpha_over_rank: c of ``dW = c B A``.
        frozen: unpruned weights and biases by Linear, in the type of the large products.
        dtype: of activations, factors and heads.
        sliced: which of the two forms.
    """

    backbone: Backbone
    targets: tuple[PrunableLinear, ...]
    alpha_over_rank: float
    frozen: Mapping[str, Frozen]
    dtype: torch.dtype
    sliced: bool


@dataclass(frozen=True)
class Member:
    """One client of a cohort.

    Attributes:
        adapter: the global adapter that it starts from, full widths; of any version, as each member may have its own.
        rank: LoRA rank, any.
        key: (seed, client, flight) of the random rows beyond the adapter's rank.
    """

    adapter: Adapter
    structure: Structure
    rank: int
    key: tuple[int, int, int] | None


class CohortStack:
    """Weights of one cohort, each member's from the global adapter that it starts from.

    Frozen weights are shared, and so are updates merged into them (`Adapter.merged`): all members have the same ones.

    Attributes:
        structures, widths: what the clients keep now, by client and as axes of the weights.
        factors: by Linear ``A (C, r, i)`` and ``B' (C, r, o)``, r the highest rank; lower ranks end in zeros, whose
            gradients are zero.
        head: ``(C, ...)`` by parameter name.
        watched: where not None, forward passes put in what the column-pruned Linears read ``(C, T, features)``, by
            name, so that it gets a gradient.
    """

    def __init__(self, base: Base, members: Sequence[Member]) -> None:
        """Raises ValueError where an adapter or a structure does not fit the model, or merged updates differ."""
        places = _by_adapter(members)
        for member in members:
            check_structure(base.backbone, member.structure)
        for adapter, _ in places:
            if set(adapter.factors) != {linear.name for linear in base.targets}:
                raise ValueError(f"adapter has factors for {len(adapter.factors)} linears, not for {len(base.targets)}")
        merged = members[0].adapter.merged
        if any(base_key(adapter) != base_key(members[0].adapter) for adapter, _ in places):
            raise ValueError("members of one cohort share their frozen weights, and with them all merged updates")
        self.base = base
        self.watched: dict[str, torch.Tensor] | None = None
        self._full = {
            name: (with_merged(weight, merged.get(name)), bias) for name, (weight, bias) in base.frozen.items()
        }
        self.structures = tuple(member.structure for member in members)
        self.members = tuple(members)
        self.ranks = np.array([member.rank for member in members])
        self.widths = self._widths([member.structure for member in members])
        self.factors = {linear.name: self._first_factors(places, linear) for linear in base.targets}
        self.head = _first_heads(base, members)
        self._refresh()

    @property
    def clients(self) -> int:
        """C."""
        return len(self.members)

    @property
    def trained(self) -> list[torch.Tensor]:
        """All trained tensors: A and B' of each target in block order, then the head."""
        return [tensor for linear in self.base.targets for tensor in self.factors[linear.name]] + list(
            self.head.values()
        )

    def frozen(self, linear: PrunableLinear) -> Frozen:
        """Weight and bias of one Linear at the present widths."""
        return self._frozen[linear.name]

    def mask(self, linear: PrunableLinear) -> torch.Tensor | None:
        """``(C, 1, features)``: 1 where a client keeps an input of this column-pruned Linear; None where all stay."""
        return self._masks.get(linear.name)

    def now(self) -> Trained:
        """What is trained, as objectives read it: zeros where a mask hides the feature."""
        return self._seen(self.factors, self.head)

    def at_start(self) -> Trained:
        """The same as the stack was made, at the present widths."""
        own = _by_adapter(self.members)
        factors = {linear.name: self._first_factors(own, linear) for linear in self.base.targets}
        return self._seen(factors, _first_heads(self.base, self.members))

    def require_grad(self) -> None:
        """Make leaves of the trained tensors."""
        for tensor in self.trained:
            tensor.requires_grad_(True)

    def prune(self, structures: Sequence[Structure], optimizer: torch.optim.Optimizer) -> None:
        """Shrink to `structures`, each within what its client keeps; the optimizer's moments are sliced alike.

        Raises:
            ValueError: a structure brings a group back, or empties a layer.
        """
        for structure in structures:
            check_structure(self.base.backbone, structure)
        old = self.widths
        new = self._widths(structures)
        grown = (new.head_masks & ~old.head_masks).any() or (new.channel_masks & ~old.channel_masks).any()
        if grown:
            raise ValueError("pruning cannot bring a group back; start the job from the grown structure instead")
        self.widths, self.structures = new, tuple(structures)
        if self.base.sliced:
            for linear in self.base.targets:
                a, b = self.factors[linear.name]
                axis = new.features(linear).within(old.features(linear), self.clients)
                if linear.role in COLUMN_PRUNED:
                    a = _moved(a, axis.of_stack, optimizer)
                else:
                    b = _moved(b, axis.of_stack, optimizer)
                self.factors[linear.name] = (a, b)
        self._refresh()

    def read(self) -> list[Adapter]:
        """Every client's factors at its own widths and rank, and its head: detached copies."""
        clients: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = [{} for _ in self.members]
        for linear in self.base.targets:
            a, b = (factor.detach() for factor in self.factors[linear.name])
            is_columns = linear.role in COLUMN_PRUNED
            masks = self._group_masks(linear)
            counts = masks.sum(axis=1) * group_width(linear, self.base.backbone.shape)
            # Where a mask hides features: the kept ones of all clients, sent to the device at once.
            hidden = None if self.base.sliced or masks.all() else self._places(linear)
            for client, own in enumerate(clients):
                rank, own_a, own_b = int(self.ranks[client]), a[client], b[client]
                kept = slice(int(counts[client])) if hidden is None else hidden[client]
                if is_columns:
                    own_a = own_a[:, kept]
                else:
                    own_b = own_b[:, kept]
                own[linear.name] = _copied(own_a[:rank]), _copied(own_b[:rank].T)
        heads = {name: tensor.detach() for name, tensor in self.head.items()}
        return [
            Adapter(own, {name: tensor[client].clone() for name, tensor in heads.items()})
            for client, own in enumerate(clients)
        ]

    # ----------------------------------------------------------------------------------------------------------------

    def _group_masks(self, linear: PrunableLinear) -> np.ndarray:
        masks = self.widths.head_masks if linear.role in HEAD_ROLES else self.widths.channel_masks
        layer: np.ndarray = masks[:, linear.layer]
        return layer

    def _feature_masks(self, linear: PrunableLinear) -> np.ndarray:
        return np.repeat(self._group_masks(linear), group_width(linear, self.base.backbone.shape), axis=1)

    def _places(self, linear: PrunableLinear) -> tuple[torch.Tensor, ...]:
        """Per client the features that it keeps of a Linear."""
        features = self._feature_masks(linear)
        _, places = np.nonzero(features)
        return torch.from_numpy(places).to(self.base.backbone.device).split(features.sum(axis=1).tolist())

    def _widths(self, structures: Sequence[Structure]) -> Widths:
        return Widths.of(self.base.backbone.shape, structures, self.base.sliced, self.base.backbone.device)

    def _seen(self, factors: Mapping[str, StackedFactors], head: Mapping[str, torch.Tensor]) -> Trained:
        """With zeros where a mask hides a feature of the factors."""
        seen = dict(factors)
        for linear in self.base.targets:
            if not (self.base.sliced or self._group_masks(linear).all()):
                a, b = factors[linear.name]
                kept = torch.from_numpy(self._feature_masks(linear)).to(a).unsqueeze(1)
                seen[linear.name] = (a * kept, b) if linear.role in COLUMN_PRUNED else (a, b * kept)
        return Trained(seen, head)

    def _first_factors(self, places: Sequence[tuple[Adapter, list[int]]], linear: PrunableLinear) -> StackedFactors:
        base, highest = self.base, int(self.ranks.max())
        (first_a, first_b), stacks = places[0][0].factors[linear.name], []
        for factor in (first_a.T, first_b):
            stacks.append(torch.zeros(self.clients, highest, len(factor), dtype=base.dtype, device=factor.device))
        stack_a, stack_b = stacks
        for adapter, clients in places:
            a, b = (factor.to(base.dtype) for factor in adapter.factors[linear.name])
            known = min(highest, a.shape[0])
            # All members of one version, the common case, are written through a view.
            here = slice(None) if len(clients) == self.clients else clients
            stack_a[here, :known] = a[:known]
            stack_b[here, :known] = b[:, :known].T
            for client in clients:
                member = self.members[client]
                if member.rank > a.shape[0]:
                    rows = extra_rows(member.rank - a.shape[0], base.backbone.shape, linear, member.key)
                    stack_a[client, a.shape[0] : member.rank] = rows.to(a)
        # A mask over ranks: rows beyond a client's own are zero.
        own = torch.from_numpy(np.arange(highest) < self.ranks[:, None]).to(stack_a).unsqueeze(-1)
        stack_a *= own
        stack_b *= own
        axis = self.widths.features(linear)
        if linear.role in COLUMN_PRUNED:
            stack_a = axis.of_stack(stack_a)
        else:
            stack_b = axis.of_stack(stack_b)
        return stack_a, stack_b

    def _refresh(self) -> None:
        """Frozen weights, or masks, for the present widths."""
        self._frozen: dict[str, Frozen] = {}
        self._masks: dict[str, torch.Tensor] = {}
        for linear in prunable_linears(self.base.backbone.shape):
            weight, bias = self._full[linear.name]
            axis = self.widths.features(linear)
            if linear.role in COLUMN_PRUNED:
                self._frozen[linear.name] = axis.of_shared(weight, 1), bias
            else:
                self._frozen[linear.name] = (
                    axis.of_shared(weight, 0),
                    None if bias is None else axis.of_shared(bias, 0),
                )
            if not self.base.sliced and linear.role in COLUMN_PRUNED:
                masks = self._group_masks(linear)
                if not masks.all():
                    kept = torch.from_numpy(self._feature_masks(linear)).to(self.base.backbone.device, self.base.dtype)
                    self._masks[linear.name] = kept.unsqueeze(1)


def base_key(adapter: Adapter) -> int:
    """Equal for adapters whose merged updates are the same object, or that have none: they share frozen weights."""
    return id(adapter.merged) if adapter.merged else 0


def _first_heads(base: Base, members: Sequence[Member]) -> dict[str, torch.Tensor]:
    return {
        name: torch.stack([member.adapter.head[name].to(base.dtype) for member in members])
        for name in base.backbone.head_names
    }


def _by_adapter(members: Sequence[Member]) -> list[tuple[Adapter, list[int]]]:
    """The members' adapters, each once, with the places of those that start from it."""
    places: dict[int, tuple[Adapter, list[int]]] = {}
    for place, member in enumerate(members):
        places.setdefault(id(member.adapter), (member.adapter, []))[1].append(place)
    return list(places.values())


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _moved(
    tensor: torch.Tensor, keep: Callable[[torch.Tensor], torch.Tensor], optimizer: torch.optim.Optimizer
) -> torch.Tensor:
    """A trained tensor with part of its places, and with the same part of its moments."""
    new = keep(tensor.detach())
    if new.shape == tensor.shape and new.data_ptr() == tensor.data_ptr():
        return tensor
    new.requires_grad_(True)
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is tensor else parameter for parameter in group["params"]]
    state = optimizer.state.pop(tensor, None)
    if state is not None:
        optimizer.state[new] = {
            key: keep(value) if isinstance(value, torch.Tensor) and value.shape == tensor.shape else value
            for key, value in state.items()
        }
    return new
