"""The loss model that stands in for training in surrogate runs: its coefficients, its formulas, its file. [ours]

No paper gives it. It says what a controller needs (losses per client, importance, accuracy per evaluation) as a few
smooth functions of what can be read from the records of one real run, and it claims nothing else:

* *Progress* ``g``: a job's contribution is ``c = dose * rho(rank)``, the dose being learning rate x local steps over
  that of the source's first round, ``rho = 1 + theta log2(rank / reference)``. The server adds the mean contribution
  of the clients whose updates arrived.
* *Curve*: with ``h = g^k / (s^k + g^k)`` the expected log loss at ratio p is ``a0 - h (a1 + a3 log(1 + g)) + a2 p^2``:
  falling with progress, first along a step and then slowly, and rising with pruning.
* *Before a job*: the curve, plus ``w(h) (client + noise)``; a client's offset is drawn once, the noise every round. An
  untrained head is as good for all: ``w`` is small until something is learned.
* *After it*: the client has gone on along the curve by ``kappa c`` on its own data, to its new ratio;
  ``log after - log before`` is linear in that expected change, in the client's deviation from the curve before, and
  in a fresh cut.
* *Tests*: the logit of accuracy is ``level + h (progress + tail log(1 + g)) - damage * mean p^2``, the log loss
  the same with the signs turned: monotone in progress and in pruning, and without noise.
* *Importance*: log-linear in rank, ratio and the loss before the job, up to a factor that is the same for all.

What one run tells badly: how much later rounds still bring (tail) from what pruning costs (damage), as both grow with
time; the fit pulls both towards zero. What it does not tell: how progress depends on the number of participants and on
what pruned clients lack (here: on neither), and what another learning rate does beyond its dose. That a client's rank
moves the fleet as it moves the client's own loss is an assumption.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from fedsim.contracts.common import FloatArray
from fedsim.errors import ConfigError
from fedsim.files import parse_json
from fedsim.places import user_path
from fedsim.settings import Section

SCHEMA = 1
_LEAST_SPREAD = 0.05
_CONTRIBUTION_BOUNDS = (0.1, 3.0)

# Fitted numbers have no bounds of use: those of the configuration's floats are not theirs.
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Range = Annotated[list[Finite], Field(min_length=2, max_length=2)]


class Curve(Section):
    """Expected log loss of a client: `start` (a0), `drop` (a1), `damage` (a2), `tail` (a3), `half` (s), `power` (k)."""

    start: Finite
    drop: NonNegativeFloat
    tail: NonNegativeFloat
    damage: NonNegativeFloat
    half: PositiveFloat
    power: PositiveFloat

    def learned(self, progress: FloatArray | float) -> FloatArray:
        """h in [0, 1), shape of `progress` (>= 0)."""
        raised = np.asarray(progress, dtype=np.float64) ** self.power
        return np.asarray(raised / (self.half**self.power + raised))

    def log_loss(self, progress: FloatArray | float, ratio: FloatArray) -> FloatArray:
        """Expected log loss at `progress` and pruning ratio; arguments broadcast."""
        fall = self.learned(progress) * (self.drop + self.tail * np.log1p(progress))
        return np.asarray(self.start - fall + self.damage * np.asarray(ratio) ** 2)


def spread(learned: FloatArray, least: float = _LEAST_SPREAD) -> FloatArray:
    """How far clients may differ, w(h) from `least` to 1: hardly at all while nothing is learned."""
    return np.asarray(least + (1.0 - least) * learned)


class Contribution(Section):
    """rho(rank) = 1 + `rank_slope` log2(rank / `rank_reference`), within 0.1 and 3 [ours]."""

    rank_reference: PositiveFloat
    rank_slope: NonNegativeFloat

    def of(self, rank: np.ndarray) -> FloatArray:
        """Contribution per unit of dose, shape of `rank`."""
        raw = 1.0 + self.rank_slope * np.log2(np.asarray(rank) / self.rank_reference)
        return np.clip(raw, *_CONTRIBUTION_BOUNDS)


class Local(Section):
    """What a job does to its client's loss: `advance` is kappa; see `columns` for the others.

    `least_spread` is the noise of a job where nothing is learned yet, over that where all is.
    """

    advance: PositiveFloat
    least_spread: PositiveFloat
    level: Finite
    change: NonNegativeFloat
    deviation: Finite
    cut: Finite

    @staticmethod
    def columns(
        curve: Curve,
        advance: float,
        least_spread: float,
        progress: FloatArray,
        contribution: FloatArray,
        log_before: FloatArray,
        ratio_start: FloatArray,
        ratio: FloatArray,
    ) -> tuple[FloatArray, FloatArray]:
        """What `level`, `change`, `deviation` and `cut` multiply, shape (P, 4), and the spread of the noise, (P,)."""
        ahead = progress + advance * contribution
        learned, here = curve.learned(ahead), curve.log_loss(progress, ratio_start)
        width = spread(learned, least_spread)
        columns = [
            width,
            curve.log_loss(ahead, ratio) - here,
            log_before - here,
            learned * np.maximum(ratio - ratio_start, 0.0),
        ]
        return np.stack(columns, axis=-1), width


class PanelFit(Section):
    """A monotone function of progress and of the fleet's mean squared ratio."""

    level: Finite
    progress: NonNegativeFloat
    tail: NonNegativeFloat
    damage: NonNegativeFloat

    def gain(self, curve: Curve, progress: FloatArray | float, mean_square_ratio: FloatArray | float) -> FloatArray:
        """What training has brought and pruning left, beside `level`; arguments broadcast."""
        rise = curve.learned(progress) * (self.progress + self.tail * np.log1p(progress))
        return np.asarray(rise - self.damage * mean_square_ratio)


