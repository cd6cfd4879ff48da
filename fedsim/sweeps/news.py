"""What a sweep says while it runs, on standard error: cells that ended, the time left, and long cells' rounds."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

from fedsim.records.checkpoint import saved_rounds
from fedsim.records.folder import CHECKPOINT
from fedsim.sweeps.cell_jobs import Done
from fedsim.sweeps.cells import SweepPlan

SILENCE_S = 60.0
"""After this long without a word, a line for each cell that runs."""


class SweepNews:
    """Follows the cells of one call.

    Args:
        due: cells that this call is to run.

    Attributes:
        running: indices of the cells under way, by the host's clock at their start.
    """

    def __init__(self, plan: SweepPlan, folder: Path, due: int, quiet: bool) -> None:
        self._plan, self._folder, self._due, self._quiet = plan, folder, due, quiet
        self._ended = 0
        self._began_s = self._spoke_s = time.monotonic()
        self.running: dict[int, float] = {}

    @property
    def patience_s(self) -> float:
        """How long to wait for a cell before there is something to say."""
        return max(0.1, self._spoke_s + SILENCE_S - time.monotonic())

    def began(self, index: int) -> None:
        """A cell starts."""
        self.running[index] = time.monotonic()

    def ended(self, done: Done, error: str | None = None) -> None:
        """A cell ended: how, and about how long the rest takes at the pace so far.

        Args:
            error: what to say of one that failed; default: its own sentence.
        """
        del self.running[done.index]
        self._ended += 1
        spent_s = time.monotonic() - self._began_s
        left_s = spent_s / self._ended * (self._due - self._ended)
        how = f"failed: {error or done.error}" if done.error else str(done.summary)
        left = f"; about {duration_text(left_s)} to go" if left_s > 0 else ""
        place = f"[{self._ended}/{self._due}] cell {done.index} ({self._plan.cells[done.index].label})"
        self._say(f"{place}, {done.host_s:.1f} host s: {how}{left}")

    def still_running(self) -> None:
        """A line for each cell under way, where nothing was said for a while."""
        now_s = time.monotonic()
        if now_s < self._spoke_s + SILENCE_S:
            return
        for index, began_s in self.running.items():
            cell = self._plan.cells[index]
            saved = saved_rounds(self._folder / cell.directory / CHECKPOINT)
            # A node of a cluster keeps its checkpoints to itself until the cell ends.
            how_far = "" if saved is None else f", {saved} of {cell.config.server.rounds} rounds saved"
            self._say(f"cell {index} ({cell.label}) runs for {duration_text(now_s - began_s)}{how_far}")
        self._spoke_s = now_s

    def _say(self, line: str) -> None:
        self._spoke_s = time.monotonic()
        if not self._quiet:
            print(line, file=sys.stderr, flush=True)


def duration_text(seconds: float) -> str:
    """Whole seconds below two minutes, whole minutes below two hours, then hours."""
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    return f"{math.ceil(seconds / 60)} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
