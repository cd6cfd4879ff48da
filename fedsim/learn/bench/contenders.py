"""The contenders of one `EngineCase`, ready to be timed, and how far their results are apart."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from fedsim.contracts.learning import LocalRequest
from fedsim.contracts.program import LocalProgram, Phase
from fedsim.errors import ConfigError
from fedsim.learn.assemble import torch_device
from fedsim.learn.bench.case import EngineCase
from fedsim.learn.bench.peft_loop import PlainPeft
from fedsim.learn.engine import Engine, chosen_precision, chunk_clients, make_engine
from fedsim.learn.model.adapter import Adapter, initial_adapter, restrict
from fedsim.learn.model.backbone import Backbone, find_minilm, load_backbone
from fedsim.learn.train.batches import EncodedText
from fedsim.learn.train.importance import find_criterion, random_scores
from fedsim.learn.train.jobs import Job, TrainRule
from fedsim.learn.train.selection import select
from fedsim.settings import Config, ModelSettings, TrainSettings
from fedsim.structure import Structure

Contender = Callable[[], list[Adapter]]

_LEARNING_RATE = 1e-3
_TEST_SAMPLES = 8


class EngineBench:
    """Models and data of one case in memory, and its contenders.

    Every contender trains all clients of the case (or the first few) from the same global adapter, and returns what
    they would send. Engines run as they do in a run: with their probes of the loss, and deterministic.
    """

    def __init__(self, case: EngineCase, device_name: str) -> None:
        """Load the model. Raises ConfigError for a device that is not there, ModelError for a model that is not."""
        self.case = case
        self.device = torch_device(device_name)
        if self.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        backbone = self._backbone()
        self._shape = backbone.shape
        self._data = case.data(backbone.shape.vocab, backbone.tokenizer.pad_token_id)
        self._start = initial_adapter(backbone, case.targets, case.rank, case.seed)
        self._full = Structure.full(backbone.shape)
        self._alpha_over_rank = ModelSettings().lora_alpha_over_rank
        self._plain: PlainPeft | None = None
        self._loaded: Backbone | None = backbone

    @property
    def is_on_card(self) -> bool:
        """Whether the work runs beside the host's processor."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def measures_bf16(self) -> bool:
        """Whether products in bf16 are native here."""
        return chosen_precision("auto", "sliced", self.device) == "bf16"

    @property
    def rule_chunk(self) -> int | None:
        """The chunk that `fedsim.learn.engine.chunk_clients` names; None where the memory alone limits."""
        return chunk_clients(self._shape, self.case.batch_size * self.case.length, self.device)

    def sequential(
        self, fused: bool, autocast: bool = False, clients: int | None = None, steps: int | None = None
    ) -> Contender:
        """The plain PEFT loop, unpruned: the first `clients` clients (None: all), `steps` each (None: the case's)."""
        case, plain = self.case, self._peft()

        def train() -> list[Adapter]:
            with _deterministic(False):
                return plain.sequential(
                    self._data,
                    range(clients or case.clients),
                    steps or case.local_steps,
                    case.batch_size,
                    case.seed,
                    _LEARNING_RATE,
                    fused,
                    autocast,
                )

        return train

    def one_big_batch(self) -> Contender:
        """The same samples through one adapter."""
        case, plain = self.case, self._peft()

        def train() -> list[Adapter]:
            with _deterministic(False):
                plain.one_big_batch(
                    self._data, range(case.clients), case.local_steps, case.batch_size, case.seed, _LEARNING_RATE
                )
            return []

        return train

    def engine(self, name: str, precision: str = "fp32") -> Engine:
        """An engine as a run would make it; each has a backbone of its own."""
        case = self.case
        products = torch.bfloat16 if precision == "bf16" else torch.float32
        # PEFT's layers would stay in a backbone that served the reference engine.
        backbone = self._backbone(products)
        rule = TrainRule(
            seed=case.seed,
            batch_size=case.batch_size,
            criterion=find_criterion("lora_guided") if case.importance else None,
            importance_every=1,
            selection="layer_local",
        )
        config = Config(
            model=ModelSettings(name=case.model, pooling=case.pooling, lora_targets=_as_setting(case)),  # type: ignore[arg-type]
            train=TrainSettings(
                engine=name,  # type: ignore[arg-type]
                local_steps=case.local_steps,
                batch_size=case.batch_size,
                max_length=case.length,
                precision=precision,  # type: ignore[arg-type]
            ),
        )
        return make_engine(config, backbone, self._start, self._data, self._test_text(), rule, precision)

    def training(
        self,
        engine: Engine,
        unpruned: bool = False,
        chunk: int | None = None,
        clients: int | None = None,
        steps: int | None = None,
    ) -> Contender:
        """One round of `engine`.

        Args:
            unpruned: leave the case's pruning out.
            chunk: clients together at most; None: what the engine chose.
            clients: the first so many; None: all.
            steps: of each client; None: the case's.
        """
        jobs = self._jobs(0.0 if unpruned else self.case.ratio, steps)[:clients]
        limit = engine.plan.limit if chunk is None and engine.plan is not None else chunk

        def train() -> list[Adapter]:
            if engine.plan is not None and limit is not None:
                engine.plan.limit = limit
            with _deterministic(True):
                return [update.adapter for update in engine.trainer.train(jobs)]

        return train

    def difference(self, ours: Sequence[Adapter], theirs: Sequence[Adapter], unpruned: bool = False) -> float:
        """Largest distance of a client's results, relative to how far training moved them (root mean squares).

        Raises:
            ValueError: not as many results.
        """
        jobs = self._jobs(0.0 if unpruned else self.case.ratio)
        worst = 0.0
        if len(ours) != len(theirs) or not ours:
            raise ValueError(f"{len(ours)} results against {len(theirs)}")
        for one, other, job in zip(ours, theirs, jobs, strict=False):
            start = restrict(self._start, job.start, self.case.rank, self._shape, None)
            moved = _norm(other, start)
            distance = _norm(one, other) / moved if moved > 0 else float("inf")
            # A plain maximum would pass over NaN.
            worst = max(worst, distance) if distance == distance else float("nan")
            if worst != worst:
                return worst
        return worst

    def _peft(self) -> PlainPeft:
        if self._plain is None:
            backbone = self._loaded if self._loaded is not None else self._backbone()
            self._loaded = None
            self._plain = PlainPeft(backbone, self.case.targets, self._start, self._alpha_over_rank)
        return self._plain

    def _backbone(self, products: torch.dtype = torch.float32) -> Backbone:
        settings = ModelSettings(name=self.case.model, pooling=self.case.pooling)  # type: ignore[arg-type]
        return load_backbone(settings, 2, self.case.seed, self.device, products=products)

    def _test_text(self) -> EncodedText:
        text = self._data.text
        few = slice(0, _TEST_SAMPLES)
        return EncodedText(text.input_ids[few], text.lengths[few], text.labels[few], None)

    def _jobs(self, ratio: float, steps: int | None = None) -> list[Job]:
        case = self.case
        request = LocalRequest(
            client=0,
            flight=0,
            version=0,
            ratio_asked=ratio,
            rank=case.rank,
            program=LocalProgram((Phase(steps or case.local_steps, _LEARNING_RATE, estimate=True),)),
        )
        return [
            Job(replace(request, client=client), self._start, self._structure(client, ratio), None, None)
            for client in range(case.clients)
        ]

    def _structure(self, client: int, ratio: float) -> Structure:
        if ratio == 0.0:
            return self._full
        scores = random_scores(self._shape, self.case.seed, client)
        return select(scores, self._full, self._shape, ratio, "layer_local")


