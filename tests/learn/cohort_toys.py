"""Both engines over one tiny backbone: jobs, trainers and comparisons, for tests of the cohort engine.

The backbone is shared: the reference engine slices its Linears in place, and the cohort engine reads only the unpruned
weights, embeddings and norms, which nobody changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from tiny_checkpoints import VOCAB

from fedsim.contracts.learning import LocalRequest
from fedsim.contracts.program import LocalProgram, Objective, Phase
from fedsim.learn.cohort.forward import CohortModel
from fedsim.learn.cohort.plan import ChunkPlan
from fedsim.learn.cohort.stack import Base, CohortStack, Member
from fedsim.learn.cohort.trainer import CohortTrainer
from fedsim.learn.model.adapter import Adapter, initial_adapter
from fedsim.learn.model.backbone import Backbone, load_backbone
from fedsim.learn.model.linears import Targets, target_linears
from fedsim.learn.model.lora import LoraModel
from fedsim.learn.train.batches import EncodedText
from fedsim.learn.train.importance import GroupScores, find_criterion
from fedsim.learn.train.jobs import ClientData, Job, TrainRule, Update
from fedsim.learn.train.reference import ReferenceTrainer
from fedsim.settings import ModelSettings
from fedsim.structure import Structure

LABELS = 3
ALPHA_OVER_RANK = 2.0
BATCH = 5
SAMPLES = (1, 3, 26, 30, 40, 60)
"""Samples per client: one alone, fewer than a batch, and more."""
CLIENTS = len(SAMPLES)


def toy_text(samples: int, seed: int = 0, longest: int = 11) -> EncodedText:
    """Random sentences of 2 to `longest` tokens; any token may occur, padding tokens inside sentences too."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(2, longest + 1, samples)
    real = np.arange(longest) < lengths[:, None]
    ids = np.where(real, draw.integers(0, VOCAB, real.shape), 1).astype(np.int32)
    types = np.where(real, draw.integers(0, 2, real.shape), 0).astype(np.int32)
    return EncodedText(ids, lengths, draw.integers(0, LABELS, samples), types)


def toy_data() -> ClientData:
    """Uneven clients, `SAMPLES`."""
    order = np.random.default_rng(1).permutation(sum(SAMPLES))
    return ClientData(toy_text(sum(SAMPLES)), tuple(np.split(order, np.cumsum(SAMPLES)[:-1])))


def rule(criterion: str | None = "lora_guided", importance_every: int = 1, selection: str = "layer_local") -> TrainRule:
    """What all jobs share."""
    return TrainRule(5, BATCH, None if criterion is None else find_criterion(criterion), importance_every, selection)


@dataclass(frozen=True, eq=False)
class Toy:
    """One backbone in one precision, with text for `CLIENTS` clients."""

    backbone: Backbone
    pooling: str
    targets: Targets
    dtype: torch.dtype
    data: ClientData

    @cached_property
    def lora_model(self) -> LoraModel:
        """The PEFT model; once per backbone."""
        return LoraModel(self.backbone, self.targets, ALPHA_OVER_RANK)

    @cached_property
    def model(self) -> CohortModel:
        """The cohort's forward pass."""
        return CohortModel(self.backbone, self.pooling)

    def base(self, sliced: bool, products: torch.dtype | None = None) -> Base:
        """Frozen weights, in the type `products`."""
        frozen = {
            name: (weight.detach().to(products or self.dtype), None if bias is None else bias.detach())
            for name, (weight, bias) in self.backbone.full_weights.items()
        }
        targets = target_linears(self.backbone.shape, self.targets)
        return Base(self.backbone, targets, ALPHA_OVER_RANK, frozen, self.dtype, sliced)

    def reference(self, train_rule: TrainRule) -> ReferenceTrainer:
        """The oracle."""
        return ReferenceTrainer(self.lora_model, self.data, train_rule)

    def cohort(self, train_rule: TrainRule, sliced: bool, chunk: int = 16) -> CohortTrainer:
        """The engine under test."""
        return CohortTrainer(self.model, self.base(sliced), self.data, train_rule, ChunkPlan(chunk))

    def adapter(self, rank: int = 4, seed: int = 1) -> Adapter:
        """A global adapter in the middle of a run: B is not zero."""
        first = initial_adapter(self.backbone, self.targets, rank, seed)
        draws = torch.Generator().manual_seed(seed)
        factors = {
            name: (a.to(self.dtype), 0.1 * torch.randn(b.shape, generator=draws).to(self.dtype))
            for name, (a, b) in first.factors.items()
        }
        return Adapter(factors, {name: tensor.to(self.dtype) for name, tensor in first.head.items()})

    def stack(self, sliced: bool, structures: Sequence[Structure], ranks: Sequence[int], rank: int = 4) -> CohortStack:
        """Weights of a cohort, one client per structure and rank, ready to train."""
        adapter = self.adapter(rank)
        members = [
            Member(adapter, structure, own, (5, client, 0))
            for client, (structure, own) in enumerate(zip(structures, ranks, strict=True))
        ]
        stack = CohortStack(self.base(sliced), members)
        stack.require_grad()
        return stack

    def structure(self, seed: int, uneven: bool = True) -> Structure:
        """A random structure: other groups, and other counts where `uneven`, for every seed and layer."""
        draw, full = np.random.default_rng(seed), Structure.full(self.backbone.shape)
        for mask in (full.head_mask, full.channel_mask):
            for row in mask:
                gone = int(draw.integers(0, len(row))) if uneven else len(row) // 2
                row[draw.choice(len(row), gone, replace=False)] = False
        return full


