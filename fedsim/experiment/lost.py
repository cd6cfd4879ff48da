"""Updates that a run lost: jobs dispatched whose outcome is not ok."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fedsim.errors import RunError
from fedsim.experiment.results import Run

_OK = "ok"


@dataclass(frozen=True)
class LostUpdates:
    """Jobs of a run, counted.

    Attributes:
        sent: jobs dispatched, one per round and client.
        lost: those whose outcome is not ok.
        by_outcome: lost jobs by outcome, by name; only outcomes that occurred.
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
        return f"{self.lost} of {self.sent} updates lost ({outcomes})"


def lost_updates(run: Run) -> LostUpdates | None:
    """Count them, from the column of outcomes alone; None where the run does not record its clients.

    Raises:
        RunError: records missing or damaged.
    """
    if not run.has("client_rounds"):
        return None
    counts = {str(pair["values"]): int(pair["counts"]) for pair in pc.value_counts(_outcomes(run)).to_pylist()}
    lost = {name: counts[name] for name in sorted(counts) if name != _OK}
    return LostUpdates(sum(counts.values()), sum(lost.values()), lost)


def _outcomes(run: Run) -> pa.ChunkedArray | pa.Array:
    """Outcomes of all jobs; the table is not read where it was not already, unless the run is unfinished."""
    if "client_rounds" in vars(run) or not run.finished:
        return pa.array(run.client_rounds["outcome"].astype(str), pa.string())
    file = run.path / "client_rounds.parquet"
    try:
        return pq.read_table(file, columns=["outcome"])["outcome"].cast(pa.string())
    except FileNotFoundError:
        raise RunError(f"records file '{file}' of run '{run.path}' is missing") from None
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        raise RunError(f"records 'client_rounds' of run '{run.path}' are damaged: {error}") from None
