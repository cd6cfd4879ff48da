"""A finished run's learner, for looking at: its checkpoint on its base model, with neither data nor an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedsim.contracts.common import State
from fedsim.learn.engine import Engine
from fedsim.learn.learner import LearnerParts, LoraLearner
from fedsim.learn.model.adapter import Adapter, initial_adapter
from fedsim.learn.model.backbone import Backbone, load_backbone
from fedsim.learn.train.importance import find_criterion
from fedsim.learn.train.jobs import Job, Update
from fedsim.settings import Config
from fedsim.structure import Structure


class _Idle:
    """Stands where an engine trains and tests, and does neither."""

    def train(self, jobs: Sequence[Job]) -> list[Update]:
        raise RuntimeError("a restored learner cannot train")

    def measure(self, adapter: Adapter, structures: Sequence[Structure]) -> list[tuple[float, float]]:
        raise RuntimeError("a restored learner has no test data")


def restore_learner(config: Config, labels: int, state: State) -> tuple[LoraLearner, Backbone]:
    """The learner as the checkpoint left it, and its backbone (fp32, on the CPU, unpruned, without LoRA layers).

    Args:
        labels: number of classes.
        state: what `LoraLearner.state` gave.
    Raises:
        ModelError: the base model is no longer at hand, or cannot be loaded.
        KeyError, ValueError: the state is of another model.
    """
    backbone = load_backbone(config.model, labels, config.seed, torch.device("cpu"))
    idle = _Idle()
    engine = Engine("none", "fp32", None, idle, idle)
    parts = LearnerParts(config, backbone, engine, find_criterion(config.prune.criterion))
    learner = LoraLearner(parts, initial_adapter(backbone, config.model.lora_targets, 1, config.seed))
    learner.restore(state)
    return learner, backbone
