from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_toys import ToyFleet, ToyStrategy, log, play

from fedsim.contracts.common import Outcome
from fedsim.errors import ConfigError
from fedsim.settings import ServerSettings
from fedsim.sim.accounting import client_seconds, idle_fraction
from fedsim.sim.server import SimState, sample_clients, simulate

THREE = ToyFleet(download_s=[1.0, 2.0, 3.0], compute_s=[4.0, 8.0, 10.0], upload_s=[1.0, 2.0, 3.0])


def test_exact_log_of_one_round():
    _, (report,), (block,) = play(THREE, ServerSettings(rounds=1))
    assert log(block) == [
        (0.0, -1, "round_open", 3.0),
        (0.0, 0, "mode", 0.0),
        (0.0, 1, "mode", 0.0),
        (0.0, 2, "mode", 0.0),
        (0.0, 0, "download_start", 1000.0),
        (0.0, 1, "download_start", 1000.0),
        (0.0, 2, "download_start", 1000.0),
        (1.0, 0, "download_end", 1000.0),
        (2.0, 1, "download_end", 1000.0),
        (3.0, 2, "download_end", 1000.0),
        (5.0, 0, "compute_end", 4.0),
        (6.0, 0, "upload_end", 500.0),
        (10.0, 1, "compute_end", 8.0),
        (12.0, 1, "upload_end", 500.0),
        (13.0, 2, "compute_end", 10.0),
        (16.0, 2, "upload_end", 500.0),
        (16.0, -1, "round_close", 3.0),
    ]
    assert (report.start_s, report.end_s, report.outcome.tolist()) == (0.0, 16.0, [Outcome.OK] * 3)
    assert client_seconds(report)["idle_s"].tolist() == [10.0, 4.0, 0.0]
    assert idle_fraction(report) == pytest.approx(14 / 48)
    # 10 W busy; 3 W radio over 2 W idle while transferring; 2 W idle else.
    assert report.energy_joules.tolist() == [40 + 6 + 24, 80 + 12 + 16, 100 + 18 + 12]


def test_deadline_cuts_each_phase():
    fleet = ToyFleet([1, 1, 2, 8, 1], [2, 3, 20, 1, 3], [1, 4, 1, 1, 2], latency_s=0.0)
    _, (report,), (block,) = play(fleet, ServerSettings(rounds=1, deadline_s=6.0))
    # Client 4 ends its upload exactly at the deadline: it has arrived.
    assert report.end_s == 6.0
    assert report.outcome.tolist() == [Outcome.OK, Outcome.LATE, Outcome.LATE, Outcome.LATE, Outcome.OK]
    assert report.bytes_down.tolist() == [1000, 1000, 1000, 750, 1000]
    assert report.bytes_up.tolist() == [500, 250, 0, 0, 500]
    seconds = client_seconds(report)
    assert seconds["download_s"].tolist() == [1, 1, 2, 6, 1]
    assert seconds["compute_s"].tolist() == [2, 3, 4, 0, 3]
    assert seconds["upload_s"].tolist() == [1, 2, 0, 0, 2]
    assert seconds["idle_s"].tolist() == [2, 0, 0, 0, 0]
    assert report.energy_joules[2] == 10 * 4 + 3 * 2 + 2 * 2
    late = [row for row in log(block) if row[2] == "late"]
    assert late == [(6.0, 1, "late", 2.0), (6.0, 2, "late", 1.0), (6.0, 3, "late", 0.0)]
    assert log(block)[-1] == (6.0, -1, "round_close", 2.0)


def test_bytes_of_a_cut_transfer_leave_out_the_latency():
    fleet = ToyFleet([1.0, 5.0], [1.0, 1.0], [1.0, 1.0], latency_s=1.0)
    _, (report,), _ = play(fleet, ServerSettings(rounds=1, deadline_s=3.0))
    assert report.bytes_down.tolist() == [1000, 500]


