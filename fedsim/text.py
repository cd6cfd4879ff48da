"""Numbers as people read them."""

from __future__ import annotations


def seconds_text(value: float) -> str:
    """Simulated seconds: whole from 100 on, else three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
