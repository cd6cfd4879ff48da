"""Clients that drop out, come and go, slow down and share links: worked out by hand, and interrupted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_toys import ToyFleet, ToyStrategy, log, play

from fedsim.contracts.common import Outcome
from fedsim.errors import ConfigError, RunError
from fedsim.fleet.bandwidth import Replays, scaled_trace
from fedsim.fleet.dynamics import Dynamics, Sharing
from fedsim.fleet.heat import HeatTable
from fedsim.fleet.presence import Always, OnOffRhythm, Presence, RecordedRhythm
from fedsim.settings import ServerSettings
from fedsim.sim.accounting import client_seconds
from fedsim.sim.processes import ProcessPlayer
from fedsim.sim.trips import arrivals_of, trips_of


class Lost(Dynamics):
    """Drop-outs that a test gives: {(client, flight): (phase, share)}."""

    def __init__(self, lost, **more):
        super().__init__(said=("dropout",), drop_chance=np.ones(3), **more)
        object.__setattr__(self, "lost", lost)

    def drops(self, seed, clients, flight):
        rows = [self.lost.get(key, (-1, 1.0)) for key in zip(clients.tolist(), flight.tolist(), strict=True)]
        return np.array([row[0] for row in rows]), np.array([row[1] for row in rows])


def one_point(clients, down=np.inf, up=np.inf, half=False):
    return Sharing(np.zeros(clients, dtype=np.int64), (half,), down, up)


def toy(*columns, dynamics, **more):
    fleet = ToyFleet(*columns, dynamics=dynamics, **more)
    fleet.seed = 0
    return fleet


def test_a_drop_out_in_mid_upload_on_a_shared_link():
    """Both download at half speed (2 s alone take 4), compute to 8 s, and upload at half speed. Client 1 is lost after
    half of its 4 s upload: at 8 + 2 * 2 = 12 s. Client 0 has moved 2 of its 4 s by then, and needs 2 more alone."""
    fleet = toy([2.0, 2.0], [4.0, 4.0], [4.0, 4.0], dynamics=Lost({(1, 0): (2, 0.5)}, sharing=one_point(2)))
    _, (report,), (block,) = play(fleet, ServerSettings(rounds=1))
    assert log(block) == [
        (0.0, -1, "round_open", 2.0),
        (0.0, 0, "mode", 0.0),
        (0.0, 1, "mode", 0.0),
        (0.0, 0, "download_start", 1000.0),
        (0.0, 1, "download_start", 1000.0),
        (4.0, 0, "download_end", 1000.0),
        (4.0, 1, "download_end", 1000.0),
        (8.0, 0, "compute_end", 4.0),
        (8.0, 1, "compute_end", 4.0),
        (12.0, 1, "dropped", 2.0),
        (14.0, 0, "upload_end", 500.0),
        (14.0, -1, "round_close", 1.0),
    ]
    assert report.outcome.tolist() == [Outcome.OK, Outcome.DROPPED]
    assert report.bytes_up.tolist() == [500.0, 250.0]
    assert report.released_s.tolist() == [14.0, 12.0]
    # 10 W busy, 3 W radio over 2 W idle: client 1 spends nothing once it is gone.
    assert report.energy_joules.tolist() == [40 + 5 * 4 + 5 * 6, 40 + 5 * 4 + 5 * 4]


@pytest.mark.parametrize(("phase", "end_s", "down", "up"), [(0, 0.5, 250.0, 0), (1, 3.0, 1000, 0), (2, 6.5, 1000, 125)])
def test_a_drop_out_in_each_phase_counts_what_was_done(phase, end_s, down, up):
    fleet = toy([2.0], [4.0], [2.0], dynamics=Lost({(0, 0): (phase, 0.25)}))
    _, (report,), (block,) = play(fleet, ServerSettings(rounds=1))
    assert (end_s, 0, "dropped", float(phase)) in log(block)
    assert (report.bytes_down[0], report.bytes_up[0], report.end_s) == (down, up, end_s)
    assert sum(client_seconds(report).values())[0] == end_s


def test_a_deadline_cuts_a_shared_transfer_by_what_it_has_moved():
    """Client 0 is alone from 0 to 2 s, then shares with client 1, whose latency is over: at 4 s it has moved 3 of 8."""
    fleet = toy([8.0, 1.0], [1.0, 9.0], [1.0, 4.0], dynamics=Dynamics(said=("x",), sharing=one_point(2, half=True)))
    # Client 1 downloads alone 1 s in 2 s; client 0 has moved 1 by then, and goes on alone.
    _, (report,), _ = play(fleet, ServerSettings(rounds=1, deadline_s=4.0))
    assert report.bytes_down.tolist() == [1000 * (1 + 2) / 8, 1000.0]
    assert report.download_end_s.tolist() == [4.0, 2.0]


def test_half_duplex_shares_between_directions():
    """Client 1 uploads from 2 to 4 s while client 0 downloads: each at half speed."""
    columns = [4.0, 1.0], [1.0, 1.0], [1.0, 1.0]
    ends = {}
    for half in (False, True):
        fleet = toy(*columns, dynamics=Dynamics(said=("x",), sharing=one_point(2, half=half)))
        _, (report,), _ = play(fleet, ServerSettings(rounds=1))
        ends[half] = (report.download_end_s.tolist(), report.upload_end_s.tolist())
    # Downloads share to 2 s (client 0 has moved 1 of 4). Full duplex: client 0 ends at 5 s.
    assert ends[False] == ([5.0, 2.0], [7.0, 4.0])
    # Half duplex: client 1's upload of 1 s shares from 3 to 5 s; client 0 has moved 1 + 1 + 1, and ends at 6 s.
    assert ends[True] == ([6.0, 2.0], [8.0, 5.0])


def test_the_servers_link_slows_all_down_alike():
    """1000 and 500 bytes in 1 s alone are 8000 and 4000 bit/s; two downloads want 16000 of 8000 bit/s."""
    links = Sharing(np.full(2, -1), (), 8000.0, np.inf)
    fleet = toy([1.0, 1.0], [1.0, 1.0], [1.0, 1.0], dynamics=Dynamics(said=("x",), sharing=links))
    _, (report,), _ = play(fleet, ServerSettings(rounds=1))
    assert report.download_end_s.tolist() == [2.0, 2.0]
    assert report.upload_end_s.tolist() == [4.0, 4.0]


def presence(*stretches, repeat_s=None, join=None, leave=None):
    first = np.cumsum([0, *map(len, stretches)])
    flat = np.array([pair for one in stretches for pair in one], dtype=float).reshape(-1, 2)
    count = len(stretches)
    return Presence(
        RecordedRhythm(first, flat[:, 0], flat[:, 1], repeat_s),
        np.zeros(count) if join is None else np.array(join, float),
        np.full(count, np.inf) if leave is None else np.array(leave, float),
    )


def test_who_goes_off_drops_and_who_is_off_is_not_sent():
    there = presence([(0, 100)], [(0, 5), (20, 100)], [(30, 100)])
    fleet = toy([1.0] * 3, [6.0] * 3, [1.0] * 3, dynamics=Dynamics(said=("availability",), presence=there))
    _, reports, _ = play(fleet, ServerSettings(rounds=5))
    assert [report.clients.tolist() for report in reports] == [[0, 1], [0], [0], [0, 1], [0, 1, 2]]
    assert reports[0].outcome.tolist() == [Outcome.OK, Outcome.DROPPED]
    assert (reports[0].upload_end_s[1], reports[0].compute_end_s[1]) == (5.0, 5.0)
    assert [report.end_s for report in reports] == [8.0, 16.0, 24.0, 32.0, 40.0]


def test_the_server_waits_for_the_next_client_and_ends_where_none_comes():
    there = presence([(10, 20)], [(15, 18)])
    fleet = toy([1.0] * 2, [1.0] * 2, [1.0] * 2, dynamics=Dynamics(said=("availability",), presence=there))
    _, reports, _ = play(fleet, ServerSettings(rounds=2))
    assert [(report.start_s, report.flights.dispatch_s.tolist()) for report in reports] == [
        (0.0, [10.0]),
        (13.0, [13.0]),
    ]
    with pytest.raises(RunError, match=r"no client is there any more at 20 simulated s.*merge 4 of 9"):
        play(fleet, ServerSettings(rounds=9))


def test_join_and_leave_cut_stretches():
    there = Presence(Always(), np.array([0.0, 7.0]), np.array([20.0, np.inf]))
    assert there.on(0.0).tolist() == [True, False]
    assert there.next_arrival_s(0.0) == 7.0
    assert there.on(7.0).tolist() == [True, True]
    assert there.off_s(np.array([0, 1]), 7.0).tolist() == [20.0, np.inf]
    assert there.on(20.0).tolist() == [False, True]
    cut = presence([(0, 5), (10, 30)], join=[6], leave=[12])
    assert not cut.on(6.0)[0]
    assert cut.next_arrival_s(6.0) == 10.0
    assert cut.on(10.0)[0]
    assert cut.off_s(np.array([0]), 10.0)[0] == 12.0
    assert cut.next_arrival_s(12.0) == np.inf


def test_a_throttled_device_takes_longer_and_recovers():
    """Full rate for 4 busy seconds, half beyond; recovers 1 busy second per second (4 in 4 s)."""
    heat = HeatTable.of([(4.0, 0.5)], recover_s=4.0)
    fleet = toy([1.0], [6.0], [1.0], dynamics=Dynamics(said=("throttle",), heat=heat))
    _, reports, blocks = play(fleet, ServerSettings(rounds=2))
    # 4 s of work at full rate, 2 s at half: 8 s. Two transfers' rest (2 s): 2 busy seconds gone, so 2 + 4/0.5 = 10 s.
    assert client_seconds(reports[0])["compute_s"].tolist() == [8.0]
    assert client_seconds(reports[1])["compute_s"].tolist() == [10.0]
    assert (9.0, 0, "compute_end", 8.0) in log(blocks[0])


@given(st.floats(0, 50), st.floats(0, 100), st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4))
def test_work_is_the_inverse_of_seconds(busy_s, work_s, rates):
    heat = HeatTable.of([(7.0 * (k + 1), rate) for k, rate in enumerate(rates)], recover_s=10.0)
    busy_s = min(busy_s, heat.marks_s[-1])
    taken_s = heat.seconds(busy_s, work_s)
    assert heat.work(busy_s, taken_s) == pytest.approx(work_s, rel=1e-9, abs=1e-9)
    assert taken_s >= work_s


def test_a_replayed_trace_keeps_its_variation_and_the_links_mean():
    """1 and 3 Mbit/s for 10 s each have the mean 2: relative rates 1/2 and 3/2, whatever the link's own bandwidth."""
    trace = scaled_trace(np.array([0.0, 10.0]), np.array([1.0, 3.0]), None, "test")
    assert trace.rates == [0.5, 1.5]
    assert trace.seconds(0.0, 5.0) == 10.0
    assert trace.seconds(0.0, 8.0) == 12.0
    assert trace.seconds(15.0, 10.0) == pytest.approx(5.0 + 5.0)
    assert trace.seconds(35.0, 60.0) == 60.0  # three whole laps
    curve = Replays([trace], np.array([0]), np.array([0.0]))
    fleet = toy([8.0], [3.0], [6.0], dynamics=Dynamics(said=("replay",), curve=curve))
    _, (report,), _ = play(fleet, ServerSettings(rounds=1))
    assert report.download_end_s[0] == 12.0
    # The upload begins at 15 s: 5 s at 3/2 move 7.5 s' worth, which is more than its 6.
    assert report.upload_end_s[0] == 19.0


