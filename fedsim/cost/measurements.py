"""What others measured: rows of ``device_profiles/measurements/*.csv``, or of a log of somebody's own.

One row is one number under one set of conditions. The columns, of which a log may leave out all but `quantity`,
`value`, `unit` and the conditions that its quantity needs:

* `id`, `device` (a profile's name), `mode` (empty: the fastest), `source`, `conditions`, `licence`;
* the step: `model`, `tuning`, `top_layers`, `rank`, `targets` (roles, joined by ``+``), `adapter_width`, `batch`,
  `seq_len`, `micro_batches`, `precision`, `optimizer`, `flags` (``cached``, ``checkpointing``, ``dropout``, joined by
  ``+``), `prune_ratio`, `labels` (0: a language model);
* `quantity`, `value`, `unit`: see `QUANTITIES`;
* `relative_to`: the id of another row, where `value` is a ratio of this row's quantity to that row's;
* `weight`: ``context`` for a row that is shown and not counted, with the reason in `conditions`.
"""

from __future__ import annotations

import csv
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from fedsim.cost.setting import Precision, StepSetting
from fedsim.cost.shapes import load_shape
from fedsim.errors import DataError, FedsimError, nearest
from fedsim.resources import resource_folder
from fedsim.structure import ModelShape

QUANTITIES = {
    "step_time": {"s": 1.0, "ms": 1e-3},
    "peak_memory": {"GB": 1e9, "MB": 1e6, "B": 1.0},
    "busy_power": {"W": 1.0},
    "idle_power": {"W": 1.0},
    "upload": {"MB": 1e6, "B": 1.0},
    "product_rate": {"GFLOP/s": 1e9},
    "stream_rate": {"GB/s": 1e9},
}
"""Quantity -> unit -> factor to SI. A ratio has unit ``1``."""
OF_A_STEP = ("step_time", "peak_memory", "upload")
FLAGS = {"cached": "cached_activations", "checkpointing": "checkpointing", "no_dropout": "dropout"}
BARE = "bare"
"""Flag of a memory without framework and context."""


@dataclass(frozen=True)
class Measurement:
    """One measured number.

    Attributes:
        where: file and line, for messages.
        value: in SI units, > 0 (a ratio where `relative_to` is set).
        shape, setting, rank, prune_ratio: of the step; None (and 0) for power at rest.
        precision: of the step, or of a product's rate.
        bare: of a memory without framework and context.
        counted: False for a row that is shown only.
    """

    id: str
    where: str
    device: str
    mode: str | None
    quantity: str
    value: float
    model: str
    shape: ModelShape | None
    setting: StepSetting | None
    rank: int
    prune_ratio: float
    relative_to: str | None
    precision: Precision
    bare: bool
    counted: bool
    source: str
    conditions: str
    licence: str

    def label(self) -> str:
        """Such as "bert-base full top 4, 4 x 256"."""
        if self.setting is None:
            plain = self.quantity.replace("_", " ")
            return f"{plain}, {self.precision}" if self.quantity == "product_rate" else plain
        one = self.setting
        top = f" top {one.train_top_layers}" if one.train_top_layers is not None else ""
        more = [name for name, field in FLAGS.items() if getattr(one, field) == (name != "no_dropout")]
        batches = f"{one.micro_batches} x " if one.micro_batches > 1 else ""
        pruned = f" pruned {self.prune_ratio:.2f}" if self.prune_ratio else ""
        parts = [f"{self.model} {one.tuning}{top}{pruned}", *more, f"{batches}{one.batch_size} x {one.seq_len}"]
        return ", ".join([*parts, one.precision] if one.precision != "fp32" else parts)


_COLUMNS = (
    "id device mode model tuning top_layers rank targets adapter_width batch seq_len micro_batches precision optimizer "
    "flags prune_ratio labels quantity value unit relative_to weight source conditions licence"
).split()


def built_in_measurements() -> list[Measurement]:
    """Every measurement that travels with the package, in the order of files and lines."""
    rows = []
    for path in sorted((resource_folder("device_profiles") / "measurements").glob("*.csv")):
        rows += read_measurements(path)
    return rows


