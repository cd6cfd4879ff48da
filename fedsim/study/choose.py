"""Choosing among runs by their settings: the part of a sweep that belongs in one table."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.errors import ConfigError, RunError, unknown
from fedsim.records.reader import Run
from fedsim.runner.config import dotted, parse_overrides, value_text

SHOWN = 5


def choose_runs(runs: Sequence[Run], where: Sequence[str]) -> list[Run]:
    """The runs that meet every condition, in their order.

    Args:
        where: conditions ``KEY=VALUE`` or ``KEY=VALUE,VALUE``, such as ``fleet.name=fedspine-80``: a key of the
            resolved configuration and the values that it may have.
    Raises:
        ConfigError: a condition that cannot be read, or a key that no run has.
        RunError: no run meets them.
    """
    left = list(runs)
    for condition in where:
        key, equals, text = condition.partition("=")
        if not (key and equals and text):
            raise ConfigError(f"--where: value {condition!r} is not allowed (KEY=VALUE, or KEY=VALUE,VALUE)")
        settings = [{name: value_text(value) for name, value in dotted(run.config).items()} for run in left]
        if not any(key in own for own in settings):
            raise ConfigError(f"--where: {unknown('key', key, {name for own in settings for name in own})}")
        wanted = _values(key, text)
        found = [run for run, own in zip(left, settings, strict=True) if own.get(key) in wanted]
        if not found:
            there = sorted({own[key] for own in settings if key in own})
            more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
            raise RunError(f"--where {condition}: no run has it; there are {', '.join(there[:SHOWN])}{more}")
        left = found
    return left


def whole_runs(runs: Sequence[Run], damaged: list[str]) -> list[Run]:
    """The runs whose tables can be read; each of the others adds a sentence to `damaged`.

    Raises:
        RunError: none can be read.
    """
    whole = []
    for run in runs:
        try:
            _ = run.rounds
            if run.has("client_rounds"):
                _ = run.client_rounds
            whole.append(run)
        except RunError as error:
            if len(runs) == 1:
                raise
            damaged.append(f"run '{run.path}' is left out: {error}")
    if not whole and damaged:
        raise RunError(damaged[0])
    return whole


def _values(key: str, text: str) -> set[str]:
    """As the configuration writes them: 1e-3 is 0.001. A list stands as a whole."""
    parts = [text] if text.startswith("[") else text.split(",")
    return {value_text(parse_overrides([f"{key}={part}"])[key]) for part in parts}