def test_arrays_are_refused_by_name():
    fleet = toy([1.0], [1.0], [1.0], dynamics=Dynamics(said=("throttle", "dropout")))
    with pytest.raises(ConfigError, match=r"server.clock: value 'arrays' is not allowed.*throttle, dropout"):
        play(fleet, ServerSettings(rounds=1), player="arrays")


# -- the queue interrupted and rebuilt --------------------------------------------------------------------------------


def world(rng, clients):
    points = rng.integers(0, 3)
    limit = float(rng.choice([np.inf, 3000.0]))
    sharing = None
    if points:
        halves = tuple(bool(half) for half in rng.integers(0, 2, points))
        sharing = Sharing(rng.integers(-1, points, clients), halves, limit, float(rng.choice([np.inf, 2000.0])))
    seed = int(rng.integers(1000))
    on = OnOffRhythm(np.full(clients, 40.0), np.full(clients, 10.0), seed)
    heat = HeatTable.of([(3.0, 0.7), (6.0, 0.3)], recover_s=9.0) if rng.integers(2) else None
    trace = scaled_trace(np.arange(5.0), rng.uniform(0.2, 3.0, 5), None, "test")
    curve = Replays([trace], np.zeros(clients, dtype=np.int64), rng.uniform(0, 1, clients)) if rng.integers(2) else None
    chance = rng.choice([0.0, 0.1, 0.3], 3)
    availability = Presence(on, np.zeros(clients), np.full(clients, np.inf)) if rng.integers(2) else None
    return Dynamics(said=("x",), presence=availability, drop_chance=chance, heat=heat, curve=curve, sharing=sharing)


