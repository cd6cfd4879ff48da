"""From a configuration to the parts of a run: fleet, clock, data, learner, policy, federation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsim.contracts.control import Ask
from fedsim.contracts.learning import Learner
from fedsim.contracts.program import LocalProgram
from fedsim.control.policies import POLICIES, PolicyInputs, make_policy
from fedsim.control.reward import RewardModel
from fedsim.control.timed import TimedPolicy
from fedsim.cost.ask import JobSetting, ShapeAsk
from fedsim.cost.device import DeviceProfile
from fedsim.cost.fedscale import FedScaleAsk
from fedsim.cost.shapes import load_shape
from fedsim.cost.workload import StepSetting, linear_roles
from fedsim.data.corpus import load_corpus
from fedsim.data.fingerprint import corpus_hash
from fedsim.data.labelled import Corpus
from fedsim.data.partition import partition
from fedsim.errors import ConfigError
from fedsim.federation.federation import Federation
from fedsim.federation.parts import Parts
from fedsim.fleet.dynamics import Dynamics, check_arrays
from fedsim.fleet.fleet import Fleet, load_fleet
from fedsim.learn.entries import CRITERIA
from fedsim.learn.model.linears import target_linears
from fedsim.learn.standins.surrogate import SurrogateLearner
from fedsim.learn.standins.surrogate_model import read_surrogate
from fedsim.learn.standins.timing_only import TimingLearner
from fedsim.methods.base import Method
from fedsim.methods.catalogue import method_named
from fedsim.methods.surrogate_use import check_use, labels_of_use
from fedsim.rng import Stream, generator
from fedsim.runner.identity import fleet_texts, identity
from fedsim.runner.names import check_names
from fedsim.runner.panel import draw_panel
from fedsim.settings import Config, ServerSettings
from fedsim.sim.protocol import flights_at_once, updates_per_merge
from fedsim.structure import ModelShape, achieved_ratio, kept_counts, largest_ratio

Say = Callable[[str], None]

ARRAYS_FROM_CLIENTS = 500
"""Clients a round from which a run that trains nothing is played in arrays. A flight costs the event loop about 15 to
30 us, the rest of such a run 3 to 6 us: below this number that is a few milliseconds a round."""


@dataclass(frozen=True, eq=False)
class Experiment:
    """A run, ready to start.

    Attributes:
        controller: the federation's policy, which counts its host seconds.
        prunable_fraction: share of the learner's weights (blocks, embeddings, head) that can be pruned at all.
        facts: what the manifest says of model, data, fleet and clock.
        labels: how far its numbers may be trusted, beside the method's own.
        player: what plays the clock: ``processes`` or ``arrays``.
    """

    config: Config
    fleet: Fleet
    federation: Federation
    controller: TimedPolicy
    prunable_fraction: float
    facts: dict[str, object]
    labels: tuple[str, ...] = ()
    player: str = "processes"


def ranks_on_offer(rank_max: int) -> tuple[int, ...]:
    """Powers of two from 2 to `rank_max`: the bandit's rank set [ours; the paper's set is not known]."""
    return tuple(2**power for power in range(1, rank_max.bit_length()) if 2**power <= rank_max)


def build(config: Config, say: Say, perturb: Callable[[DeviceProfile], DeviceProfile] | None = None) -> Experiment:
    """Build every part of a run.

    Args:
        say: called with a line before each slow step, so that the user sees progress early.
        perturb: applied to each device profile (a draw from its error bands).
    Raises:
        FedsimError: one sentence naming the field, the value and what is allowed.
    """
    check_names(config)
    method = method_named(config.method)
    fleet = load_fleet(config.fleet, config.cost.precision, config.seed, perturb)
    corpus = None
    if config.train.engine not in ("none", "surrogate"):
        say("reading data")
        corpus = _with_test_sample(load_corpus(config.data, config.seed), config)
        for note in corpus.notes:
            say(f"warning: {note}")
    labels = _outputs(config, corpus)
    shape = load_shape(config.model.name, labels)
    clock_shape = load_shape(config.cost.model, labels) if config.cost.model else shape
    participants = participants_per_round(config, fleet.clients)
    _check_shape(config, method, shape)
    ask_of = priced(config, method, shape, clock_shape)
    # Policies reason with the work of the first round whose jobs may cut.
    first_cut = config.prune_warmup_rounds if method.prunes and method.iterative else 0
    ask = ask_of(method.local_program(first_cut, config))

    facts = _facts(config, fleet, clock_shape)
    player = chosen_player(config, participants, fleet.dynamics)
    facts["player"] = player
    labels_of_learning: list[str] = []
    learner: Learner
    if config.train.engine == "surrogate":
        learner, more, labels_of_learning = _build_surrogate(config, method, shape, fleet.clients, participants)
        facts |= more
    elif corpus is None:
        learner = TimingLearner(shape)
        facts["model"] = {"name": shape.name, "sha256": None}
        facts["data"] = {"name": None, "sha256": None, "train": 0, "test": 0}
        labels_of_learning = ["timing only: nothing was trained"]
    else:
        learner, more = _build_learner(config, method, corpus, fleet.clients, say)
        cut = more.pop("cut")
        facts |= more
        facts["data"] = {
            "name": config.data.path or config.data.name or "synthetic",
            "sha256": corpus_hash(corpus),
            "train": len(corpus.train.labels),
            "test": len(corpus.test.labels),
            "label_names": list(corpus.label_names),
            "cut": cut,
            "notes": list(corpus.notes),
        }
    policy = TimedPolicy(
        make_policy(
            PolicyInputs(
                config.control,
                clients=fleet.clients,
                ask=ask,
                seed=config.seed,
                fixed_rank=config.model.lora_rank,
                expected_time=fleet.expected_seconds,
                speed_class=fleet.speed_classes(),
            )
        )
    )
    parts = Parts(
        config=config,
        method=method,
        learner=learner,
        policy=policy,
        reward=RewardModel(config.reward, fleet.clients, peers_of(config.server, fleet.clients)),
        ask_of=ask_of,
        clients=fleet.clients,
        participants=participants,
        panel=draw_panel(fleet.device_of, config.evaluate.panel, config.seed),
    )
    fraction = shape.prunable_weights / shape.all_weights
    return Experiment(config, fleet, Federation(parts), policy, fraction, facts, tuple(labels_of_learning), player)


MOST_PEERS = 1000
"""Updates that a flight is measured against at most, so that a merge does not cost more in a larger fleet. [ours]"""


def peers_of(server: ServerSettings, clients: int) -> int:
    """How many updates a flight is measured against where a merge is no round; 0 where it is."""
    return 0 if server.mode == "sync" else min(MOST_PEERS, flights_at_once(server, clients))


def chosen_player(config: Config, participants: int, dynamics: Dynamics | None = None) -> str:
    """What plays the clock: ``server.clock``, where ``auto`` is SimPy's processes unless they would cost too much.

    Arrays give the same numbers to the bit, and are taken where nothing is trained and so many clients take part that
    the processes would be more than a tenth of the run's host time by more than a moment. Where clients meet, drop or
    change only the processes can say what happens.

    Raises:
        ConfigError: arrays for such a fleet.
    """
    asked = config.server.clock
    if dynamics is not None and dynamics.said:
        if asked == "arrays":
            check_arrays(dynamics)
        return "processes"
    if asked != "auto":
        return asked
    trains = config.train.engine not in ("none", "surrogate")
    whole = config.server.mode == "sync"  # flights that leave together end together
    return "arrays" if whole and not trains and participants >= ARRAYS_FROM_CLIENTS else "processes"


def _outputs(config: Config, corpus: Corpus | None) -> int:
    """Outputs of the classifier: two where no data says; none, which is a language model, for ``causal_lm``."""
    if config.data.task == "causal_lm":
        return 0
    return len(corpus.label_names) if corpus else 2


def _with_test_sample(corpus: Corpus, config: Config) -> Corpus:
    """The corpus with at most ``evaluate.max_samples`` test sentences, a seeded choice."""
    limit = config.evaluate.max_samples
    if limit is None or limit >= len(corpus.test):
        return corpus
    rows = generator(config.seed, Stream.TEST_SAMPLE).permutation(len(corpus.test))[:limit]
    return replace(corpus, test=corpus.test.take(np.sort(rows)))


def participants_per_round(config: Config, clients: int) -> int:
    """Updates that a merge waits for. Raises ConfigError where the fleet has fewer clients than are asked for."""
    asked = config.server.clients_per_round
    if asked != "all" and config.server.concurrency is None and asked > clients:
        raise ConfigError(
            f"server.clients_per_round: value {asked} is not allowed (the fleet '{config.fleet.name}' has {clients} "
            f"clients: 1 to {clients}, or all)"
        )
    return updates_per_merge(config.server, clients)


def _check_shape(config: Config, method: Method, shape: ModelShape) -> None:
    """Checks of ranks and pruning targets against the learner's widths."""
    width = min(shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.ffn)
    if config.model.lora_rank_max > width:
        raise ConfigError(
            f"model.lora_rank_max: value {config.model.lora_rank_max} is not allowed (at most {width}, the narrowest "
            f"layer of {shape.name})"
        )
    if not method.prunes:
        return
    limit = largest_ratio(shape)
    if config.prune.selection == "layer_local":
        # Nearest counts may stray from the asked ratio by half a group of each kind; beyond that it is out of reach.
        steps = np.arange(1000) / 1000
        limit = float(steps[_reachable(shape, steps)].max())
    fields = {"prune.target": config.prune.target}
    if config.prune.target_scope == "fleet_mean":
        fields["prune.max_ratio"] = config.prune.max_ratio
    for field, value in fields.items():
        reached = bool(_reachable(shape, value)) if config.prune.selection == "layer_local" else value <= limit
        if not reached:
            raise ConfigError(
                f"{field}: value {value} is not allowed (at most {limit:.3f}: one head and one channel stay in every "
                f"layer of {shape.name})"
            )


