"""The engine that trains and tests: which one, in which precision, and how many clients at a time.

``reference`` is the oracle: one PEFT model, client after client. ``masked`` and ``sliced`` train cohorts
(`fedsim.learn.cohort`) and agree with it to rounding. ``auto`` takes ``sliced``: wherever it was measured it was at
least as fast as ``masked`` (equal where nothing is pruned, as both then share the weights). Two exceptions: a model
whose padding would not be exact is masked, and a user's criterion without a form for cohorts takes the reference. How
many clients run together follows `chunk_clients`; ``fedsim bench`` repeats the measurements behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedsim.errors import ConfigError
from fedsim.learn.cohort.chunk_memory import client_bytes, default_budget_bytes
from fedsim.learn.cohort.forward import CohortModel
from fedsim.learn.cohort.plan import ChunkPlan
from fedsim.learn.cohort.stack import Base
from fedsim.learn.cohort.tester import CohortTester
from fedsim.learn.cohort.trainer import CohortTrainer
from fedsim.learn.model.adapter import Adapter
from fedsim.learn.model.backbone import Backbone
from fedsim.learn.model.linears import target_linears
from fedsim.learn.train.batches import EncodedText, eval_batches
from fedsim.learn.train.evaluate import Tester, sentences_at_once
from fedsim.learn.train.importance import Criterion
from fedsim.learn.train.jobs import ClientData, Trainer, TrainRule
from fedsim.settings import Config
from fedsim.structure import ModelShape

_ALONE_ELEMENTS = 1 << 18
"""From this width of a client's step on (tokens x FFN channels) a processor is busy with one client: chunks of one."""
_TOGETHER_ELEMENTS = 1 << 21
"""Below it clients share their overhead, until the activations of a chunk no longer stay in the cache."""


@dataclass(frozen=True, eq=False)
class Engine:
    """What trains and tests in a run.

    Attributes:
        name: ``reference``, ``masked`` or ``sliced``: the path that was chosen.
        precision: ``fp32``, or ``bf16`` where the products with frozen weights run in it.
        plan: how many clients are trained together; None for ``reference``, which takes one after another.
    """

    name: str
    precision: str
    plan: ChunkPlan | None
    trainer: Trainer
    tester: Tester


def chosen_engine(asked: str, criterion: Criterion | None) -> str:
    """``train.engine``, where ``auto`` becomes ``reference`` for a user's criterion that has no form for cohorts."""
    alone = criterion is not None and criterion.estimate is not None and criterion.cohort is None
    return "reference" if asked == "auto" and alone else asked


def chosen_precision(asked: str, engine: str, device: torch.device) -> str:
    """``train.precision``, with ``auto`` resolved: bf16 where the device multiplies it natively, else fp32.

    Raises:
        ConfigError: bf16 with the reference engine, which is the oracle and stays in fp32.
    """
    if engine == "reference":
        if asked == "bf16":
            raise ConfigError("train.precision: value 'bf16' is not allowed with train.engine reference (fp32 or auto)")
        return "fp32"
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("amx_bf16") or able.get("avx512_bf16") else "fp32"


def chunk_clients(shape: ModelShape, tokens: int, device: torch.device) -> int | None:
    """Clients of a chunk that run fastest, on a processor; None on a card, where the memory alone limits.

    Args:
        tokens: of one client's batch, at most.
    """
    if device.type == "cuda":
        return None
    elements = tokens * max(shape.ffn, shape.vocab if shape.is_language_model else 0)
    return 1 if elements >= _ALONE_ELEMENTS else max(1, _TOGETHER_ELEMENTS // elements)


def make_engine(
    config: Config,
    backbone: Backbone,
    adapter: Adapter,
    data: ClientData,
    test: EncodedText,
    rule: TrainRule,
    precision: str,
) -> Engine:
    """Stand up the engine that ``train.engine`` names.

    Raises:
        ConfigError: ``sliced`` with a model that cannot be padded exactly, or a criterion without a form for cohorts.
    """
    train, settings = config.train, config.model
    asked = chosen_engine(train.engine, rule.criterion)
    if asked == "reference":
        from fedsim.learn.model.lora import LoraModel  # PEFT takes seconds to import, and only the oracle needs it
        from fedsim.learn.train.reference import ReferenceTester, ReferenceTrainer

        model = LoraModel(backbone, settings.lora_targets, settings.lora_alpha_over_rank)
        size = sentences_at_once(backbone.shape, int(test.lengths.max()))
        batches, _ = eval_batches(test, size, backbone.device)
        return Engine("reference", "fp32", None, ReferenceTrainer(model, data, rule), ReferenceTester(model, batches))
    cohort = CohortModel(backbone, settings.pooling)
    name = ("sliced" if cohort.keeps_zero else "masked") if asked == "auto" else asked
    if name == "sliced" and not cohort.keeps_zero:
        raise ConfigError(
            "train.engine: value 'sliced' is not allowed with this model, whose activation does not map 0 to 0 "
            "(clients of unlike widths could not be padded exactly; masked, reference and auto are allowed)"
        )
    frozen = {
        linear: (weight.detach(), None if bias is None else bias.detach())
        for linear, (weight, bias) in backbone.full_weights.items()
    }
    first, _ = next(iter(adapter.factors.values()))
    dtype = first.dtype

    def base(sliced: bool) -> Base:
        targets = target_linears(backbone.shape, settings.lora_targets)
        return Base(backbone, targets, settings.lora_alpha_over_rank, frozen, dtype, sliced)

    training = base(name == "sliced")
    budget = train.memory_budget_bytes or default_budget_bytes(backbone.device)
    one = client_bytes(cohort, training, adapter, train.batch_size, train.max_length, rule.criterion is not None)
    if train.memory_budget_bytes is not None and one > budget:
        raise ConfigError(
            f"train.memory_budget_bytes: value {train.memory_budget_bytes} is not allowed (one client takes about "
            f"{one} bytes; null takes a share of the device's memory)"
        )
    fastest = chunk_clients(backbone.shape, train.batch_size * train.max_length, backbone.device)
    fitting = max(1, budget // one)
    plan = ChunkPlan(min(fitting, max(1, len(data.parts)), fastest or fitting))
    trainer = CohortTrainer(cohort, training, data, rule, plan)
    return Engine(name, precision, plan, trainer, CohortTester(cohort, base(True), test))
