"""Rounds in arrays against the same rounds played by client processes: equal to the last bit."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_toys import ToyFleet, ToyStrategy, log, play, work

from fedsim.contracts.common import Labels, Outcome
from fedsim.contracts.flights import Flights
from fedsim.fleet.fleet import load_fleet
from fedsim.settings import FleetSettings, ServerSettings
from fedsim.sim.protocol import SimState

# A few values often, so that clients tie with one another, with the deadline and with nothing at all (a free transfer).
tied = st.sampled_from([0.5, 1.0, 1.5, 2.0])
transfers = st.one_of(st.just(0.0), tied, st.floats(1e-9, 1e3))
computes = st.one_of(tied, st.floats(1e-9, 1e3))
rows = st.lists(st.tuples(transfers, computes, transfers, st.booleans()), min_size=1, max_size=12)
deadlines = st.one_of(st.none(), st.sampled_from([1.0, 2.0, 3.0]), st.floats(1e-6, 2e3))
# Beyond 1e12 s short phases vanish in the rounding of the clock.
starts = st.one_of(st.just(0.0), st.floats(0.0, 1e6), st.floats(1e12, 1e17))


def both(fleet, options, strategy, start, seed=0):
    return [play(fleet, options, strategy(), seed, start, player=player) for player in ("arrays", "processes")]


def packed(flights):
    columns = [getattr(flights, f.name) for f in fields(flights) if f.name != "work"]
    return np.stack([*columns, *vars(flights.work).values()])


def assert_same(one, other):
    """Same end, same arrivals, same trace blocks: names, types and every bit."""
    assert one[0] == other[0]
    assert len(one[1]) == len(other[1]) == len(one[2])
    for left, right in [*zip(one[1], other[1], strict=True), *zip(one[2], other[2], strict=True)]:
        for field in fields(left):
            a, b = getattr(left, field.name), getattr(right, field.name)
            assert type(a) is type(b), field.name
            if isinstance(a, Flights):
                a, b = packed(a), packed(b)
            if isinstance(a, Labels):
                a, b = a.texts, b.texts
            if isinstance(a, np.ndarray):
                assert a.dtype == b.dtype, field.name
                np.testing.assert_array_equal(a, b, err_msg=field.name)
            else:
                assert a == b, field.name


@settings(max_examples=300, deadline=None)
@given(rows, deadlines, st.integers(1, 12), st.floats(0.0, 2.0), starts)
def test_any_round_is_the_same_both_ways(rows, deadline_s, quota, over, start_s):
    down, compute, up, fits = (np.array(column) for column in zip(*rows, strict=True))
    fleet = ToyFleet(down, compute, up, latency_s=0.25)
    options = ServerSettings(
        rounds=3, clients_per_round=min(quota, len(rows)), over_selection=over, deadline_s=deadline_s
    )
    memory = np.where(fits, 10.0, 1e9)
    assert_same(*both(fleet, options, lambda: ToyStrategy(memory=memory), SimState(now_s=start_s)))


@pytest.mark.parametrize(
    ("options", "outcomes"),
    [
        ({"deadline_s": 0.25}, {Outcome.LATE}),  # nobody even downloads
        ({"deadline_s": 3.0}, {Outcome.OK, Outcome.LATE, Outcome.OUT_OF_MEMORY}),
        ({}, {Outcome.OK, Outcome.OUT_OF_MEMORY}),
        ({"clients_per_round": 2, "over_selection": 9.0}, {Outcome.OK, Outcome.LATE, Outcome.OUT_OF_MEMORY}),
    ],
)
def test_the_cases_that_matter_are_met(options, outcomes):
    """So that the property above does not hold for want of cases."""
    fleet = ToyFleet([1.0, 1.0, 1.0, 1.0, 0.5, 9.0], [1.0, 1.0, 1.5, 3.0, 1.0, 1.0], [1.0, 1.0, 0.5, 0.0, 0.5, 0.0])
    memory = np.array([10.0, 10.0, 10.0, 10.0, 1e9, 1e9])
    pair = both(fleet, ServerSettings(rounds=2, **options), lambda: ToyStrategy(memory=memory), SimState())
    assert_same(*pair)
    assert set(pair[0][1][0].outcome.tolist()) == {int(outcome) for outcome in outcomes}


def test_ties_behind_a_phase_that_takes_no_time():
    """At 1e17 s a second is lost in rounding: two phases end with the download, at the deadline; the update counts."""
    fleet = ToyFleet([64.0, 0.0], [1.0, 1.0], [0.0, 128.0])
    pair = both(fleet, ServerSettings(rounds=1, deadline_s=64.0), ToyStrategy, SimState(0, 1e17))
    assert_same(*pair)
    assert pair[0][1][0].outcome.tolist() == [Outcome.OK, Outcome.LATE]


@pytest.mark.parametrize("name", ["fedspine-80", "fedspine-80-modes"])
def test_real_fleets_are_the_same_both_ways(name):
    """Thousands of different durations, with modes that change from round to round."""
    fleet = load_fleet(FleetSettings(name=name, clients=400, mode_period=2), "fp32", seed=5)

    def strategy():
        return ToyStrategy(memory=2e9, work_of=lambda clients: work(clients, memory=2e9 + 1e8 * (clients % 40)))

    options = ServerSettings(rounds=5, clients_per_round=150, over_selection=0.5)
    free = both(fleet, options, strategy, None, seed=5)
    assert_same(*free)
    middle = float(np.median(free[0][1][0].upload_end_s))
    cut = both(fleet, options.model_copy(update={"deadline_s": middle}), strategy, None, seed=5)
    assert_same(*cut)
    assert {Outcome.OK, Outcome.LATE} <= set(cut[0][1][0].outcome.tolist())
    assert "mode" in {row[2] for row in log(cut[0][2][0])}
