"""An asynchronous server of a user's own: a protocol in one class, nothing of the package touched.

It keeps so many clients at work and merges every update as it arrives. The first scenario is worked out by hand; the
last one trains, is stopped in mid-flight, and goes on from what a checkpoint holds.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sim_toys import ToyFleet, ToyStrategy, log, play

from fedsim.contracts.common import Outcome
from fedsim.errors import RunError
from fedsim.runner.build import build
from fedsim.runner.config import build_config
from fedsim.settings import ServerSettings
from fedsim.sim.accounting import client_seconds
from fedsim.sim.server import SimState, simulate

THREE = ToyFleet(download_s=[1.0, 1.0, 2.0], compute_s=[2.0, 5.0, 11.0], upload_s=[1.0, 2.0, 3.0])
"""A flight takes 4, 8 and 16 s."""


class Eager:
    """Everybody who is idle flies; every arrival is merged at once; nobody is given up."""

    held = False

    def start(self, view):
        return np.flatnonzero(view.idle)

    def patience(self, view):
        return 1

    def timer_s(self, view):
        return None

    def due(self, view):
        return 1 if view.waiting else None

    def abandon(self, view):
        return np.empty(0, dtype=np.int64)


def test_order_and_staleness_by_hand():
    """Client 0 arrives at 4, 8, 12, 16; client 1 at 8 and 16; client 2 at 16. What is due at one moment
    is merged, the lower client first, before anybody is sent off."""
    end, merges, blocks = play(THREE, ServerSettings(rounds=7), protocol=Eager())
    told = [
        (m.end_s, m.clients.tolist(), m.flights.flight.tolist(), m.flights.version.tolist(), m.staleness.tolist())
        for m in merges
    ]
    assert told == [
        (4.0, [0], [0], [0], [0]),
        (8.0, [0], [1], [1], [0]),
        (8.0, [1], [0], [0], [2]),
        (12.0, [0], [2], [3], [0]),
        (16.0, [0], [3], [4], [0]),
        (16.0, [1], [1], [3], [2]),
        (16.0, [2], [0], [0], [6]),
    ]
    assert end.now_s == 16.0
    for merge in merges:
        parts = client_seconds(merge)
        assert merge.outcome.tolist() == [Outcome.OK]
        assert sum(parts.values()) == merge.released_s - merge.flights.dispatch_s
        assert parts["idle_s"].tolist() == [0.0]  # an update waits, its client does not
    assert log(blocks[0])[-3:] == [
        (3.0, 0, "compute_end", 2.0),
        (4.0, 0, "upload_end", 500.0),
        (4.0, -1, "round_close", 1.0),
    ]
    every = [row for block in blocks for row in log(block)]
    of_clients = [row for row in every if row[1] >= 0]
    assert len(of_clients) == len(set(of_clients))
    assert [row[2] for row in every].count("upload_end") == 7
    assert [row[2] for row in every].count("round_close") == 7


@pytest.mark.parametrize("stop", range(1, 12))
def test_stopped_in_mid_flight_it_goes_on_as_if_it_had_not(stop):
    fleet = ToyFleet(*np.random.default_rng(3).uniform(0.1, 9.0, (3, 5)), wobble=lambda f, c: 1 + 0.1 * ((f + c) % 3))
    options = ServerSettings(rounds=12)
    whole, merges, blocks = play(fleet, options, protocol=Eager())
    strategy, kept = ToyStrategy(), {}

    class Stopped(Exception):  # noqa: N818
        pass

    def on_merge(arrivals, learned, block, under_way):
        if arrivals.merge_index == stop - 1:
            kept.update(under_way())
            raise Stopped

    with pytest.raises(Stopped):
        simulate(fleet, strategy, options, 0, on_merge, protocol=Eager())
    assert len(kept["phase"]) >= 4  # four of five are at work, or wait
    start = SimState(stop, merges[stop - 1].end_s, blocks[stop - 1].digest)
    again, later, later_blocks = play(fleet, options, strategy, start=start, protocol=Eager(), under_way=kept)
    assert again == whole
    assert [block.digest for block in later_blocks] == [block.digest for block in blocks[stop:]]
    for one, other in zip(merges[stop:], later, strict=True):
        for name in ("end_s", "upload_end_s", "bytes_down", "energy_joules", "released_s"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        np.testing.assert_array_equal(one.flights.version, other.flights.version)


def test_a_protocol_that_sends_nobody_off_is_told_not_waited_for():
    class Idle(Eager):
        def start(self, view):
            return np.empty(0, dtype=np.int64)

    with pytest.raises(RunError, match="nothing can happen any more at 0 simulated s"):
        play(THREE, ServerSettings(rounds=2), protocol=Idle())


CONFIG = {
    "method": "fedspine",
    "fleet": {"clients": 4},
    "server": {"rounds": 9},
    "train": {"local_steps": 3, "recovery_steps": 1, "batch_size": 4, "max_length": 16, "precision": "fp32"},
    "prune": {"warmup_rounds": 2, "end_round": 6, "max_step": 0.5},
    "evaluate": {"every_rounds": 9, "panel": 2, "max_samples": 20},
    "cost": {"model": "roberta-base", "batch_size": 8, "seq_len": 64},
}


def trained(stop=None):
    """Play 9 merges of real training, asynchronously; in two processes' worth of objects where `stop` says so."""
    config, seen, kept = build_config(CONFIG), [], {}

    class Stopped(Exception):  # noqa: N818
        pass

    def part(experiment, start, under_way, stop):
        def on_merge(arrivals, learned, block, under_way_now):
            seen.append((arrivals, learned))
            if arrivals.merge_index + 1 == stop:
                kept["state"] = {name: np.array(value) for name, value in experiment.federation.state().items()}
                kept["clock"] = under_way_now()
                kept["start"] = SimState(stop, arrivals.end_s, block.digest)
                raise Stopped

        return simulate(
            experiment.fleet,
            experiment.federation,
            config.server,
            config.seed,
            on_merge,
            start,
            protocol=Eager(),
            under_way=under_way,
        )

    first = build(config, lambda line: None)
    if stop is None:
        return part(first, None, None, None), seen, first.federation
    with pytest.raises(Stopped):
        part(first, None, None, stop)
    second = build(config, lambda line: None)
    second.federation.restore(kept["state"])
    return part(second, kept["start"], kept["clock"], None), seen, second.federation


