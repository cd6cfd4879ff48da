"""The settings of a run: one frozen record per section of the configuration file.

These records are the contract of the configuration: names, types, ranges and defaults stand here and nowhere else.
Reading YAML, applying overrides and method defaults, and checks across sections are in `fedsim.runner.config`.
Symbols of the paper (FedSpine, arXiv 2501.02438): tau is ``train.local_steps``, lambda ``control.discount``,
s ``control.exploration``, delta ``control.split``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_CLIENTS = 10_000_000
_MOST = 10_000_000
"""Rounds, steps, samples: more than anybody can run, and few enough that products of two stay exact. [ours]"""
_MOST_FLOAT = 1e12

Positive = Annotated[int, Field(ge=1, le=_MOST)]
NonNegative = Annotated[int, Field(ge=0, le=_MOST)]
Rows = Annotated[int, Field(ge=1, le=2**40)]
Bytes = Annotated[int, Field(ge=1, le=2**50)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, le=_MOST_FLOAT, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=_MOST_FLOAT, allow_inf_nan=False)]
Scale = Annotated[float, Field(gt=0.0, le=1e6, allow_inf_nan=False)]
"""Factors that weights or gradients are multiplied by: beyond it fp32 overflows at once."""


class Section(BaseModel):
    """Base of all sections: frozen, and strict about keys and types (an integer may stand for a float)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RecordSettings(Section):
    """What is written beside ``rounds.parquet``. Trackers follow a run and have no part in its configuration hash."""

    events: bool = True
    client_rounds: bool = True
    trackers: list[Literal["tensorboard", "wandb"]] = []
    wandb_mode: Literal["offline", "online"] = "offline"


class ModelSettings(Section):
    """The learner's model and its LoRA.

    ``name`` is ``tiny`` (built in), a local folder, a hub name, or, for timing only, a built-in shape.
    """

    name: str = "tiny"
    pooling: Literal["native", "mean"] = "native"
    lora_targets: Literal["all"] | list[str] = "all"
    lora_rank: Positive = 8
    lora_rank_max: Positive = 32
    lora_alpha_over_rank: Scale = 2.0


class DataSettings(Section):
    """Where the labelled text comes from and how it is split over clients.

    Columns (``text``, ``pair``, ``label``, ``test_text``) go by name, or by 0-based index where ``header: false``.
    Without ``test_path`` a seeded fifth of the rows is held out. With ``task: causal_lm`` they are a prompt's, its
    context's (which may be empty) and a response's, and ``field`` is the category that stands in for a label.
    """

    name: str | None = None
    path: str | None = None
    test_path: str | None = None
    header: bool = True
    quoting: Literal["auto", "minimal", "none"] = "auto"
    text: str | int = "text"
    pair: str | int | None = None
    label: str | int = "label"
    test_text: str | int | None = None
    task: Literal["classification", "causal_lm"] = "classification"
    partition: Literal["iid", "dirichlet", "field"] = "dirichlet"
    alpha: PositiveFloat = 10.0
    field: str | int | None = None
    max_samples: Rows | None = None


class FleetSettings(Section):
    """The simulated devices. ``name`` is a built-in fleet or a YAML file; ``mode_period`` 0 never re-draws modes."""

    name: str = "fedspine-80"
    clients: Annotated[int, Field(ge=1, le=MOST_CLIENTS)] | None = None
    mode_period: NonNegative | None = None


class StalenessSettings(Section):
    """What an update counts that started from an older version: its weight after t merges in between.

    ``constant``: 1; ``polynomial``: (1 + t)^-exponent; ``hinge``: 1 up to t = ``grace``, then
    1 / (1 + slope (t - grace)). Rules and default numbers are FedAsync's (arXiv 1903.03934); FedBuff (arXiv 2106.06639)
    uses the same polynomial.
    """

    rule: Literal["constant", "polynomial", "hinge"] = "polynomial"
    exponent: NonNegativeFloat = 0.5
    slope: NonNegativeFloat = 10.0
    grace: NonNegative = 4


class ServerSettings(Section):
    """The server's protocol. ``rounds`` counts merges. ``clock`` is what plays it: SimPy's ``processes``, or ``arrays``
    where clients cannot meet, with the same numbers to the bit (``auto`` takes them for large fleets that train
    nothing). ``over_selection`` dispatches that share more clients than the server waits for.

    ``mode``: ``sync`` merges all updates of a round of ``clients_per_round``; ``semi_async`` merges when ``buffer``
    updates are there (null: 10, or ``concurrency`` where that is less), ``async`` at every arrival; a protocol of your
    own goes by its name. Servers that do not wait keep ``concurrency`` clients at work (null: ``clients_per_round``).
    ``mix`` is the share of the updates' mean difference that is added to the global state (null: 0.6 under ``async``,
    else 1), after each difference was weighted by its ``staleness``; updates more than ``max_staleness`` merges old are
    thrown away. ``deadline_s`` is that of a round, and under the other modes that of each flight.

    ``selection`` is the rule by which they are chosen, where not ``all`` take part: a built-in one or your own.

    ``checkpoint_every`` counts rounds; ``auto`` writes one after the first round and then as often as about 5% of the
    host's time allows, and at the end. It decides what lies on disk, never a result.
    """

    mode: str = "sync"
    clock: Literal["auto", "processes", "arrays"] = "auto"
    selection: str = "uniform"
    rounds: Positive = 100
    clients_per_round: Positive | Literal["all"] = "all"
    over_selection: NonNegativeFloat = 0.0
    concurrency: Positive | None = None
    buffer: Positive | None = None
    mix: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    staleness: StalenessSettings = StalenessSettings()
    max_staleness: NonNegative | None = None
    deadline_s: PositiveFloat | None = None
    target_accuracy: Fraction | None = None
    time_budget_s: PositiveFloat | None = None
    checkpoint_every: Positive | Literal["auto"] = "auto"


