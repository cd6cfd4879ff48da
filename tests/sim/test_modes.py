"""Servers that do not wait, event by event: small scenarios worked out by hand, and what holds in any."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_toys import ToyFleet, ToyStrategy, log, play

from fedsim.contracts.common import Outcome
from fedsim.errors import ConfigError
from fedsim.settings import ServerSettings
from fedsim.sim.accounting import client_seconds
from fedsim.sim.protocol import idle_clients
from fedsim.sim.server import SimState, simulate

# From dispatch to arrival: 6, 12 and 16 s.
THREE = ToyFleet(download_s=[1.0, 2.0, 3.0], compute_s=[4.0, 8.0, 10.0], upload_s=[1.0, 2.0, 3.0])


def merges(reports):
    """(time, [(client, flight, version, staleness, outcome)]) of each merge."""
    return [
        (
            one.end_s,
            list(
                zip(
                    one.clients.tolist(),
                    one.flights.flight.tolist(),
                    one.flights.version.tolist(),
                    one.staleness.tolist(),
                    [Outcome(code).label for code in one.outcome.tolist()],
                    strict=True,
                )
            ),
        )
        for one in reports
    ]


def test_async_of_three_unequal_clients():
    """Client 0 returns at 6, 12, 18; client 1 at 12, 24; client 2 at 16. At 12 two arrive: merged one after the other,
    and both are sent off again with the version after both."""
    _, reports, blocks = play(THREE, ServerSettings(mode="async", rounds=6))
    assert merges(reports) == [
        (6.0, [(0, 0, 0, 0, "ok")]),
        (12.0, [(0, 1, 1, 0, "ok")]),
        (12.0, [(1, 0, 0, 2, "ok")]),
        (16.0, [(2, 0, 0, 3, "ok")]),
        (18.0, [(0, 2, 3, 1, "ok")]),
        (24.0, [(0, 3, 5, 0, "ok")]),
    ]
    assert [(row.start_s, row.end_s) for row in reports[:4]] == [(0.0, 6.0), (6.0, 12.0), (12.0, 12.0), (12.0, 16.0)]
    assert log(blocks[1]) == [
        (6.0, -1, "round_open", 1.0),
        (6.0, 0, "download_start", 1000.0),
        (7.0, 0, "download_end", 1000.0),
        (10.0, 1, "compute_end", 8.0),
        (11.0, 0, "compute_end", 4.0),
        (12.0, 0, "upload_end", 500.0),
        (12.0, 1, "upload_end", 500.0),
        (12.0, -1, "round_close", 1.0),
    ]
    assert client_seconds(reports[3])["idle_s"].tolist() == [0.0]


def test_a_buffer_of_two_of_three():
    """0 waits from 6 to 12 for 1; both leave again at 12. 2 arrives at 16 and waits for 0, until 18. 0 and 1 arrive
    at once, at 24; 0 again at 30, and waits for 2, until 34."""
    _, reports, _ = play(THREE, ServerSettings(mode="semi_async", buffer=2, rounds=4))
    assert merges(reports) == [
        (12.0, [(0, 0, 0, 0, "ok"), (1, 0, 0, 0, "ok")]),
        (18.0, [(0, 1, 1, 0, "ok"), (2, 0, 0, 1, "ok")]),
        (24.0, [(0, 2, 2, 0, "ok"), (1, 1, 1, 1, "ok")]),
        (34.0, [(0, 3, 3, 0, "ok"), (2, 1, 2, 1, "ok")]),
    ]
    assert client_seconds(reports[0])["idle_s"].tolist() == [0.0, 0.0]  # waiting in the buffer is nobody's time


def test_places_are_refilled_at_every_arrival_but_not_by_one_who_waits():
    """Four equal clients, two at work: whoever is back is replaced at once by one who is not in the buffer."""
    fleet = ToyFleet(np.ones(4), [1.0, 2.0, 3.0, 4.0], np.ones(4))
    strategy = ToyStrategy()
    play(fleet, ServerSettings(mode="semi_async", concurrency=2, buffer=2, rounds=5), strategy)
    first, second = strategy.calls[0], strategy.calls[1]
    assert [(kind, version, len(clients)) for kind, version, clients in (first, second)] == [
        ("dispatch", 0, 2),
        ("dispatch", 0, 1),
    ]
    assert not set(second[2]) & set(first[2])


def test_updates_that_are_too_old_are_thrown_away():
    """2 arrives at 16 with version 0 after three merges: more than one, so it is no merge of its own. It is told of
    with the next one, and its client leaves again at once after that."""
    _, reports, _ = play(THREE, ServerSettings(mode="async", max_staleness=1, rounds=4))
    assert merges(reports) == [
        (6.0, [(0, 0, 0, 0, "ok")]),
        (12.0, [(0, 1, 1, 0, "ok")]),
        (18.0, [(0, 2, 2, 0, "ok"), (1, 0, 0, 2, "stale"), (2, 0, 0, 2, "stale")]),
        (24.0, [(0, 3, 3, 0, "ok")]),
    ]


def test_a_flight_over_its_time_is_given_up_and_replaced():
    """13 s for each flight: 2 is given up at 13, its job done and its upload about to begin."""
    _, reports, blocks = play(THREE, ServerSettings(mode="async", deadline_s=13.0, rounds=6))
    assert merges(reports)[3] == (13.0, [(2, 0, 0, 3, "late")])
    assert (13.0, 2, "late", 2.0) in log(blocks[3])
    late = [one.end_s for one in reports if Outcome.LATE in one.outcome]
    assert late == [13.0]
    _, reports, _ = play(THREE, ServerSettings(mode="semi_async", buffer=3, deadline_s=13.0, rounds=2))
    assert merges(reports)[0] == (13.0, [(0, 0, 0, 0, "ok"), (1, 0, 0, 0, "ok"), (2, 0, 0, 0, "late")])


@pytest.mark.parametrize("mode", ["async", "semi_async"])
def test_nobody_ever_fits_and_the_run_ends(mode):
    end, reports, _ = play(THREE, ServerSettings(mode=mode, rounds=3), ToyStrategy(1e9))
    assert end.next_round == 3
    assert all((one.outcome == Outcome.OUT_OF_MEMORY).all() for one in reports)


def test_a_job_that_does_not_fit_keeps_no_place():
    """Client 1 of two at work never fits: its place is taken again once a merge has told of it."""
    _, reports, _ = play(THREE, ServerSettings(mode="async", rounds=5), ToyStrategy(memory=[10.0, 1e9, 10.0]))
    assert merges(reports)[0] == (6.0, [(0, 0, 0, 0, "ok"), (1, 0, 0, 0, "out_of_memory")])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "async", "concurrency": 4}, r"server.concurrency: value 4 is not allowed \(the fleet has 3 clients"),
        ({"mode": "semi_async", "clients_per_round": 7}, r"server.clients_per_round: value 7 is not allowed"),
        (
            {"mode": "semi_async", "concurrency": 2, "buffer": 3},
            r"server.buffer: value 3 is not allowed \(at most the 2 clients at work",
        ),
    ],
)
def test_more_than_there_are_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        play(THREE, ServerSettings(**options))


class _View:
    def __init__(self, idle, version=0, sent=0):
        self.idle, self.version, self.sent = np.array(idle), version, sent


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_idle_clients_are_chosen_uniformly(share):
    """Both ways of looking, each client as often as another: counts within 4.5 standard deviations."""
    idle = np.zeros(200, dtype=bool)
    idle[: int(200 * share)] = True
    rng = np.random.default_rng(0)
    rng.shuffle(idle)
    counts = np.zeros(200)
    for version in range(1500):
        chosen = idle_clients(_View(idle, version, version % 3), 2, seed=4, rule="uniform")
        assert len(chosen) == 2
        assert chosen[0] < chosen[1]
        counts[chosen] += 1
    assert not counts[~idle].any()
    chance = 2 / idle.sum()
    assert np.all(np.abs(counts[idle] - 1500 * chance) <= 4.5 * np.sqrt(1500 * chance * (1 - chance)))


modes = st.sampled_from(["sync", "semi_async", "async"])
tied = st.sampled_from([0.5, 1.0, 1.5, 2.0])
seconds = st.one_of(tied, st.floats(1e-3, 1e3))
sizes = st.integers(1, 8)
rows = st.lists(st.tuples(seconds, seconds, seconds, st.booleans()), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    rows,
    modes,
    st.integers(1, 8),
    st.integers(1, 8),
    st.one_of(st.none(), seconds),
    st.one_of(st.none(), st.integers(0, 3)),
)
def test_flights_are_played_in_any_mode(rows, mode, concurrency, buffer, deadline_s, most):
    """Each client's flights follow one another; times add up; staleness counts merges; a split run is the same run."""
    down, compute, up, fits = (np.array(column) for column in zip(*rows, strict=True))
    fleet = ToyFleet(down, compute, up)
    concurrency = min(concurrency, len(rows))
    own = {"concurrency": concurrency, "max_staleness": most} if mode != "sync" else {"clients_per_round": concurrency}
    own |= {"buffer": min(buffer, concurrency)} if mode == "semi_async" else {}
    options = ServerSettings(mode=mode, rounds=6, deadline_s=deadline_s, **own)
    memory = np.where(fits, 10.0, 1e9)
    end, reports, blocks = play(fleet, options, ToyStrategy(memory=memory))
    assert end.next_round == 6
    made_s, busy_until = [0.0], {}
    for index, (one, block) in enumerate(zip(reports, blocks, strict=True)):
        flights = one.flights
        assert one.merge_index == index
        assert np.array_equal(one.staleness, index - flights.version)
        assert all(np.all(part >= 0) for part in client_seconds(one).values())
        assert np.all(flights.dispatch_s >= np.array(made_s)[flights.version])
        assert np.all(one.upload_end_s <= one.end_s)
        assert np.all(np.diff(block.time_s) >= 0)
        assert block.time_s[-1] == one.end_s >= one.start_s
        ok = one.outcome == Outcome.OK
        assert ok.sum() <= {"sync": concurrency, "semi_async": own.get("buffer", 0), "async": 1}[mode]
        if most is not None and mode != "sync":
            assert np.all((one.staleness <= most) | ~ok)
        whole = (((flights.dispatch_s + down[one.clients]) + compute[one.clients]) + up[one.clients])[ok]
        assert np.array_equal(one.upload_end_s[ok], whole)
        starts = zip(one.clients.tolist(), flights.flight.tolist(), flights.dispatch_s.tolist(), strict=True)
        for client, flight, start in starts:
            before, number = busy_until.get(client, (0.0, -1))
            assert (start >= before, flight) == (True, number + 1)
            busy_until[client] = one.end_s, flight
        made_s.append(one.end_s)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["semi_async", "async"]), st.integers(1, 7), st.booleans())