def has_minilm() -> bool:
    """Whether the optional checkpoint is installed."""
    return find_minilm() is not None


def set_threads(threads: int) -> None:
    """Threads of torch's own products."""
    torch.set_num_threads(threads)


def device_facts(device_name: str) -> dict[str, object]:
    """What torch says of the device.

    Raises:
        ConfigError: no such device here.
    """
    device = torch_device(device_name)
    facts: dict[str, object] = {
        "torch_device": device.type,
        "torch_threads": torch.get_num_threads(),
        "bf16_products": chosen_precision("auto", "sliced", device) == "bf16",
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {"card": card.name, "card_memory_bytes": card.total_memory, "cuda": torch.version.cuda}
    else:
        facts["vector_instructions"] = torch.backends.cpu.get_cpu_capability()
    return facts


def peak_card_bytes(device_name: str) -> int | None:
    """The most that torch has held on the card; None on a processor."""
    device = torch_device(device_name)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def check_device(device_name: str) -> None:
    """Raise ConfigError where the device is not there."""
    if device_name not in ("cpu", "cuda"):
        raise ConfigError(f"--torch-device: value '{device_name}' is not allowed (cpu or cuda)")
    if device_name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--torch-device: value 'cuda' is not allowed here (torch finds no CUDA device)")


def _norm(one: Adapter, other: Adapter) -> float:
    """Root of the summed squares of all differences."""
    total = 0.0
    for name, pair in one.factors.items():
        for ours, theirs in zip(pair, other.factors[name], strict=True):
            total += float((ours.double() - theirs.double()).square().sum())
    for name, tensor in one.head.items():
        total += float((tensor.double() - other.head[name].double()).square().sum())
    return total**0.5


def _as_setting(case: EngineCase) -> object:
    return case.targets if isinstance(case.targets, str) else list(case.targets)


@contextlib.contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    """As runs have it for the engines; off for PEFT, which is faster for it."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(on, warn_only=True)
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