def read_measurements(path: Path, device: str | None = None, strict: bool = True) -> list[Measurement]:
    """Rows of a file.

    Args:
        device: name of the profile for rows that name none; None: a row must name one.
        strict: source and licence are needed (they are not in a log of one's own).
    Raises:
        DataError: naming file, line, column, value and what is allowed.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"log '{path}' cannot be read ({error})") from error
    table = csv.DictReader(lines)
    for name in table.fieldnames or ():
        if name not in _COLUMNS:
            raise DataError(f"log '{path}': '{name}' is not a known column{nearest(name, _COLUMNS)}")
    for name in ("quantity", "value", "unit"):
        if name not in (table.fieldnames or ()):
            raise DataError(f"log '{path}' has no column '{name}' (needed: quantity, value, unit and the conditions)")
    rows = [
        _measurement(f"{path.name} row {number}", {k: (v or "").strip() for k, v in row.items()}, device, strict)
        for number, row in enumerate(table, start=1)
    ]
    if not rows:
        raise DataError(f"log '{path}' has no rows")
    seen: set[str] = set()
    for one in rows:
        if one.id in seen:
            raise DataError(f"log '{path}': two rows have the id '{one.id}'")
        seen.add(one.id)
    return rows


def _measurement(where: str, row: Mapping[str, str], device: str | None, strict: bool) -> Measurement:
    def text(name: str, default: str = "") -> str:
        return row.get(name) or default

    def number(name: str, default: int | None = None) -> int | None:
        if not text(name):
            return default
        try:
            return int(text(name))
        except ValueError as error:
            raise DataError(f"{where}: {name} is '{text(name)}'; it must be a whole number") from error

    quantity = text("quantity")
    if quantity not in QUANTITIES:
        raise DataError(f"{where}: quantity is '{quantity}'{nearest(quantity, QUANTITIES)} ({_allowed(QUANTITIES)})")
    units = {"1": 1.0} if text("relative_to") else QUANTITIES[quantity]
    if text("unit") not in units:
        raise DataError(f"{where}: unit of {quantity} is '{text('unit')}' ({_allowed(units)})")
    try:
        value = float(text("value")) * units[text("unit")]
    except ValueError as error:
        raise DataError(f"{where}: value is '{text('value')}'; it must be a number") from error
    if not 0 < value < float("inf"):
        raise DataError(f"{where}: value is '{text('value')}'; it must be positive and finite")
    named = text("device", device or "")
    if not named:
        raise DataError(f"{where} names no device, and no --profile was given")
    for name in ("conditions", "source", "licence") if strict else ():
        if not text(name):
            raise DataError(f"{where}: {name} is empty; a measurement must say it")
    shape = setting = None
    if quantity in OF_A_STEP or text("model"):
        missing = [name for name in ("model", "tuning", "batch", "seq_len") if not text(name)]
        if missing and quantity in OF_A_STEP:
            raise DataError(f"{where}: a {quantity} without conditions: {', '.join(missing)} must be given")
        if not missing:
            try:
                shape = load_shape(text("model"), labels=number("labels", 2) or 0)
                setting = StepSetting(**_setting(where, text, number))
            except FedsimError as error:
                raise DataError(f"{where}: {error}") from error
    try:
        ratio = float(text("prune_ratio", "0"))
    except ValueError as error:
        raise DataError(f"{where}: prune_ratio is '{text('prune_ratio')}'; it must be a number") from error
    return Measurement(
        id=text("id", where.replace(" ", "-")),
        where=where,
        device=named,
        mode=text("mode") or None,
        quantity=quantity,
        value=value,
        model=text("model"),
        shape=shape,
        setting=setting,
        rank=number("rank", 8) or 8,
        prune_ratio=ratio,
        relative_to=text("relative_to") or None,
        precision=_precision(where, text("precision", "fp32")),
        bare=BARE in text("flags").split("+"),
        counted=text("weight") != "context",
        source=text("source"),
        conditions=text("conditions"),
        licence=text("licence"),
    )


def _setting(where: str, text: Any, number: Any) -> dict[str, Any]:
    flags = [flag for flag in text("flags").split("+") if flag and flag != BARE]
    for flag in flags:
        if flag not in FLAGS:
            raise DataError(f"{where}: flag '{flag}' is not known{nearest(flag, FLAGS)} ({_allowed(FLAGS)})")
    targets = text("targets")
    return {
        "batch_size": number("batch"),
        "seq_len": number("seq_len"),
        "precision": text("precision", "fp32"),
        "tuning": text("tuning"),
        "train_top_layers": number("top_layers"),
        "lora_roles": frozenset(targets.split("+")) if targets else None,
        "micro_batches": number("micro_batches", 1),
        "adapter_width": number("adapter_width"),
        "optimizer": text("optimizer", "fused"),
        **{FLAGS[flag]: flag != "no_dropout" for flag in flags},
    }


def _precision(where: str, name: str) -> Precision:
    if name not in get_args(Precision):
        raise DataError(f"{where}: precision is '{name}' ({_allowed(get_args(Precision))})")
    return cast(Precision, name)


def _allowed(options: Iterable[str]) -> str:
    return f"allowed: {', '.join(options)}"


def matching(rows: Sequence[Measurement], patterns: Sequence[str]) -> list[Measurement]:
    """The rows whose ids one of the patterns names (``*`` stands for any characters)."""
    return [row for row in rows if any(fnmatch.fnmatchcase(row.id, pattern) for pattern in patterns)]