def test_real_training_in_mid_flight_ends_to_the_bit_as_without_the_stop():
    end, merges, whole = trained()
    assert {int(stale) for arrivals, _ in merges for stale in arrivals.staleness} > {0}
    assert [arrivals.end_s for arrivals, _ in merges] == sorted(arrivals.end_s for arrivals, _ in merges)
    again, later, resumed = trained(stop=4)
    assert again == end
    for (_, one), (_, other) in zip(merges, later, strict=True):
        np.testing.assert_array_equal(one.loss_after, other.loss_after)
        np.testing.assert_array_equal(one.rewards.reward, other.rewards.reward)
    one, other = whole.state(), resumed.state()
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_version_0_updates_merged_in_turn_both_count(monkeypatch):
    """The second of two flights of version 0 adds to what the first has brought; it does not replace it."""
    tree = {**CONFIG, "method": "fedlora", "fleet": {"clients": 2}, "server": {"rounds": 2}}
    experiment = build(build_config(tree), lambda line: None)
    learner, updates = experiment.federation.parts.learner, []
    before = dict(learner.adapter.factors)
    real = type(learner).aggregate

    def spying(self, results, *arguments, **options):
        updates.extend(update.adapter.factors for update in results.payload)
        real(self, results, *arguments, **options)

    monkeypatch.setattr(type(learner), "aggregate", spying)
    versions = []
    simulate(
        experiment.fleet,
        experiment.federation,
        build_config(tree).server,
        0,
        lambda arrivals, *rest: versions.append(arrivals.flights.version.tolist()),
        protocol=OneFlightEach(),
    )
    assert versions == [[0], [0]]
    first, second = updates
    for name, (a, b) in learner.adapter.factors.items():
        for place, merged in enumerate((a, b)):
            expected = first[name][place] + (second[name][place] - before[name][place])
            torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)
            assert not torch.equal(merged, second[name][place])


class OneFlightEach(Eager):
    """Nobody flies twice."""

    def start(self, view):
        return (
            super().start(view) if view.version == 0 and not view.flying + view.waiting else np.empty(0, dtype=np.int64)
        )
