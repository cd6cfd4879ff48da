"""Columns of a user's own, beside those of `fedsim.records.columns`: recorded from the next run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import ArrayLike

from fedsim.contracts.flights import Arrivals, Learned
from fedsim.errors import ConfigError
from fedsim.records.columns import TABLES, Column, DType, add_column, remove_column

Value = Callable[[Arrivals, Learned], ArrayLike]
"""Gives a column's values at a merge: one for ``rounds``, shape (F,) for ``client_rounds``. NaN is stored as null."""

_WITH_VALUES = ("rounds", "client_rounds")


@dataclass(frozen=True)
class OwnColumn:
    """A registered column: where it stands, and what gives its values."""

    table: str
    column: Column
    value: Value


OWN_COLUMNS: dict[tuple[str, str], OwnColumn] = {}
"""By table and name."""


def register_column(table: str, name: str, value: Value, *, dtype: DType = "float64", unit: str, meaning: str) -> None:
    """Record a column of your own. Runs that lack it read as null.

    Args:
        table: ``rounds`` or ``client_rounds``.
        value: called at every merge with what arrived and what was learned.
        unit: such as ``s``, ``bytes`` or ``J``; empty for none.
        meaning: one line for whoever reads the file.
    Raises:
        ConfigError: no such table or type, no meaning, or a name that the table has.
    """
    if table not in _WITH_VALUES:
        raise ConfigError(f"register_column: table '{table}' is not allowed ({' or '.join(_WITH_VALUES)})")
    if dtype not in ("int64", "float64", "string"):
        raise ConfigError(f"register_column: dtype '{dtype}' is not allowed (int64, float64 or string)")
    if not name.isidentifier() or not meaning.strip():
        raise ConfigError(f"register_column: '{name}' needs a name that is an identifier, and a meaning")
    if name in [column.name for column in TABLES[table]]:
        raise ConfigError(f"register_column: table '{table}' has a column '{name}' already")
    column = Column(name, dtype, unit, meaning)
    add_column(table, column)
    OWN_COLUMNS[table, name] = OwnColumn(table, column, value)


def forget_column(table: str, name: str) -> None:
    """Take a registered column away again."""
    del OWN_COLUMNS[table, name]
    remove_column(table, name)


def own_values(table: str, arrivals: Arrivals, learned: Learned) -> dict[str, Any]:
    """Values of the registered columns of a table, by name."""
    values: dict[str, Any] = {}
    for own in OWN_COLUMNS.values():
        if own.table == table:
            given = own.value(arrivals, learned)
            values[own.column.name] = [given] if table == "rounds" else _of_flights(own, given, len(arrivals))
    return values


def _of_flights(own: OwnColumn, given: ArrayLike, flights: int) -> Sequence[Any] | ArrayLike:
    try:
        count = len(given)  # type: ignore[arg-type]
    except TypeError:
        count = -1
    if count != flights:
        raise ConfigError(
            f"column '{own.column.name}' gave {'one value' if count < 0 else f'{count} values'} for {flights} flights; "
            f"a column of client_rounds gives one for each"
        )
    return given
