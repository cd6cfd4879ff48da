"""Which watts behind a comparison's joules are power budgets: upper bounds, and no measurement."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.cost.device import load_profile
from fedsim.errors import ProfileError
from fedsim.records.reader import Run


def energy_note(runs: Sequence[Run]) -> str | None:
    """A sentence on the devices and modes whose busy power is a budget; None where none is."""
    seen: set[tuple[str, str]] = set()
    for run in runs:
        if run.has("client_rounds"):
            pairs = run.client_rounds[["device", "mode"]].drop_duplicates()
            seen |= set(pairs.itertuples(index=False, name=None))
    budgets = sorted(f"{device} {mode}" for device, mode in seen if _is_budget(device, mode))
    if not budgets:
        return None
    some = "" if len(budgets) == len(seen) else f" of {len(seen)}"
    named = ", ".join(budgets[:4]) + (f" and {len(budgets) - 4} more" if len(budgets) > 4 else "")
    return (
        f"Energy: in {len(budgets)}{some} power modes the busy watts are a budget, an upper bound ({named}): joules of "
        "these modes compare among each other, not with those of measured ones."
    )


def _is_budget(device: str, mode: str) -> bool:
    try:
        return load_profile(device).mode(mode).busy_power.is_budget
    except ProfileError:
        return False  # a profile of one's own, known to its fleet file alone