def test_over_selection_closes_with_the_first_n():
    fleet = ToyFleet(np.ones(10), np.arange(1.0, 11.0), np.ones(10))
    _, reports, _ = play(fleet, ServerSettings(rounds=20, clients_per_round=4, over_selection=0.5))
    for report in reports:
        assert len(report.clients) == 6
        fastest = np.sort(report.clients)[:4]
        assert report.end_s - report.start_s == pytest.approx(2.0 + 1.0 + fastest[-1])
        assert (report.outcome == Outcome.OK).tolist() == [True] * 4 + [False] * 2


def test_out_of_memory_downloads_then_idles():
    strategy = ToyStrategy(memory=[10.0, 1000.0, 10.0])
    _, (report,), (block,) = play(THREE, ServerSettings(rounds=1), strategy)
    assert report.outcome.tolist() == [Outcome.OK, Outcome.OUT_OF_MEMORY, Outcome.OK]
    seconds = client_seconds(report)
    assert (seconds["compute_s"][1], seconds["upload_s"][1], seconds["idle_s"][1]) == (0.0, 0.0, 14.0)
    assert (report.bytes_down[1], report.bytes_up[1]) == (1000.0, 0.0)
    assert (2.0, 1, "out_of_memory", 1000.0) in log(block)


def test_nobody_can_arrive():
    _, (report,), _ = play(THREE, ServerSettings(rounds=1, clients_per_round=1, over_selection=2.0), ToyStrategy(1e9))
    assert report.end_s == 3.0
    assert report.outcome.tolist() == [Outcome.OUT_OF_MEMORY] * 3


def test_stops_at_target_and_at_time_budget():
    accuracy = [None, 0.5, 0.9, 0.95, None, None]
    end, reports, _ = play(THREE, ServerSettings(rounds=6, target_accuracy=0.9), ToyStrategy(accuracy=accuracy))
    assert (len(reports), end.next_round, end.target_met) == (3, 3, True)
    again, none, _ = play(THREE, ServerSettings(rounds=6, target_accuracy=0.9), start=end)
    assert (none, again) == ([], end)
    end, reports, _ = play(THREE, ServerSettings(rounds=6, time_budget_s=40.0))
    assert (len(reports), end.now_s) == (3, 48.0)


def test_too_many_clients_per_round_is_refused():
    with pytest.raises(ConfigError, match=r"clients_per_round is 9, but the fleet has 3 clients \(allowed: 1 to 3"):
        play(THREE, ServerSettings(clients_per_round=9))


def test_over_selection_is_rounded_up_but_not_by_rounding_errors():
    for quota, share, fleet, expected in [(10, 0.1, 80, 11), (10, 0.11, 80, 12), (8, 0.0, 80, 8), (8, 3.0, 10, 10)]:
        chosen, waits_for = sample_clients(
            fleet, ServerSettings(clients_per_round=quota, over_selection=share), seed=0, round_index=0
        )
        assert (len(chosen), waits_for) == (expected, quota)


def test_sampling_is_uniform_without_replacement():
    settings_ = ServerSettings(clients_per_round=5)
    counts = np.zeros(20)
    for round_index in range(2000):
        chosen, _ = sample_clients(20, settings_, seed=3, round_index=round_index)
        assert np.all(np.diff(chosen) > 0)
        counts[chosen] += 1
    # Each count is binomial (2000, 1/4): standard deviation 19.4.
    assert np.all(np.abs(counts - 500) < 4.5 * 19.4)


def test_exceptions_come_out_unchanged():
    class OddError(Exception):
        def __init__(self, one, two):
            super().__init__("odd")

    class Failing(ToyStrategy):
        def merge(self, arrivals):
            raise OddError(1, 2)

    with pytest.raises(OddError):
        play(THREE, ServerSettings(rounds=1), Failing())


def test_a_plan_for_other_clients_is_refused():
    class Other(ToyStrategy):
        def dispatch(self, clients, version, now_s):
            return super().dispatch(clients[:-1], version, now_s)

    with pytest.raises(ValueError, match="not those of version 0"):
        play(THREE, ServerSettings(rounds=1), Other())