def _reachable(shape: ModelShape, ratio: ArrayLike) -> NDArray[np.bool_]:
    """Whether equal counts in every layer come within half a group of each kind of `ratio`."""
    heads, channels = kept_counts(shape, ratio)
    missed = np.asarray(ratio) - achieved_ratio(shape, heads[..., None], channels[..., None])
    half_group = 0.5 * (shape.weights_per_head_group + shape.weights_per_channel) * shape.layers
    reachable: NDArray[np.bool_] = missed <= (half_group + 1e-9) / shape.prunable_weights
    return reachable


def priced(config: Config, method: Method, shape: ModelShape, clock_shape: ModelShape) -> Callable[[LocalProgram], Ask]:
    """What each arm of a program asks, on the clock's workload; programs that cost alike share it."""
    cost, train = config.cost, config.train
    step = StepSetting(
        batch_size=cost.batch_size or train.batch_size,
        seq_len=cost.seq_len or train.max_length,
        precision=cost.precision,
        tuning="lora",
        train_top_layers=None,
        lora_roles=_lora_roles(config, shape, clock_shape),
    )
    needs_gradients = method.prunes and not CRITERIA.named(config.prune.criterion).is_static
    importance_every = config.prune.importance_every if needs_gradients else None
    ranks = ranks_on_offer(config.model.lora_rank_max)
    asks: dict[JobSetting, ShapeAsk] = {}

    def ask_of(program: LocalProgram) -> Ask:
        if cost.backend == "fedscale":
            return FedScaleAsk(clock_shape, step, program.steps, ranks)
        memory = config.prune.importance_memory
        job = JobSetting.of(program, step, importance_every, sends_scores=method.prunes, importance_memory=memory)
        if job not in asks:
            asks[job] = ShapeAsk(shape, clock_shape, job, ranks)
        return asks[job]

    return ask_of


