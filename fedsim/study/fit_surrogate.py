"""Fit the loss model of `fedsim.learn.standins.surrogate_model` to one finished real run, by least squares. [ours]

The coefficients that enter linearly are found by (bounded) least squares for each point of a small grid over the
others (theta, s, k; then kappa and the job's least spread); the point of the highest normal likelihood is kept. The
same rows give the same file.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear

from fedsim.contracts.common import FloatArray
from fedsim.file_set import check_replaceable
from fedsim.files import atomic_write_json
from fedsim.learn.standins.surrogate_model import (
    Contribution,
    Curve,
    Importance,
    Local,
    Noise,
    PanelFit,
    PanelFits,
    Quality,
    Seen,
    Source,
    SurrogateModel,
    spread,
)
from fedsim.methods.catalogue import method_named
from fedsim.methods.surrogate_use import DEPENDS_ON, setting
from fedsim.places import user_path
from fedsim.records.reader import Run, load
from fedsim.study.surrogate_rows import SourceRows, source_rows

_RANK_SLOPES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
_POWERS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
_HALVES = 20
_ADVANCES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
_LEAST_SPREADS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
_LEAST_LOSS = 1e-3
"""Smaller losses count as this: their logarithm would outweigh all others."""
_LEAST_PROBABILITY = 1e-3
_TEST_TOLERANCE = 0.15
"""What an evaluation is good for on the logit scale: the standard error of 90% of 400 sentences."""
_ROUND_NOISE = 0.5
"""Log losses of one round's clients, taken as one observation, over their spread."""
_TAIL_SD, _DAMAGE_SD = 0.5, 1.5
"""How large tail and damage are expected to be, at most: see `_solve_rising`."""
_RISING = [-np.inf, 0.0, 0.0, 0.0]
"""Lower bounds of level, progress, tail and damage."""
_LEAST_IMPORTANCE = 1e-6
_LEAST_VARIANCE = 1e-12


def fit_surrogate(run: str | Path, out: str | Path) -> SurrogateModel:
    """Fit a surrogate to the run directory `run` and write it to `out` (JSON).

    Raises:
        RunError: the run is unfinished, not trained, or too short (see `source_rows`); `out` cannot be written.
    """
    out = user_path(out)
    check_replaceable(out, (".json",), b"fedsim surrogate", "surrogate")
    source = load(run)
    model = fit(source)
    atomic_write_json(out, model.model_dump(mode="json"))
    return model


def fit(run: Run) -> SurrogateModel:
    """The model fitted to a run. Raises RunError as `source_rows`."""
    rows = source_rows(run)
    log_before = np.log(np.maximum(rows.loss_before, _LEAST_LOSS))
    log_after = np.log(np.maximum(rows.loss_after, _LEAST_LOSS))
    reference = float(np.exp2(np.mean(np.log2(rows.rank))))
    slopes = _RANK_SLOPES if len(np.unique(rows.rank)) > 1 else (0.0,)

    best = None
    for slope in slopes:
        contribution = Contribution(rank_reference=reference, rank_slope=slope)
        progress = _progress(rows, contribution)
        curve, cost = _fit_curve(rows, progress, log_before)
        local, local_cost = _fit_local(rows, contribution, curve, progress, log_before, log_after)
        if best is None or cost + local_cost < best[0]:
            best = (cost + local_cost, contribution, progress, curve, local)
    assert best is not None
    _, contribution, progress, curve, local = best

    here = progress[rows.round_index]
    expected = curve.log_loss(here, rows.ratio_start)
    standard = (log_before - expected) / spread(curve.learned(here))
    client_sd, before_sd = _split_variance(standard, rows.client)
    columns, width = Local.columns(
        curve,
        local.advance,
        local.least_spread,
        here,
        rows.dose * contribution.of(rows.rank),
        log_before,
        rows.ratio_start,
        rows.ratio,
    )
    after = log_before + columns @ np.array([local.level, local.change, local.deviation, local.cut])
    tests, quality = _fit_tests(rows, curve, progress)
    importance, notes = _fit_importance(rows, reference, log_before, quality)
    quality["loss_before"] = _quality("log", log_before, expected, 6)
    quality["loss_after"] = _quality("log", log_after, after, 6)
    if len(slopes) == 1:
        notes.append("one rank in the source: what rank does is not known and taken to be nothing")
    if not client_sd:
        notes.append("no client offset: the source does not tell clients apart")
    return SurrogateModel(
        source=_source(run, rows),
        seen=_seen(rows),
        first_dose=rows.first_dose,
        curve=curve,
        contribution=contribution,
        local=local,
        noise=Noise(
            client=client_sd, before=before_sd, after=float(np.sqrt(np.mean(((log_after - after) / width) ** 2)))
        ),
        tests=tests,
        importance=importance,
        quality=quality,
        notes=notes,
    )


