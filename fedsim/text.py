"""Numbers as people read them, and tables as spreadsheets may."""

from __future__ import annotations

from typing import Any


def seconds_text(value: float) -> str:
    """Simulated seconds: whole from 100 on, else three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spreadsheet_safe(value: Any) -> Any:
    """A cell of a CSV file; a text that a spreadsheet would run as a formula gets an apostrophe in front."""
    if not isinstance(value, str):
        return value
    text = f"'{value}" if value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
    return text.replace("\r", " ")  # which ends a row for some readers


def csv_text(frame: Any, **options: Any) -> str:
    """A pandas table as CSV without its index; texts, such as names of a user's own, are never formulas."""
    safe = frame.rename(columns=spreadsheet_safe)
    texts = [place for place, kind in enumerate(safe.dtypes) if kind.kind not in "biufMm"]
    for place in texts:
        safe.isetitem(place, safe.iloc[:, place].map(spreadsheet_safe))
    return str(safe.to_csv(index=False, lineterminator="\n", **options))