class PanelFits(Section):
    """Log of the panel's loss (falls with progress); logits of both accuracies (rise with it)."""

    loss: PanelFit
    accuracy: PanelFit
    accuracy_consensus: PanelFit


class Importance(Section):
    """log importance = `rank` log2(rank / reference) + `ratio` p + `loss` log(loss before) + noise."""

    rank: Finite
    ratio: Finite
    loss: Finite
    noise: NonNegativeFloat


class Noise(Section):
    """Standard deviations: of clients' offsets, of `loss_before` per round, of the local change."""

    client: NonNegativeFloat
    before: NonNegativeFloat
    after: NonNegativeFloat


class Quality(Section):
    """How well one output is fitted: residual RMSE (over rows less coefficients) and R2, on `scale`."""

    scale: Literal["log", "natural"]
    rmse: NonNegativeFloat
    r2: Finite
    rows: int


class Seen(Section):
    """Ranges of the inputs in the source run: what lies beyond is extrapolated."""

    ratio: Range
    rank: Range
    participants: Range
    dose: Range
    loss_before: Range
    loss_after: Range


class Source(Section):
    """The run that was fitted; `settings` are its dotted keys that the fit depends on."""

    config_hash: str
    method: str
    prunes: bool
    model: str
    model_sha256: str | None
    data: str
    data_sha256: str | None
    clients: int
    rounds: int
    settings: dict[str, Any]


class SurrogateModel(Section):
    """Everything in a surrogate file. `first_dose` is the source's full learning rate x local steps."""

    kind: Literal["fedsim surrogate"] = "fedsim surrogate"
    schema_version: int = SCHEMA
    source: Source
    seen: Seen
    first_dose: PositiveFloat
    curve: Curve
    contribution: Contribution
    local: Local
    noise: Noise
    tests: PanelFits
    importance: Importance | None
    quality: dict[str, Quality]
    notes: list[str]

    def label(self) -> str:
        """What every output of a surrogate run says."""
        return (
            f"surrogate: losses and accuracies come from a model fitted to run {self.source.config_hash[:12]}, "
            "not from training"
        )


def read_surrogate(path: str | Path) -> tuple[SurrogateModel, str]:
    """The model in a surrogate file, and the sha256 of the file.

    Raises:
        ConfigError: no such file, damaged, or of another schema.
    """
    path = user_path(path)
    where = f"train.surrogate: file '{path}'"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{where} cannot be read ({error.strerror}); make one with fedsim fit-surrogate") from None
    try:
        tree = parse_json(content)
    except ValueError:
        raise ConfigError(f"{where} is damaged (not JSON); make it again with fedsim fit-surrogate") from None
    if not isinstance(tree, dict) or tree.get("kind") != "fedsim surrogate":
        raise ConfigError(f"{where} is no surrogate (fedsim fit-surrogate makes them)")
    if tree.get("schema_version") != SCHEMA:
        raise ConfigError(
            f"{where} has schema {tree.get('schema_version')!r} and this version reads {SCHEMA}; fit it again with "
            "fedsim fit-surrogate"
        )
    try:
        return SurrogateModel.model_validate(tree), hashlib.sha256(content).hexdigest()
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{where} is damaged ('{key}': {first['msg'].lower()}); fit it again") from None
