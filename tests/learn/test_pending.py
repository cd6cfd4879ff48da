"""Jobs that wait in columns, and the learner of timing-only runs that reads them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.contracts.common import Outcome
from fedsim.contracts.learning import LocalRequests
from fedsim.contracts.program import LocalProgram, Phase
from fedsim.cost.shapes import load_shape
from fedsim.learn.standins.pending import PendingJobs
from fedsim.learn.standins.timing_only import TimingLearner
from fedsim.structure import achieved_ratio, kept_counts


def requests(clients, version=0):
    clients = np.asarray(clients, dtype=np.int64)
    program = LocalProgram((Phase(4, 1e-3),))
    return LocalRequests(clients, clients % 3, version, clients / 100.0, clients % 5 + 1, program)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_against_a_dictionary(data):
    """Any order of submissions and takes gives what a dictionary by ticket would."""
    pending, known = PendingJobs(), {}
    for round_index in range(data.draw(st.integers(1, 5))):
        count = data.draw(st.integers(0, 6))
        asked = requests(np.arange(count) + 10 * round_index, round_index)
        tickets = pending.add(asked)
        assert not set(tickets.tolist()) & known.keys()
        known.update(zip(tickets.tolist(), asked.singles(), strict=True))
        chosen = data.draw(st.lists(st.sampled_from(sorted(known)), unique=True)) if known else []
        rows = pending.take(np.array(chosen, dtype=np.int64))
        expected = [known.pop(ticket) for ticket in chosen]
        assert rows.clients.tolist() == [one.client for one in expected]
        assert rows.ratio_asked.tolist() == [one.ratio_asked for one in expected]
        assert rows.flight.tolist() == [one.flight for one in expected]
        assert rows.version.tolist() == [one.version for one in expected]
        assert rows.rank.tolist() == [one.rank for one in expected]
        assert len(pending) == len(known)


@pytest.mark.parametrize("wrong", [[4], [0], [2, 2], [1, 9]])
def test_a_ticket_is_good_once(wrong):
    pending = PendingJobs()
    pending.add(requests([5, 6, 7]))
    with pytest.raises(KeyError):
        pending.take(np.array(wrong))
    pending.take(np.array([2]))
    with pytest.raises(KeyError):
        pending.take(np.array([2]))
    assert len(pending) == 2


def test_the_timing_learner_follows_ratios_and_forgets_what_is_discarded():
    shape = load_shape("roberta-base")
    learner = TimingLearner(shape)
    asked = requests([3, 40, 60])
    tickets = learner.submit(asked)
    learner.discard(tickets[1:2])
    results = learner.result(tickets[[2, 0]])
    assert results.clients.tolist() == [60, 3]
    for row, ratio in enumerate((0.6, 0.03)):
        heads, channels = kept_counts(shape, np.full(shape.layers, ratio))
        assert results.ratio[row] == achieved_ratio(shape, heads, channels)
        assert results.kept_after[0][row].tolist() == heads.tolist()
        assert results.kept_after[1][row].tolist() == channels.tolist()
    assert np.isnan(results.loss_after).all()
    assert (results.outcome == Outcome.OK).all()
    with pytest.raises(KeyError):
        learner.result(tickets[1:2])


def test_results_are_taken_by_mask():
    learner = TimingLearner(load_shape("tiny"))
    results = learner.result(learner.submit(requests([1, 2, 3])))
    assert results.take(np.ones(3, dtype=bool)) is results
    some = results.take(np.array([True, False, True]))
    assert some.clients.tolist() == [1, 3]
    assert some.ratio.tolist() == results.ratio[[0, 2]].tolist()
    assert some.kept_before[1].shape == results.kept_before[1][[0, 2]].shape
    assert some.payload is None