def fit_text(model: SurrogateModel) -> str:
    """Residuals and notes as plain lines."""
    lines = [
        f"surrogate of {model.source.method} on {model.source.model}, run {model.source.config_hash[:12]}: "
        f"{model.source.clients} clients, {model.source.rounds} rounds",
        f"{'output':<20} {'scale':<8} {'RMSE':>8} {'R2':>7} {'rows':>6}",
    ]
    lines += [
        f"{name:<20} {one.scale:<8} {one.rmse:>8.4f} {one.r2:>7.3f} {one.rows:>6}"
        for name, one in sorted(model.quality.items())
    ]
    lines += [f"note: {note}" for note in model.notes]
    return "\n".join(lines)


def _progress(rows: SourceRows, contribution: Contribution) -> FloatArray:
    """Progress before each round and after the last, shape (R + 1,)."""
    rounds = len(rows.round_dose)
    counts = np.bincount(rows.round_index, minlength=rounds)
    sums = np.bincount(rows.round_index, rows.dose * contribution.of(rows.rank), minlength=rounds)
    steps = np.divide(sums, counts, out=np.zeros(rounds), where=counts > 0)
    return np.concatenate([[0.0], np.cumsum(steps)])


def _cost(residual: FloatArray, width: FloatArray) -> float:
    """Minus twice the log likelihood at the best standard deviation, without constants."""
    mean_square = float(np.mean((residual / width) ** 2)) + _LEAST_VARIANCE
    return len(residual) * float(np.log(mean_square)) + 2.0 * float(np.log(width).sum())


def _solve_rising(columns: FloatArray, values: FloatArray, noise: float) -> FloatArray:
    """`_solve` for level, progress, tail and damage, the last two pulled to zero as by a normal prior.

    Both grow with time, so a short run tells them apart badly: without the pull they come out huge, each making up for
    the other, and fail as soon as another controller prunes differently.

    Args:
        noise: standard deviation of `values`, against which the pull is weighed.
    """
    pull = np.diag([0.0, 0.0, noise / _TAIL_SD, noise / _DAMAGE_SD])[2:]
    return _solve(np.vstack([columns, pull]), np.append(values, [0.0, 0.0]), _RISING)


def _solve(columns: FloatArray, values: FloatArray, low: list[float]) -> FloatArray:
    """Least squares with lower bounds; a column of zeros gets zero."""
    live = np.any(columns != 0, axis=0)
    found = np.zeros(columns.shape[1])
    bounds = (np.array(low)[live], np.full(int(live.sum()), np.inf))
    found[live] = lsq_linear(columns[:, live], values, bounds=bounds, method="bvls").x
    return np.maximum(found, low)  # rounding may leave a bound by a hair


def _columns(learned: FloatArray, progress: FloatArray, ratio_term: FloatArray) -> FloatArray:
    """What level, progress, tail and damage multiply in a rising quantity, shape (N, 4)."""
    return np.stack([np.ones_like(learned), learned, learned * np.log1p(progress), ratio_term], axis=-1)


