"""A server protocol of one's own: merges come by the clock, whatever has arrived; nobody is ever given up."""

import numpy as np
import pytest

import fedsim
from fedsim.errors import ConfigError

TIMING = {
    "method": "fedspine_uniform",
    "fleet": {"clients": 7},
    "server": {"rounds": 6, "clients_per_round": 3},
    "train": {"engine": "none"},
}


class EveryTick:
    """Merges what is there every `tick_s`, and then fills up to ``clients_per_round`` flights: lowest numbers first."""

    held = False

    def __init__(self, settings, clients, seed, tick_s=20.0):
        self._wanted, self._tick_s = settings.clients_per_round, tick_s

    def start(self, view):
        free = max(0, self._wanted - view.flying)
        # Only just after a merge: in between, places stay empty.
        return np.flatnonzero(view.idle)[:free] if view.sent == 0 else np.empty(0, dtype=np.int64)

    def patience(self, view):
        return 10**9

    def timer_s(self, view):
        return (np.floor(view.opened_s / self._tick_s) + 1) * self._tick_s

    def due(self, view):
        return view.waiting if view.timer_over and view.waiting + view.stopped else None

    def abandon(self, view):
        return np.empty(0, dtype=np.int64)


def test_merges_come_by_the_clock(tmp_path):
    fedsim.register_protocol("tick", EveryTick)
    run = fedsim.run(TIMING, out=tmp_path / "run", quiet=True, server__mode="tick")
    assert (run.rounds["end_s"] % 20.0 == 0).all()
    assert (run.client_rounds["outcome"] == "ok").all()
    assert run.client_rounds["staleness"].max() >= 0
    assert run.config["server"]["mode"] == "tick"


def test_a_name_that_is_taken_or_unknown_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'async' exists already"):
        fedsim.register_protocol("async", EveryTick)
    with pytest.raises(ConfigError, match=r"unknown server.mode 'tock'"):
        fedsim.run(TIMING, out=tmp_path / "run", quiet=True, server__mode="tock")
