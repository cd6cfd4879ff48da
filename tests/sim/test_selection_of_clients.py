"""Rules that go by what is known of clients, under each mode: they learn, and a resumed run goes on with it."""

from __future__ import annotations

import numpy as np
import pytest
from sim_toys import ToyFleet, ToyStrategy, play

from fedsim.settings import ServerSettings
from fedsim.sim.server import simulate

FLEET = ToyFleet(np.ones(12), np.arange(1.0, 13.0), np.ones(12))
RULES = ["oort", "power_of_choice", "available_fastest"]
MODES = [
    {"mode": "sync", "clients_per_round": 4},
    {"mode": "semi_async", "concurrency": 4, "buffer": 2},
    {"mode": "async", "concurrency": 4},
]


def test_once_all_are_known_the_fastest_come_again_and_again():
    _, reports, _ = play(FLEET, ServerSettings(rounds=6, clients_per_round=4, selection="available_fastest"))
    assert sorted(np.concatenate([one.clients for one in reports[:3]]).tolist()) == list(range(12))
    assert [one.clients.tolist() for one in reports[3:]] == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["mode"])
def test_a_resumed_run_knows_what_it_knew(rule, mode):
    options = ServerSettings(rounds=14, selection=rule, **mode)
    end, reports, _ = play(FLEET, options)
    kept = {}

    def keep(arrivals, learned, block, under_way):
        kept.clear()
        kept.update(under_way())

    strategy = ToyStrategy()
    first = simulate(FLEET, strategy, options.model_copy(update={"rounds": 7}), 0, keep)
    second, later, _ = play(FLEET, options, strategy, start=first, under_way=kept)
    assert second == end
    assert [one.clients.tolist() for one in later] == [one.clients.tolist() for one in reports[7:]]
    # Without what was known the run would go on otherwise: the test is not empty.
    assert any(name.startswith("history.") for name in kept)
