"""Updates that a run lost: jobs dispatched whose outcome is not ok."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

_OK = "ok"


class RecordedJobs(Protocol):
    """What is asked of a run here; `fedsim.records.reader.Run` is one."""

    def has(self, table: str) -> bool:
        """Whether the run records the table."""

    def outcome_counts(self) -> dict[str, int]:
        """Jobs by how they ended."""


@dataclass(frozen=True)
class LostUpdates:
    """Jobs of a run, counted.

    Attributes:
        sent: jobs dispatched, one per round and client.
        lost: those whose outcome is not ok.
        by_outcome: lost jobs by outcome, by name; only outcomes that occurred, none where it is not recorded how.
    """

    sent: int
    lost: int
    by_outcome: dict[str, int]

    @property
    def text(self) -> str:
        """Such as "3 of 96 updates lost (late 3)"; "no update lost" for none."""
        if not self.lost:
            return "no update lost"
        outcomes = ", ".join(f"{name} {count}" for name, count in self.by_outcome.items())
        return f"{self.lost} of {self.sent} updates lost" + (f" ({outcomes})" if outcomes else "")


def lost_updates(run: RecordedJobs) -> LostUpdates | None:
    """Count them, from the column of outcomes alone; None where the run does not record its clients.

    Raises:
        RunError: records missing or damaged.
    """
    if not run.has("client_rounds"):
        return None
    counts = run.outcome_counts()
    lost = {name: count for name, count in counts.items() if name != _OK}
    return LostUpdates(sum(counts.values()), sum(lost.values()), lost)