class TrainSettings(Section):
    """Local training. AdamW starts afresh each round; dropout is 0.

    ``local_steps`` is the paper's tau. ``recovery_steps`` (null: a quarter of tau) run after pruning, taken from tau.
    ``memory_budget_bytes`` is what clients trained together may take of the device (null: a share of its memory).
    ``surrogate`` is the file of a fitted loss model (``fedsim fit-surrogate``), for ``engine: surrogate`` alone.
    """

    local_steps: Positive = 20
    recovery_steps: NonNegative | None = None
    batch_size: Positive = 8
    learning_rate: Scale = 1e-3
    schedule: Literal["linear", "constant"] = "linear"
    max_length: Positive = 64
    engine: Literal["auto", "reference", "masked", "sliced", "surrogate", "none"] = "auto"
    surrogate: str | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    memory_budget_bytes: Bytes | None = None
    torch_device: str = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] = 1


class PruneSettings(Section):
    """Structured pruning: target, schedule and criterion. Rounds left null take a share of ``server.rounds``.

    ``recovery_rounds`` come after the cut of a method that prunes when it has tuned (``tune_then_prune``), and are
    taken from ``server.rounds``.
    """

    target: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    target_scope: Literal["fleet_mean", "every_device"] = "every_device"
    max_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.8
    structure: Literal["device", "common"] = "device"
    reversible: bool = False
    criterion: str = "lora_guided"
    selection: Literal["layer_local", "global"] = "layer_local"
    importance_every: Positive = 1
    importance_memory: Literal["group", "weight"] = "group"
    warmup_rounds: NonNegative | None = None
    end_round: Positive | None = None
    max_step: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    recovery_rounds: NonNegative = 0


class AggregateSettings(Section):
    """How the server merges updates."""

    rule: str = "lowrank"
    importance_weight: NonNegativeFloat = 0.0


class ControlSettings(Section):
    """The controller that picks pruning ratio and LoRA rank (S-UCB's lambda, s and delta among its keys)."""

    policy: str = "uniform"
    arms: Literal["offset", "absolute"] = "offset"
    smooth: bool = True
    discount: Annotated[float, Field(gt=0.0, le=1.0)] = 0.98
    exploration: NonNegativeFloat = 0.2
    split: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    cut: Literal["middle", "played"] = "middle"


class RewardSettings(Section):
    """The bandit's reward: weights of (loss reduction, pruning progress, importance); kappa is ``time_penalty``."""

    kind: Literal["product", "fedmp"] = "product"
    weights: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = Field(
        default=(1.0, 0.25, 0.25), strict=False
    )
    time_penalty: NonNegativeFloat = 2.0
    time_share: Fraction = 0.0


class EvaluateSettings(Section):
    """When and on whom the global model is tested. ``panel`` counts the devices of the fixed panel."""

    every_rounds: Positive = 5
    panel: Positive = 8
    max_samples: Rows | None = None


class CostSettings(Section):
    """The clock's workload: a setting of its own, by default the learner's. ``fedscale``: that project's formula."""

    model: str | None = None
    batch_size: Positive | None = None
    seq_len: Positive | None = None
    precision: Literal["fp32", "fp16"] = "fp32"
    backend: Literal["analytic", "fedscale"] = "analytic"


_NOW_OPTIONS = {"rank_decay": ("hetlora", 1.0), "rank_penalty": ("hetlora", 0.0)}
"""Keys that were in ``train`` once: whose ``method_options`` they are now, and the value without effect."""


def _as_options(tree: Any) -> Any:
    """A raw configuration with keys of earlier versions where they are now; those of other methods' runs go."""
    train = tree.get("train") if isinstance(tree, Mapping) else None
    if not isinstance(train, Mapping) or not _NOW_OPTIONS.keys() & train.keys():
        return tree
    kept, options = dict(train), dict(tree.get("method_options") or {})
    for key, (method, without_effect) in _NOW_OPTIONS.items():
        if key in kept and tree.get("method") == method:
            options.setdefault(key, kept.pop(key))
        elif kept.get(key) == without_effect:
            del kept[key]
    return {**tree, "train": kept, "method_options": options}


class Config(Section):
    """A whole run. ``method_options`` are the settings of the method alone; its file lists them."""

    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    method: str = "fedspine"
    method_options: dict[str, Any] = {}
    records: RecordSettings = RecordSettings()
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    fleet: FleetSettings = FleetSettings()
    server: ServerSettings = ServerSettings()
    train: TrainSettings = TrainSettings()
    prune: PruneSettings = PruneSettings()
    aggregate: AggregateSettings = AggregateSettings()
    control: ControlSettings = ControlSettings()
    reward: RewardSettings = RewardSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    cost: CostSettings = CostSettings()

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, tree: Any) -> Any:
        return _as_options(tree)

    @property
    def local_recovery_steps(self) -> int:
        """Recovery steps of a round that prunes: as asked, else a quarter of tau (rounded down)."""
        asked = self.train.recovery_steps
        return self.train.local_steps // 4 if asked is None else asked

    @property
    def prune_warmup_rounds(self) -> int:
        """Rounds before the first cut: as asked, else a quarter of all rounds."""
        asked = self.prune.warmup_rounds
        return self.server.rounds // 4 if asked is None else asked

    @property
    def prune_end_round(self) -> int:
        """Exclusive end of the schedule's rise to its target: as asked, else three quarters of all rounds."""
        asked = self.prune.end_round
        return max(self.prune_warmup_rounds + 1, 3 * self.server.rounds // 4) if asked is None else asked