def _fit_curve(rows: SourceRows, progress: FloatArray, log_loss: FloatArray) -> tuple[Curve, float]:
    """The curve of the best compromise between clients' losses and tests, and the cost of the former.

    Clients of one round share that round's luck, so all of them together weigh as much as one evaluation.
    """
    here, reached, ratio = progress[rows.round_index], progress[rows.evaluated + 1], rows.ratio_start
    share = len(rows.round_dose) / len(log_loss)
    best: tuple[float, float, Curve] | None = None
    for half, power in itertools.product(progress[-1] * np.arange(1, _HALVES + 1) / _HALVES, _POWERS):
        shape = Curve(start=0.0, drop=0.0, tail=0.0, damage=0.0, half=float(half), power=power)
        learned = shape.learned(here)
        width = spread(learned)
        columns = _columns(learned, here, -(ratio**2)) * [1.0, -1.0, -1.0, -1.0]
        found = _solve_rising(columns / width[:, None], log_loss / width, _ROUND_NOISE / np.sqrt(share))
        cost = _cost(log_loss - columns @ found, width)
        tested = _columns(shape.learned(reached), reached, -rows.mean_square_ratio)
        missed = [wanted - tested @ _solve_rising(tested, wanted, _TEST_TOLERANCE) for _, _, wanted in _tested(rows)]
        total = share * cost + float(np.sum(np.square(missed))) / _TEST_TOLERANCE**2
        if best is None or total < best[0]:
            start, drop, tail, damage = map(float, found)
            curve = Curve(start=start, drop=drop, tail=tail, damage=damage, half=float(half), power=power)
            best = (total, cost, curve)
    assert best is not None
    return best[2], best[1]


def _fit_local(
    rows: SourceRows,
    contribution: Contribution,
    curve: Curve,
    progress: FloatArray,
    log_before: FloatArray,
    log_after: FloatArray,
) -> tuple[Local, float]:
    own = rows.dose * contribution.of(rows.rank)
    best: tuple[float, Local] | None = None
    for advance, least in itertools.product(_ADVANCES, _LEAST_SPREADS):
        columns, width = Local.columns(
            curve, advance, least, progress[rows.round_index], own, log_before, rows.ratio_start, rows.ratio
        )
        change = log_after - log_before
        found = _solve(columns / width[:, None], change / width, [-np.inf, 0.0, -np.inf, -np.inf])
        cost = _cost(change - columns @ found, width)
        if best is None or cost < best[0]:
            level, slope, deviation, cut = map(float, found)
            local = Local(advance=advance, least_spread=least, level=level, change=slope, deviation=deviation, cut=cut)
            best = (cost, local)
    assert best is not None
    return best[1], best[0]


def _split_variance(standard: FloatArray, client: np.ndarray) -> tuple[float, float]:
    """Standard deviations between clients and within a client, by moments, from clients with two rows or more."""
    counts = np.bincount(client)[client]
    means = (np.bincount(client, standard) / np.maximum(np.bincount(client), 1))[client]
    several = counts > 1
    total = float(np.mean(standard**2))
    spare = int(several.sum()) - len(np.unique(client[several]))
    if spare < 1:
        return 0.0, float(np.sqrt(total))
    within = min(total, float(((standard - means)[several] ** 2).sum()) / spare)
    return float(np.sqrt(total - within)), float(np.sqrt(within))


def _tested(rows: SourceRows) -> list[tuple[str, FloatArray, FloatArray]]:
    """Each tested quantity: name, values, and values on the scale on which they rise (minus log, or logit)."""

    def logit(values: FloatArray) -> FloatArray:
        inside = np.clip(values, _LEAST_PROBABILITY, 1.0 - _LEAST_PROBABILITY)
        return np.asarray(np.log(inside / (1.0 - inside)))

    return [
        ("loss", rows.loss, -np.log(np.maximum(rows.loss, _LEAST_LOSS))),
        ("accuracy", rows.accuracy, logit(rows.accuracy)),
        ("accuracy_consensus", rows.accuracy_consensus, logit(rows.accuracy_consensus)),
    ]