def stream(seed, clients, stop_at=None):
    """Send idle clients off again and again, merging two updates at a time; interrupted and rebuilt at `stop_at`."""
    rng = np.random.default_rng(seed)
    dynamics = world(rng, clients)
    fleet = toy(*rng.uniform(0.5, 9.0, (3, clients)), dynamics=dynamics, latency_s=float(rng.choice([0.0, 0.25])))
    player, strategy, seen = ProcessPlayer(clients, 0.0, fleet=fleet), ToyStrategy(), []
    for merge in range(14):
        if merge == stop_at:
            state = {name: np.array(column) for name, column in player.state().items()}
            fleet.dynamics = world(np.random.default_rng(seed), clients)
            player = ProcessPlayer(clients, player.now_s, fleet=fleet)
            player.restore(state)
        there = player.idle if dynamics.presence is None else player.idle & dynamics.presence.on(player.now_s)
        free = np.flatnonzero(there)
        if len(free):
            player.launch(trips_of(fleet, strategy.dispatch(free, merge, player.now_s), merge))
        if not player.flying:
            break
        began_s = player.now_s
        player.advance(2, None)
        if not player.waiting and not player._stopped:
            continue
        landed = player.land(player.waiting, np.empty(0, dtype=np.int64))
        arrivals = arrivals_of(fleet, landed, merge, began_s, player.now_s, held=False)
        seen.append(arrivals)
    return seen


