"""Progress of a run: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from fedsim.contracts.flights import Arrivals, Learned
from fedsim.text import seconds_text


class Progress:
    """Context manager that shows rounds as they finish, on standard error.

    Piped output gets at most about twenty lines a run, besides every evaluation.
    """

    def __init__(self, label: str, rounds: int, done: int, quiet: bool = False) -> None:
        self._label, self._rounds, self._done = label, rounds, done
        self._quiet = quiet
        self._is_terminal = sys.stderr.isatty()
        self._bar: tqdm[None] | None = None
        self._began_s = time.monotonic()
        self._first = done

    def say(self, line: str) -> None:
        """One line before the rounds begin, or between them."""
        if not self._quiet:
            tqdm.write(f"{self._label}: {line}", file=sys.stderr)

    def warn(self, line: str) -> None:
        """A line that shows even where progress does not."""
        tqdm.write(f"{self._label}: {line}", file=sys.stderr)

    def __enter__(self) -> Progress:
        self._began_s = time.monotonic()  # not before: reading data and model tells nothing of a round's time
        if self._is_terminal and not self._quiet:
            self._bar = tqdm(total=self._rounds, initial=self._done, desc=self._label, unit="round", file=sys.stderr)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def round_done(self, arrivals: Arrivals, learned: Learned) -> None:
        """Show one finished round."""
        self._done += 1
        accuracy = "" if learned.accuracy is None else f", accuracy {learned.accuracy:.3f}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"simulated {seconds_text(arrivals.end_s)} s{accuracy}")
            self._bar.update(1)
            return
        every = max(1, self._rounds // 20)
        if self._quiet or (learned.accuracy is None and self._done % every and self._done != self._first + 1):
            return
        spent_s = time.monotonic() - self._began_s
        left_s = spent_s / (self._done - self._first) * (self._rounds - self._done)
        print(
            f"{self._label}: round {self._done}/{self._rounds}, simulated {seconds_text(arrivals.end_s)} s{accuracy}, "
            f"about {left_s:.0f} s to go",
            file=sys.stderr,
            flush=True,
        )