def _fit_tests(rows: SourceRows, curve: Curve, progress: FloatArray) -> tuple[PanelFits, dict[str, Quality]]:
    reached = progress[rows.evaluated + 1]
    columns = _columns(curve.learned(reached), reached, -rows.mean_square_ratio)
    fits, quality = {}, {}
    for name, values, wanted in _tested(rows):
        level, gain, tail, damage = map(float, _solve_rising(columns, wanted, _TEST_TOLERANCE))
        sign = -1.0 if name == "loss" else 1.0
        fits[name] = PanelFit(level=sign * level, progress=gain, tail=tail, damage=damage)
        risen = level + fits[name].gain(curve, reached, rows.mean_square_ratio)
        predicted = np.exp(-risen) if name == "loss" else 1.0 / (1.0 + np.exp(-risen))
        quality[name] = _quality("natural", values, predicted, 4)
    return PanelFits(**fits), quality


def _fit_importance(
    rows: SourceRows, reference: float, log_before: FloatArray, quality: dict[str, Quality]
) -> tuple[Importance | None, list[str]]:
    """Within rounds only: each round's importances are known up to one factor."""
    known = np.isfinite(rows.importance) & (rows.importance > _LEAST_IMPORTANCE)
    if known.sum() < 30:
        return None, ["no importance: the run's records do not hold it, so the reward goes without that term"]
    number = rows.round_index[known]
    counts = np.maximum(np.bincount(number), 1)

    def within(values: FloatArray) -> FloatArray:
        return np.asarray(values - (np.bincount(number, values) / counts)[number])

    columns = np.stack(
        [within(np.log2(rows.rank / reference)[known]), within(rows.ratio[known]), within(log_before[known])], axis=-1
    )
    values = within(np.log(rows.importance[known]))
    rank, ratio, loss = np.linalg.lstsq(columns, values, rcond=None)[0]
    predicted = columns @ np.array([rank, ratio, loss])
    quality["lora_importance"] = _quality("log", values, predicted, 3 + len(np.unique(number)))
    noise = float(np.std(values - predicted))
    return Importance(rank=float(rank), ratio=float(ratio), loss=float(loss), noise=noise), []


def _quality(scale: Any, values: FloatArray, predicted: FloatArray, coefficients: int) -> Quality:
    residual = float(((values - predicted) ** 2).sum())
    total = float(((values - values.mean()) ** 2).sum())
    spare = max(1, len(values) - coefficients)
    r2 = 1.0 - residual / total if total > _LEAST_VARIANCE * len(values) else 0.0
    return Quality(scale=scale, rmse=float(np.sqrt(residual / spare)), r2=r2, rows=len(values))


def _source(run: Run, rows: SourceRows) -> Source:
    manifest = run.manifest
    model, data, fleet = (manifest.get(part) or {} for part in ("model", "data", "fleet"))
    return Source(
        config_hash=str(manifest["config_hash"]),
        method=run.method,
        prunes=method_named(run.method).prunes and bool(rows.ratio.max() > 0),
        model=rows.config.model.name,
        model_sha256=model.get("sha256"),
        data=str(data.get("name")),
        data_sha256=data.get("sha256"),
        clients=int(fleet.get("clients", 0)),
        rounds=len(run.rounds),
        settings={key: setting(rows.config, key) for key in DEPENDS_ON},
    )


def _seen(rows: SourceRows) -> Seen:
    def span(values: Any, least: float = -np.inf) -> list[float]:
        kept = np.maximum(np.asarray(values, dtype=np.float64), least)
        return [float(kept.min()), float(kept.max())]

    return Seen(
        ratio=[0.0, float(rows.ratio.max())],
        rank=span(rows.rank),
        participants=span(rows.participants),
        dose=[0.0, float(rows.round_dose.sum())],
        loss_before=span(rows.loss_before, _LEAST_LOSS),
        loss_after=span(rows.loss_after, _LEAST_LOSS),
    )
