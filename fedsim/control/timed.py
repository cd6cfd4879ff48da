"""How much of this computer's time the controller takes: a policy behind a stop-watch."""

from __future__ import annotations

import time

from fedsim.contracts.common import State
from fedsim.contracts.control import Arms, Feedback, Policy, RoundContext


class TimedPolicy:
    """The policy given, unchanged in what it does; `spent_s` are host seconds in `select` and `update` so far."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.spent_s = 0.0

    def select(self, context: RoundContext) -> Arms:
        start = time.perf_counter()
        try:
            return self._policy.select(context)
        finally:
            self.spent_s += time.perf_counter() - start

    def update(self, feedback: Feedback) -> None:
        start = time.perf_counter()
        try:
            self._policy.update(feedback)
        finally:
            self.spent_s += time.perf_counter() - start

    def state(self) -> State:
        """Host seconds are no part of it: they differ between equal runs."""
        return self._policy.state()

    def restore(self, state: State) -> None:
        self._policy.restore(state)