def _lora_roles(config: Config, shape: ModelShape, clock_shape: ModelShape) -> frozenset[str] | None:
    """Roles of ``model.lora_targets`` (names of the learner's Linears), None for all; refuses misspelt ones."""
    roles = frozenset(linear.role.value for linear in target_linears(shape, config.model.lora_targets))
    if roles == linear_roles(shape):
        return None
    absent = roles - linear_roles(clock_shape)
    if absent:
        raise ConfigError(
            f"model.lora_targets: value {config.model.lora_targets!r} is not allowed with the clock's model "
            f"'{clock_shape.name}', which has no {', '.join(sorted(absent))} (allowed: 'all', or name a cost.model "
            "that has it)"
        )
    return roles


def _build_learner(
    config: Config, method: Method, corpus: Corpus, clients: int, say: Say
) -> tuple[Learner, dict[str, object]]:
    parts = partition(corpus.train, config.data, clients, config.seed)
    say("loading torch and the model")
    from fedsim.learn.assemble import build_learner  # heavy: only runs that train pay for it

    learner = build_learner(
        config,
        method.prunes,
        corpus,
        parts,
        objective_at=lambda version: method.local_program(version, config).objective,
        server=None if method.server_optimizer is None else method.server_optimizer(config),
    )
    model = {"name": config.model.name, "sha256": learner.weights_sha256}
    sizes = (len(corpus.train), len(corpus.test))
    for what, cut, rows in zip(("training", "test"), learner.texts_cut, sizes, strict=True):
        if cut:
            say(
                f"warning: {cut} of {rows} {what} texts ({cut / rows:.1%}) are longer than train.max_length = "
                f"{config.train.max_length} tokens and are cut there"
            )
    return learner, {"model": model, "cut": list(learner.texts_cut), **learner.facts}


