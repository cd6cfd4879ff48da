"""Whether a configuration may use a surrogate, and what of it lies beyond what the surrogate was fitted to.

Refused, because the numbers would speak of something else: another model, and pruning where the source never pruned.
Everything else is let through and labelled: to ask what another controller, fleet size or schedule would do is what a
surrogate is for, and a label travels to every table and figure.
"""

from __future__ import annotations

from typing import Any

from fedsim.control.schedule import ratio_cap
from fedsim.errors import ConfigError
from fedsim.learn.standins.surrogate_model import SurrogateModel
from fedsim.methods.base import Method
from fedsim.methods.rates import rate_shares
from fedsim.settings import Config

DEPENDS_ON = (
    "model.pooling",
    "model.lora_targets",
    "model.lora_alpha_over_rank",
    "data.name",
    "data.path",
    "data.partition",
    "data.alpha",
    "server.selection",
    "train.local_steps",
    "train.batch_size",
    "train.learning_rate",
    "train.max_length",
    "prune.criterion",
    "prune.structure",
    "prune.reversible",
    "aggregate.rule",
    "aggregate.importance_weight",
)
"""Keys that shape the losses of a run; where they differ from the source's, the label says so."""


def setting(config: Config, dotted: str) -> Any:
    """Value of a dotted key, as JSON holds it."""
    section, key = dotted.split(".")
    return getattr(config, section).model_dump(mode="json")[key]


def check_use(model: SurrogateModel, config: Config, method: Method) -> None:
    """Refuse a use that the surrogate has nothing to say about.

    Raises:
        ConfigError: another model, or pruning where the source did not prune.
    """
    path, source = config.train.surrogate, model.source
    if config.model.name != source.model:
        raise ConfigError(
            f"train.surrogate: file '{path}' was fitted to model.name {source.model!r}, not to {config.model.name!r} "
            "(fit one to a run of that model)"
        )
    if method.prunes and config.prune.target > 0 and not source.prunes:
        raise ConfigError(
            f"train.surrogate: file '{path}' was fitted to a run of {source.method}, which never pruned, so it cannot "
            f"say what pruning does under method {config.method!r} (fit one to a run that prunes)"
        )


def labels_of_use(
    model: SurrogateModel, config: Config, method: Method, participants: int, ranks: tuple[int, ...]
) -> list[str]:
    """Labels of a surrogate run: what it is, and where it goes beyond its source ("extrapolated: ...").

    Args:
        participants: clients of a round.
        ranks: the ranks that the policy may choose.
    """
    seen, shares = model.seen, rate_shares(method, config, config.server.rounds)
    dose = float(shares.sum()) * config.train.learning_rate * config.train.local_steps / model.first_dose
    beyond = [
        f"{what} {_span(low, high)} (fitted on {_span(*known)})"
        for what, low, high, known in (
            ("pruning ratios", 0.0, ratio_cap(config.prune) if method.prunes else 0.0, seen.ratio),
            ("ranks", min(ranks), max(ranks), seen.rank),
            ("progress", 0.0, dose, seen.dose),
            ("participants a round", participants, participants, seen.participants),
        )
        if low < known[0] - 1e-9 or high > known[1] * (1 + 1e-9)
    ]
    if config.method != model.source.method:
        beyond.append(f"method {config.method} (fitted on {model.source.method})")
    for key in DEPENDS_ON:
        if (method.prunes or not key.startswith("prune.")) and key in model.source.settings:
            now, then = setting(config, key), model.source.settings[key]
            if now != then:
                beyond.append(f"{key} {now} (fitted on {then})")
    return [model.label(), *([f"extrapolated: {'; '.join(beyond)}"] if beyond else [])]


def _span(low: float, high: float) -> str:
    texts = [f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in (low, high)]
    return " to ".join(dict.fromkeys(texts))
