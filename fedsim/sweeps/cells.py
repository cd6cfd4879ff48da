"""From a configuration, a grid and seeds to the cells of a sweep; nothing is run, and what is not allowed is refused.

A *sweep file* is a configuration file with any of four more keys at its top:

* ``config``: the configuration it differs from, a file beside it or a preset;
* ``grid``: lists of values by key (``control.exploration: [0.1, 0.2]``), all combinations;
* ``cases``: a list of settings that belong together (``- {method: fedlora}``), crossed with the grid;
* ``seeds``: ``0-4``, or a list.

Its other keys are laid over ``config``. ``tiny.yaml`` beside it has the same form and is laid over both: its ``grid``
replaces values key by key (null takes a key out), its ``cases`` and ``seeds`` as a whole. The command line comes last.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fedsim.errors import ConfigError, nearest
from fedsim.runner.config import (
    build_config,
    config_hash,
    dotted,
    find_config,
    parse_overrides,
    read_tree,
    value_text,
)
from fedsim.settings import Config

TINY = "tiny.yaml"
SWEEP_KEYS = ("config", "grid", "cases", "seeds")
LARGEST = 100_000
_SHOWN = 10
"""Reasons of a refusal that are shown."""
_NAMED = 3
"""Combinations named for each."""
_HASH_DIGITS = 12

Values = Mapping[str, Any]
Grid = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        index: its place in the table, from 0.
        overrides: the dotted keys of grid and case that tell it from other cells, the seed aside.
        directory: name of its run directory: method, seed, and the beginning of the configuration's hash.
    """

    index: int
    overrides: Values
    config: Config = field(repr=False)
    config_hash: str
    directory: str

    @property
    def label(self) -> str:
        """Such as ``method=fedspine, seed=0``."""
        return _label({**self.overrides, "seed": self.config.seed})

    @property
    def combination(self) -> str:
        """The label without the seed; empty where nothing but the seed varies."""
        return _label(self.overrides)


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep runs.

    Attributes:
        name: stem of the default output folder.
        keys: columns of the table of cells, the seed aside.
        notes: what the reader should know before it starts.
    """

    name: str
    keys: tuple[str, ...]
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()

    def combinations(self) -> list[Cell]:
        """The first cell of each combination of overrides: whether a cell is allowed never hangs on its seed."""
        first: dict[str, Cell] = {}
        for cell in self.cells:
            first.setdefault(repr(sorted(cell.overrides.items())), cell)
        return list(first.values())


@dataclass(frozen=True)
class _Layers:
    """A sweep as read: the lowest configuration, what is laid over it, and what varies."""

    name: str
    base: Values
    over: Values
    grid: Mapping[str, Any]
    cases: Any
    seeds: Any


def parse_grid(items: Sequence[str]) -> dict[str, list[Any]]:
    """``["method=a,b", "reward.weights=[1,0,0],[1,1,1]"]`` to lists of YAML-typed values by dotted key.

    Raises:
        ConfigError: not of that form, no value, or a key given twice.
    """
    grid: dict[str, list[Any]] = {}
    for item in items:
        key, separator, text = item.partition("=")
        key = key.strip()
        if not separator or not key:
            raise ConfigError(f"--grid '{item}' is not of the form key=v1,v2, such as train.local_steps=10,20")
        if key in grid:
            raise ConfigError(f"--grid: key '{key}' is given twice; give all its values at once ({key}=v1,v2)")
        try:
            grid[key] = list(parse_overrides([f"{key}=[{text}]"])[key] or [])
        except ConfigError as error:
            if re.search(r"(^|,)\s*,", text):
                raise ConfigError(
                    f"--grid {key}: a value of '{text}' is empty (before a comma; null stands for none)"
                ) from error
            raise
        if not grid[key]:
            raise ConfigError(f"--grid {key}: no value given (at least one, separated by commas)")
    return grid


def parse_seeds(seeds: Any) -> tuple[int, ...]:
    """Seeds from ``"0-4"``, ``"0,2,5-7"``, an integer or a list of these.

    Raises:
        ConfigError: not a seed or range of seeds, none at all, or one twice.
    """
    parts = list(seeds) if isinstance(seeds, (list, tuple, range)) else str(seeds).split(",")
    found: list[int] = []
    for part in parts:
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", "" if isinstance(part, bool) else str(part))
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not low <= high < 2**64 or high - low >= LARGEST:
            raise ConfigError(
                f"seeds: value {part!r} is not allowed (integers at least 0, as a range 0-4 or a list 0,2,5)"
            )
        found += range(low, high + 1)
    twice = next((seed for seed, count in Counter(found).items() if count > 1), None)
    if twice is not None:
        raise ConfigError(f"seeds: {twice} is given twice in {seeds!r}; each seed is allowed once")
    if not found:
        raise ConfigError("seeds: the list is empty (give at least one, such as 0-4)")
    return tuple(found)


def plan_sweep(
    config: str | Path | Mapping[str, Any],
    *,
    grid: Grid | None = None,
    seeds: Any = None,
    overrides: Values | None = None,
    tiny: bool = False,
) -> SweepPlan:
    """The cells of a sweep: cases, then the grid's combinations, then seeds, the last varying fastest.

    Args:
        config: a configuration or sweep file, a preset, or a mapping of the same form.
        grid: lists of values by dotted key; replaces the sweep file's list for the same key.
        seeds: see `parse_seeds`; default: the sweep file's, else the configuration's own seed.
        overrides: dotted keys set in every cell.
        tiny: lay ``tiny.yaml``, which must stand beside the file, over it.
    Raises:
        ConfigError: an unknown key (nearest name suggested), an empty grid, or combinations that are not allowed, with
            the reason for each.
    """
    layers = _read(config, tiny)
    over = {**layers.over, **(overrides or {})}
    values = {key: _listed(key, many) for key, many in {**layers.grid, **(grid or {})}.items() if many is not None}
    cases = _cases(layers.cases)
    case_keys = list(dict.fromkeys(key for case in cases for key in case))
    for where, given in (("grid", list(values)), ("cases", case_keys), ("sweep", list(over))):
        _check_keys(where, given)
    varied = [*values, *case_keys]
    for key in overrides or {}:
        if key in varied:
            raise ConfigError(f"{key}: given for every cell and varied by the sweep; give one of them")
    repeated = next((key for key in varied if varied.count(key) > 1), None)
    if repeated:
        raise ConfigError(f"{repeated}: varied by both grid and cases; give one of them")
    wanted = layers.seeds if seeds is None else seeds
    if wanted is not None and "seed" in varied:
        raise ConfigError("seed: varied by the grid and by seeds; give one of them")
    if wanted is None and not values and not any(cases):
        raise ConfigError("the sweep's grid is empty: give --grid key=v1,v2 (or grid: in the file), or --seeds 0-4")
    numbers = None if wanted is None else parse_seeds(wanted)
    combinations = [dict(zip(values, chosen, strict=True)) for chosen in _product(values, len(cases), numbers)]
    settings = [{**case, **chosen} for case in cases for chosen in combinations]
    cells, notes = _cells(layers.base, over, settings, numbers)
    keys = tuple(dict.fromkeys(key for cell in cells for key in cell.overrides))
    return SweepPlan(f"{layers.name}-tiny" if tiny else layers.name, keys, cells, notes)


def _product(values: Grid, cases: int, seeds: Sequence[int] | None) -> Iterator[tuple[Any, ...]]:
    count = cases * len(seeds or (0,))
    for many in values.values():
        count *= len(many)
    if count > LARGEST:
        raise ConfigError(f"the sweep has {count:,} cells; at most {LARGEST:,} are allowed")
    return itertools.product(*values.values())


def _read(config: str | Path | Mapping[str, Any], tiny: bool) -> _Layers:
    if isinstance(config, Mapping):
        if tiny:
            raise ConfigError(f"--tiny: a mapping has no {TINY} beside it; give a file")
        path, tree = None, dict(config)
    else:
        path = find_config(config)
        tree = read_tree(path)
    own = {key: tree.pop(key, None) for key in SWEEP_KEYS}
    name = "sweep"
    if path is not None:  # a study is a folder; other files' runs may lie in runs/STEM already
        name = path.resolve().parent.name if path.stem in ("sweep", "base") else f"{path.stem}-sweep"
    base, over, folders = tree, {}, [path.parent] if path else []
    if own["config"] is not None:
        beside = path.parent / str(own["config"]) if path else None
        found = beside if beside is not None and beside.is_file() else find_config(str(own["config"]))
        base, over = read_tree(found), dotted(tree)
        nested = [key for key in SWEEP_KEYS if key in base]
        if nested:
            raise ConfigError(f"config: '{found}' is itself a sweep file (it has {nested[0]}); give a configuration")
        folders.append(found.parent)
    grid = _grid_section(own["grid"])
    if tiny:
        file = next((folder / TINY for folder in folders if (folder / TINY).is_file()), None)
        if file is None:
            raise ConfigError(f"--tiny: there is no {TINY} beside '{path}'")
        small = read_tree(file)
        if "config" in small:
            raise ConfigError(f"'{file}': key 'config' is not allowed here (it is laid over the sweep's own)")
        grid |= _grid_section(small.pop("grid", None))
        own |= {key: small.pop(key) for key in ("cases", "seeds") if key in small}
        over |= dotted(small)
    return _Layers(name, base, over, grid, own["cases"], own["seeds"])


def _grid_section(section: Any) -> dict[str, Any]:
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"grid: value {section!r} is not allowed (it should be lists of values by key)")
    return dotted(section)


def _listed(key: str, many: Any) -> list[Any]:
    values = list(many) if isinstance(many, (list, tuple, range)) else [many]
    if not values:
        raise ConfigError(f"grid {key}: the list is empty (at least one value)")
    for place, value in enumerate(values):
        if any(value == other and type(value) is type(other) for other in values[:place]):
            raise ConfigError(f"grid {key}: value {value!r} is given twice; each value is allowed once")
    return values


def _cases(cases: Any) -> list[dict[str, Any]]:
    if cases is None:
        return [{}]
    if not isinstance(cases, (list, tuple)) or not all(isinstance(case, Mapping) for case in cases):
        raise ConfigError(f"cases: value {cases!r} is not allowed (it should be a list of settings)")
    if not cases:
        raise ConfigError("cases: the list is empty (at least one case)")
    return [dotted(case) for case in cases]


def _check_keys(where: str, keys: Sequence[str]) -> None:
    sections: dict[str, list[str]] = {}
    for name, item in Config.model_fields.items():
        inner = item.annotation
        is_section = isinstance(inner, type) and issubclass(inner, BaseModel)
        sections[name] = _keys_of(name, inner) if is_section else []  # type: ignore[arg-type]
    allowed = [key for name, inside in sections.items() for key in inside or [name]]
    for key in keys:
        if key in allowed:
            continue
        if key in sections:
            raise ConfigError(f"{where}: '{key}' is a section, not a key; give one of {', '.join(sections[key])}")
        raise ConfigError(f"{where}: unknown key '{key}'{_nearest_key(key, allowed)}")


def _keys_of(section: str, model: type[BaseModel]) -> list[str]:
    """Dotted keys of a section, and of those inside it."""
    keys = []
    for key, item in model.model_fields.items():
        inner = item.annotation
        is_section = isinstance(inner, type) and issubclass(inner, BaseModel)
        keys += _keys_of(f"{section}.{key}", inner) if is_section else [f"{section}.{key}"]  # type: ignore[arg-type]
    return keys


def _nearest_key(key: str, allowed: Sequence[str]) -> str:
    leaves = [name for name in allowed if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return f"; did you mean '{leaves[0]}'?" if len(leaves) == 1 else nearest(key, allowed)


def _cells(
    base: Values, over: Values, settings: Sequence[Values], seeds: Sequence[int] | None
) -> tuple[tuple[Cell, ...], tuple[str, ...]]:
    """Every allowed cell; refuses the sweep where one is not. The same run asked for twice stands once."""
    cells: list[Cell] = []
    by_hash: dict[str, Cell] = {}
    faults, notes = [], []
    for chosen in settings:
        seeded = {} if seeds is None else {"seed": seeds[0]}
        try:
            first = build_config(base, {**over, **chosen, **seeded})
        except ConfigError as error:
            faults.append((_label(chosen), str(error)))
            continue
        for seed in (first.seed,) if seeds is None else seeds:
            config = first.model_copy(update={"seed": seed})
            digest = config_hash(config)
            folder = f"{config.method}-seed{seed}-{digest[:_HASH_DIGITS]}"
            told = {key: value for key, value in chosen.items() if key != "seed"}
            cell = Cell(len(cells), told, config, digest, folder)
            twin = by_hash.setdefault(digest, cell)
            if twin is cell:
                cells.append(cell)
            else:
                notes.append(f"'{cell.label}' is the same run as cell {twin.index} ('{twin.label}') and is left out")
    refuse(faults, len(settings))
    return tuple(cells), tuple(notes)


def refuse(faults: Sequence[tuple[str, str]], combinations: int) -> None:
    """Raise `ConfigError` on the combinations (label, reason) that are not allowed; nothing where there is none.

    A reason stands once, with the combinations that it concerns.
    """
    if not faults:
        return
    if combinations == 1:
        raise ConfigError(faults[0][1])
    by_reason: dict[str, list[str]] = {}
    for label, reason in faults:
        by_reason.setdefault(reason, []).append(label or "every cell")
    lines = []
    for reason, labels in list(by_reason.items())[:_SHOWN]:
        more = f"; and {len(labels) - _NAMED} more" if len(labels) > _NAMED else ""
        lines.append(f"  {'; '.join(labels[:_NAMED])}{more}: {reason}")
    if len(by_reason) > _SHOWN:
        lines.append(f"  and {len(by_reason) - _SHOWN} more reasons")
    count = len({label for label, _ in faults})
    raise ConfigError(
        f"{count} of {combinations} combinations of the sweep are not allowed; nothing was run\n" + "\n".join(lines)
    )


def _label(values: Values) -> str:
    return ", ".join(f"{key}={value_text(value)}" for key, value in values.items())