def _build_surrogate(
    config: Config, method: Method, shape: ModelShape, clients: int, participants: int
) -> tuple[Learner, dict[str, object], list[str]]:
    """The learner, the manifest's facts and labels. The file's hash stands for the data: a run is resumed with it."""
    assert config.train.surrogate is not None  # checked with the configuration
    model, sha256 = read_surrogate(config.train.surrogate)
    check_use(model, config, method)
    one_rank = POLICIES.named(config.control.policy).one_rank
    ranks = (config.model.lora_rank,) if one_rank else ranks_on_offer(config.model.lora_rank_max)
    source = model.source
    facts: dict[str, object] = {
        "model": {"name": shape.name, "sha256": None},
        "data": {"name": f"surrogate of {source.data}", "sha256": sha256, "train": 0, "test": 0},
        "surrogate": {
            "file": config.train.surrogate,
            "sha256": sha256,
            "source": source.model_dump(mode="json"),
            "quality": {name: one.model_dump(mode="json") for name, one in model.quality.items()},
            "notes": model.notes,
        },
    }
    labels = labels_of_use(model, config, method, participants, ranks)
    return SurrogateLearner(model, shape, clients, config.seed), facts, labels


def _facts(config: Config, fleet: Fleet, clock_shape: ModelShape) -> dict[str, object]:
    classes, counts = np.unique(fleet.device_of, return_counts=True)
    cost, train = config.cost, config.train
    clock = {
        "model": clock_shape.name,
        "batch_size": cost.batch_size or train.batch_size,
        "seq_len": cost.seq_len or train.max_length,
        "precision": cost.precision,
    }
    clock["label"] = (
        f"clock: {clock['model']}, batch {clock['batch_size']} x {clock['seq_len']} tokens, {clock['precision']}"
    )
    return {
        "fleet": {
            "name": config.fleet.name,
            "clients": fleet.clients,
            "classes": {str(name): int(count) for name, count in zip(classes, counts, strict=True)},
        },
        "fleet_files": fleet_texts(config),
        "identity": identity(config),
        "clock": clock,
    }
