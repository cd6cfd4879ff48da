"""A number of a fleet file with its standing, and what all parts of such a file are made of."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator


class Part(BaseModel):
    """Base of all parts: frozen, and strict about keys and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Number(Part):
    """A number with its standing; `low` and `high` bound its uncertainty, or the clients' draws (``draw: uniform``)."""

    value: float
    low: float
    high: float
    unit: str | None = None
    status: Literal["spec", "measured", "derived", "extrapolated", "assumed"] = "assumed"
    source: str = "the fleet file"
    draw: Literal["fixed", "uniform"] = "fixed"

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, given: Any) -> Any:
        if isinstance(given, (int, float)) and not isinstance(given, bool):
            return {"value": given, "low": given, "high": given}
        if not isinstance(given, dict):
            raise ValueError("must be a number, {low, high}, or {value, unit, status, source, low, high}")
        given = dict(given)
        if "value" in given:
            given.setdefault("low", given["value"])
            given.setdefault("high", given["value"])
        elif isinstance(given.get("low"), (int, float)) and isinstance(given.get("high"), (int, float)):
            given["value"] = 0.5 * (given["low"] + given["high"])
            given.setdefault("draw", "uniform")
        return given

    @model_validator(mode="after")
    def _ordered(self) -> Number:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"must have low <= value <= high, not {self.low:g}, {self.value:g}, {self.high:g}")
        return self

    @property
    def smallest(self) -> float:
        """The smallest value that any client can get."""
        return self.low if self.draw == "uniform" else self.value

    @property
    def largest(self) -> float:
        """The largest value that any client can get."""
        return self.high if self.draw == "uniform" else self.value


def fixed(value: float) -> Number:
    """A default: the same for all clients."""
    return Number(value=value, low=value, high=value, source="default of fleet files")


def check_unit(name: str, number: Number, unit: str) -> None:
    """Refuse a number in another unit."""
    if number.unit not in (None, unit):
        raise ValueError(f"{name} has the unit '{number.unit}' (allowed: '{unit}')")