def test_a_run_goes_on_from_its_flights_under_way(seed, mode, split, timed):
    """Killed after any merge and resumed from what a checkpoint holds: the same arrivals and the same trace."""
    rng = np.random.default_rng(seed)
    fleet = ToyFleet(*rng.choice([0.5, 1.0, 2.0, 3.3], (3, 6)), wobble=lambda f, c: 1.0 + ((f * 31 + c * 17) % 5) / 4)
    own = {"buffer": 2} if mode == "semi_async" else {}
    options = ServerSettings(
        mode=mode, rounds=8, concurrency=4, max_staleness=3, deadline_s=5.0 if timed else None, **own
    )
    kept = {}

    def keep(arrivals, learned, block, under_way):
        if arrivals.merge_index + 1 == split:
            kept.update(under_way())

    whole = ToyStrategy()
    end, reports, blocks = play(fleet, options, whole, seed=seed)
    strategy = ToyStrategy()
    first = simulate(fleet, strategy, options.model_copy(update={"rounds": split}), seed, keep)
    assert isinstance(first, SimState)
    second, later, later_blocks = play(fleet, options, strategy, seed=seed, start=first, under_way=kept)
    assert second == end
    for one, other in zip(reports[split:], later, strict=True):
        for name in ("start_s", "end_s", "clients", "upload_end_s", "bytes_up", "energy_joules", "outcome"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
    assert [block.digest for block in blocks[split:]] == [block.digest for block in later_blocks]
