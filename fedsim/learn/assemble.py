"""From a configuration to a learner: device, precision, backbone, encoded text, engine."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from fedsim.contracts.common import IntArray
from fedsim.contracts.program import Objective
from fedsim.contracts.server_optimizer import ServerOptimizer
from fedsim.control.policies import POLICIES
from fedsim.data.labelled import Corpus
from fedsim.errors import ConfigError
from fedsim.learn.engine import chosen_engine, chosen_precision, make_engine
from fedsim.learn.entries import RULES
from fedsim.learn.learner import LearnerParts, LoraLearner, no_objective
from fedsim.learn.merge.rules import find_rule
from fedsim.learn.model.adapter import initial_adapter
from fedsim.learn.model.backbone import load_backbone
from fedsim.learn.train.batches import encode
from fedsim.learn.train.importance import find_criterion
from fedsim.learn.train.jobs import ClientData, TrainRule
from fedsim.learn.train.prompts import encode_prompts
from fedsim.settings import Config


def torch_device(name: str) -> torch.device:
    """The device named in ``train.torch_device``; ``auto`` takes CUDA where there is one.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"train.torch_device: value '{name}' is not allowed (auto, cpu, cuda or cuda:N)") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"train.torch_device: value '{name}' is not allowed (auto, cpu, cuda or cuda:N)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"train.torch_device: value '{name}' is not allowed here (CUDA devices found: {torch.cuda.device_count()})"
        )
    return device


def build_learner(
    config: Config,
    prunes: bool,
    corpus: Corpus,
    parts: tuple[IntArray, ...],
    objective_at: Callable[[int], Objective | None] = no_objective,
    server: ServerOptimizer | None = None,
) -> LoraLearner:
    """Load the backbone, encode the text, and stand a trainer behind the joint.

    Args:
        prunes: whether the method prunes; where not, importance is never estimated.
        parts: each client's sample numbers in ``corpus.train``.
        objective_at: what the method's jobs minimise beside their losses, by the version they are sent off with.
        server: the method's server optimizer, if it has one.
    """
    criterion = find_criterion(config.prune.criterion)
    find_rule(config.aggregate.rule)
    torch.set_num_threads(config.train.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing here reads memory before writing it; filling every new tensor would cost a tenth of a small model's step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    device = torch_device(config.train.torch_device)
    if device.type == "cuda":
        # Without it cuBLAS may choose between workspaces, and repeats would differ; read when CUDA starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # The fused kernels of attention add up gradients in no fixed order; a resumed run must end as an uninterrupted
        # one. Sentences are short: the plain products cost little more.
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    engine_name = chosen_engine(config.train.engine, criterion if prunes else None)
    precision = chosen_precision(config.train.precision, engine_name, device)
    products = torch.bfloat16 if precision == "bf16" else torch.float32
    responses = corpus.train.responses is not None
    labels = 0 if responses else len(corpus.label_names)
    backbone = load_backbone(config.model, labels, config.seed, device, products=products)
    if config.train.max_length > backbone.max_tokens:
        raise ConfigError(
            f"train.max_length: value {config.train.max_length} is not allowed (model '{config.model.name}' takes at "
            f"most {backbone.max_tokens} tokens)"
        )
    # Where all updates have one rank and the rule merges factor by factor, so does the global adapter.
    equal_ranks = RULES.named(config.aggregate.rule).equal_ranks and POLICIES.named(config.control.policy).one_rank
    rank = config.model.lora_rank if equal_ranks else config.model.lora_rank_max
    adapter = initial_adapter(backbone, config.model.lora_targets, rank, config.seed)
    rule = TrainRule(
        seed=config.seed,
        batch_size=config.train.batch_size,
        criterion=criterion if prunes else None,
        importance_every=config.prune.importance_every,
        selection=config.prune.selection,
    )
    encode_text = encode_prompts if responses else encode
    text, test = (
        encode_text(part, backbone.tokenizer, config.train.max_length) for part in (corpus.train, corpus.test)
    )
    engine = make_engine(config, backbone, adapter, ClientData(text, parts), test, rule, precision)
    learner_parts = LearnerParts(
        config,
        backbone,
        engine,
        criterion,
        server,
        texts_cut=(text.cut, test.cut),
        objective_at=objective_at,
        clients=len(parts),
    )
    return LoraLearner(learner_parts, adapter)