COLUMNS = (
    "clients",
    "download_end_s",
    "compute_end_s",
    "upload_end_s",
    "bytes_down",
    "bytes_up",
    "energy_joules",
    "outcome",
)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 12))
def test_rebuilt_in_mid_flight_goes_on_to_the_bit(seed, clients, stop_at):
    whole, again = stream(seed, clients), stream(seed, clients, stop_at)
    assert len(whole) == len(again)
    for one, other in zip(whole, again, strict=True):
        for name in COLUMNS:
            assert np.array_equal(getattr(one, name), getattr(other, name)), name


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7))
def test_parts_add_up_and_nobody_moves_more_than_asked(seed, clients):
    for arrivals in stream(seed, clients):
        parts = client_seconds(arrivals)
        total = arrivals.released_s - arrivals.flights.dispatch_s
        assert np.all(np.abs(sum(parts.values()) - total) <= 1e-9 * (1 + arrivals.end_s))
        assert all(np.all(part >= 0) for part in parts.values())
        work = arrivals.flights.work
        ok = arrivals.outcome == Outcome.OK
        assert np.all(arrivals.bytes_down <= work.download_bytes)
        assert np.array_equal(arrivals.bytes_up == work.upload_bytes, ok)
        assert np.all((arrivals.bytes_up >= 0) & (arrivals.bytes_up <= work.upload_bytes))
