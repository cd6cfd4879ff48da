"""Every column of a run's records, declared once: type, unit and meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from fedsim.contracts.common import OUTCOME_LABELS

DType = Literal["int64", "float64", "string"]


@dataclass(frozen=True)
class Column:
    """One column: its type, unit ("" for none) and meaning."""

    name: str
    dtype: DType
    unit: str
    meaning: str


ROUNDS = (
    Column("round", "int64", "", "round, from 0"),
    Column("start_s", "float64", "s", "simulated time at which the round opened"),
    Column("end_s", "float64", "s", "simulated time at which the round closed"),
    Column("duration_s", "float64", "s", "end_s - start_s"),
    Column("idle_fraction", "float64", "", "sum of idle_s / sum of durations, over participants; null without any"),
    Column("participants", "int64", "clients", "clients dispatched"),
    Column("dropped", "int64", "clients", "clients dispatched whose outcome is not ok"),
    Column("bytes_down", "float64", "bytes", "received by all clients, also by work cut short"),
    Column("bytes_up", "float64", "bytes", "sent by all clients, also by work cut short"),
    Column("energy_j", "float64", "J", "spent by all clients from the opening to the close of the round"),
    Column("prune_ratio_mean", "float64", "", "mean of prune_ratio over this round's participants"),
    Column("lora_rank_mean", "float64", "", "mean of lora_rank over this round's participants"),
    Column(
        "accuracy",
        "float64",
        "",
        "test accuracy after aggregation (causal_lm: of response tokens), mean over the panel; null between",
    ),
    Column(
        "loss",
        "float64",
        "",
        "test loss after aggregation, mean over the panel; null between (causal_lm: perplexity is its exponential)",
    ),
    Column("accuracy_consensus", "float64", "", "test accuracy of one model cut to the fleet-mean ratio; null between"),
    Column("host_s", "float64", "s", "time this computer took (never part of simulated time; differs between runs)"),
)

CLIENT_ROUNDS = (
    Column("round", "int64", "", "round, from 0"),
    Column("flight", "int64", "", "how many times this client was sent off before"),
    Column("client", "int64", "", "client, from 0"),
    Column("version", "int64", "", "merges that the global state it was sent had seen"),
    Column("staleness", "int64", "", "merges between its dispatch and its own: the version merged into - version"),
    Column("dispatch_s", "float64", "s", "simulated time at which it was sent off"),
    Column("device", "string", "", "device class"),
    Column("mode", "string", "", "power mode in this round"),
    Column("ratio_before", "float64", "", "the ratio last asked of this client before"),
    Column("prune_ratio", "float64", "", "removed / all prunable weights, achieved after the round"),
    Column("prune_ratio_target", "float64", "", "the same, as asked for this round"),
    Column("lora_rank", "int64", "", "LoRA rank in this round"),
    Column("local_steps", "int64", "", "local steps of the job"),
    Column("wait_s", "float64", "s", "from the opening of the round to the start of download"),
    Column("download_s", "float64", "s", "download"),
    Column("compute_s", "float64", "s", "local tuning, importance and pruning"),
    Column("upload_s", "float64", "s", "upload"),
    Column("idle_s", "float64", "s", "from the client's last activity to the close of the round"),
    Column("bytes_down", "float64", "bytes", "received, also by work cut short"),
    Column("bytes_up", "float64", "bytes", "sent, also by work cut short"),
    Column("energy_j", "float64", "J", "spent from the opening to the close of the round"),
    Column("peak_memory_bytes", "float64", "bytes", "highest memory use that the job asks for"),
    Column("outcome", "string", "", f"one of {', '.join(OUTCOME_LABELS)}"),
    Column("loss_before", "float64", "", "loss on the client's fixed probe batch before the job; null if not trained"),
    Column("loss_after", "float64", "", "the same after the job; null if not trained"),
    Column(
        "lora_importance",
        "float64",
        "",
        "mean absolute value of B * grad B over the client's LoRA; null if not trained",
    ),
    Column("reward_loss", "float64", "", "the reward's term of loss reduction, in [0, 1]; null if out of use"),
    Column("reward_progress", "float64", "", "the reward's term of pruning progress, in [0, 1]; null if out of use"),
    Column("reward_importance", "float64", "", "the reward's term of LoRA importance, in [0, 1]; null if out of use"),
    Column("reward_time", "float64", "", "the reward's factor for time, in (0, 1]; null if out of use"),
    Column("reward", "float64", "", "the bandit's reward, in [0, 1]; null if nothing arrived"),
)

EVENTS = (
    Column("time_s", "float64", "s", "simulated time"),
    Column("round", "int64", "", "round, from 0"),
    Column("client", "int64", "", "client, from 0; -1 is the server"),
    Column("event", "string", "", "what changed"),
    Column("value", "float64", "by event", "what the event carries: bytes, seconds, a count"),
)

TABLES: dict[str, tuple[Column, ...]] = {"rounds": ROUNDS, "client_rounds": CLIENT_ROUNDS, "events": EVENTS}
"""Every table of a run, by the name of its file without ``.parquet``."""

_DICTIONARY = frozenset({"round", "flight", "version", "staleness", "dispatch_s", "lora_rank", "local_steps"})
"""Numbers of few kinds, which are stored by code as strings are; for others the attempt only takes time."""

_ARROW = {"int64": pa.int64(), "float64": pa.float64(), "string": pa.string()}


def _schema(columns: Sequence[Column]) -> pa.Schema:
    return pa.schema(
        [
            pa.field(column.name, _ARROW[column.dtype], metadata={"unit": column.unit, "meaning": column.meaning})
            for column in columns
        ]
    )


_SCHEMAS = {table: _schema(columns) for table, columns in TABLES.items()}


def add_column(table: str, column: Column) -> None:
    """Put a column behind those of a table (`fedsim.records.own_columns`)."""
    TABLES[table] = (*TABLES[table], column)
    _SCHEMAS[table] = _schema(TABLES[table])


def remove_column(table: str, name: str) -> None:
    """Take a column away."""
    TABLES[table] = tuple(column for column in TABLES[table] if column.name != name)
    _SCHEMAS[table] = _schema(TABLES[table])


def schema_of(table: str) -> pa.Schema:
    """Arrow schema of a table; each field's metadata carries unit and meaning into the file."""
    return _SCHEMAS[table]


def glossary_markdown() -> str:
    """All columns as Markdown tables, for the README."""
    lines: list[str] = []
    for table, columns in TABLES.items():
        lines += [f"`{table}.parquet`", "", "| column | type | unit | meaning |", "|---|---|---|---|"]
        lines += [f"| `{column.name}` | {column.dtype} | {column.unit} | {column.meaning} |" for column in columns]
        lines.append("")
    return "\n".join(lines)


def columns_by_code(table: str) -> list[str]:
    """Columns of few kinds of values, which are stored by code."""
    return [column.name for column in TABLES[table] if column.dtype == "string" or column.name in _DICTIONARY]