@lru_cache(maxsize=16)
def toy(folder: str, pooling: str = "native", dtype: torch.dtype = torch.float64, targets: Targets = "all") -> Toy:
    """The toy of one checkpoint folder (targets as a tuple)."""
    settings = ModelSettings(name=folder, pooling=pooling)  # type: ignore[arg-type]
    backbone = load_backbone(settings, LABELS, seed=3, device=torch.device("cpu"))
    backbone.model.to(dtype)
    return Toy(backbone, pooling, targets, dtype, toy_data())


def local_program(
    steps: int = 3, recovery: int = 1, rate: float = 1e-2, cuts: bool = False, objective: Objective | None = None
) -> LocalProgram:
    """Steps that estimate importance, perhaps a cut, and recovery."""
    first = Phase(steps - recovery, rate, estimate=True)
    return LocalProgram((first, Phase(recovery, rate, estimate=True, cut_before=cuts)), objective)


def job(
    adapter: Adapter,
    start: Structure,
    client: int,
    ratio: float = 0.0,
    rank: int = 4,
    scores: GroupScores | None = None,
    guide: GroupScores | None = None,
    mask: Structure | None = None,
    flight: int = 0,
    prune: bool | None = None,
    steps: int = 3,
    recovery: int = 1,
    rate: float = 1e-2,
) -> Job:
    """One local job; prunes where it has a ratio, unless told."""
    will_prune = ratio > 0.0 if prune is None else prune
    request = LocalRequest(client, flight, flight, ratio, rank, local_program(steps, recovery, rate, will_prune))
    return Job(request, adapter, start, scores, guide, mask)


def assert_same_updates(mine: Sequence[Update], theirs: Sequence[Update], relative: float, absolute: float) -> None:
    """All that clients send is equal to rounding, and structures, counts and outcomes exactly."""
    for place, (one, other) in enumerate(zip(mine, theirs, strict=True)):

        def close(a: object, b: object, what: str, place: int = place) -> None:
            torch.testing.assert_close(
                torch.as_tensor(a),
                torch.as_tensor(b),
                rtol=relative,
                atol=absolute,
                equal_nan=True,
                check_dtype=False,
                msg=lambda text: f"client at {place}, {what}: {text}",
            )

        assert one.outcome == other.outcome
        assert one.samples == other.samples
        assert one.structure.same_as(other.structure), f"client at {place}: another structure"
        for name in ("loss_before", "loss_after", "lora_importance"):
            close(getattr(one, name), getattr(other, name), name)
        assert one.adapter.factors.keys() == other.adapter.factors.keys()
        for name, pair in one.adapter.factors.items():
            close(pair[0], other.adapter.factors[name][0], f"A of {name}")
            close(pair[1], other.adapter.factors[name][1], f"B of {name}")
        assert list(one.adapter.head) == list(other.adapter.head)
        for name, tensor in one.adapter.head.items():
            close(tensor, other.adapter.head[name], name)
        assert (one.scores is None) == (other.scores is None)
        if one.scores is not None and other.scores is not None:
            close(one.scores.heads, other.scores.heads, "scores of heads")
            close(one.scores.channels, other.scores.channels, "scores of channels")