durations = st.lists(
    st.tuples(*[st.floats(1e-3, 1e3)] * 3, st.booleans()),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(
    durations,
    st.one_of(st.none(), st.floats(1e-2, 2e3)),
    st.integers(1, 12),
    st.floats(0.0, 2.0),
    st.floats(0.0, 1e5),
)
def test_rounds_add_up_and_match_a_closed_form(rows, deadline_s, quota, over, start_s):
    """Against the definition: the round ends with the quota-th arrival, the deadline, or the last one at work."""
    down, compute, up, fits = (np.array(column) for column in zip(*rows, strict=True))
    fleet = ToyFleet(down, compute, up)
    quota = min(quota, len(rows))
    strategy = ToyStrategy(memory=np.where(fits, 10.0, 1e9))
    options = ServerSettings(rounds=3, clients_per_round=quota, over_selection=over, deadline_s=deadline_s)
    end, reports, blocks = play(fleet, options, strategy, start=SimState(now_s=start_s))
    clock = start_s
    for report, block in zip(reports, blocks, strict=True):
        i = report.clients
        duration_s = report.end_s - report.start_s
        parts = client_seconds(report)
        assert report.start_s == clock
        assert np.all(np.abs(sum(parts.values()) - duration_s) <= 1e-9)
        assert all(np.all(part >= 0.0) for part in parts.values())
        assert np.all(np.diff(block.time_s) >= 0)
        assert block.time_s[0] == report.start_s
        assert block.time_s[-1] == report.end_s

        finish = ((report.start_s + down[i]) + compute[i]) + up[i]
        stop = np.where(fits[i], finish, report.start_s + down[i])
        arrivals = np.sort(finish[fits[i]])
        due = [stop.max()] if len(arrivals) < quota else [arrivals[quota - 1]]
        if deadline_s is not None:
            due.append(report.start_s + deadline_s)
        assert report.end_s == min(due)
        expected = [
            Outcome.LATE if s > report.end_s else Outcome.OK if f else Outcome.OUT_OF_MEMORY
            for s, f in zip(stop, fits[i], strict=True)
        ]
        assert report.outcome.tolist() == expected
        clock = report.end_s
    assert end.now_s == clock


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 8), st.integers(0, 2**31))
def test_split_at_any_round_gives_the_same_trace(split, seed):
    rng = np.random.default_rng(seed)
    fleet = ToyFleet(*rng.uniform(0.1, 9.0, (3, 7)), wobble=lambda r, c: 1.0 + ((r * 31 + c * 17) % 11) / 10.0)
    options = ServerSettings(rounds=8, clients_per_round=4, over_selection=0.5, deadline_s=15.0)
    whole, reports, blocks = play(fleet, options, seed=seed)
    strategy, first = ToyStrategy(), SimState()  # the strategy goes on, too: it numbers each client's flights
    if split:
        first, _, _ = play(fleet, options.model_copy(update={"rounds": split}), strategy, seed=seed)
    second, later, later_blocks = play(fleet, options, strategy, seed=seed, start=first)
    assert second == whole
    for one, other in zip(reports[split:], later, strict=True):
        for name in ("start_s", "end_s", "clients", "upload_end_s", "bytes_up", "energy_joules"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
    assert [block.digest for block in blocks[split:]] == [block.digest for block in later_blocks]


def test_trace_hash_repeats_and_sees_a_change():
    options = ServerSettings(rounds=4)
    end, _, blocks = play(THREE, options)
    assert play(THREE, options)[0] == end
    slower = ToyFleet(THREE.download_s, [4.0, 8.0, np.nextafter(10.0, 11.0)], THREE.upload_s)
    assert play(slower, options)[0].trace_hash != end.trace_hash
    assert len({block.digest for block in blocks}) == 4
    columns = blocks[1].columns()
    assert list(columns) == ["time_s", "round", "client", "event", "value"]
    assert set(columns["round"].tolist()) == {1}


def test_calls_of_the_strategy_alternate():
    strategy = ToyStrategy()
    simulate(THREE, strategy, ServerSettings(rounds=2), 0, lambda *_: None)
    assert strategy.calls == [
        ("dispatch", 0, [0, 1, 2]),
        ("merge", 0),
        ("dispatch", 1, [0, 1, 2]),
        ("merge", 1),
    ]
