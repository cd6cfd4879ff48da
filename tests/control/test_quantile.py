"""The running quantile against numpy's over the same window."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.control.quantile import RunningQuantile
from fedsim.rng import Stream, generator

# A few levels only, so that equal values come and go.
levels = st.integers(-3, 3).map(float) | st.floats(-1e6, 1e6)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(levels, max_size=9), max_size=25), st.integers(9, 40), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_equals_numpys_quantile_of_the_last_values(rounds, room, fraction):
    running, seen = RunningQuantile(fraction, room), []
    for values in rounds:
        running.add(np.array(values))
        seen = (seen + values)[-room:]
        expected = np.quantile(seen, fraction) if seen else 0.0
        assert running.value(turnover=len(values)) == expected


@pytest.mark.parametrize("turnover", [5, 400])
def test_equals_numpys_quantile_over_a_long_drift(turnover, monkeypatch):
    cuts = []
    cut = RunningQuantile._cut_bracket
    monkeypatch.setattr(RunningQuantile, "_cut_bracket", lambda self, *rest: (cuts.append(1), cut(self, *rest)))
    draw = generator(0, Stream.POLICY)
    room, rounds = 4000, 1200
    running, seen = RunningQuantile(0.9, room), np.empty(0)
    for index in range(rounds):
        values = draw.exponential(size=turnover) / (1.0 + index / 200)
        running.add(values)
        seen = np.append(seen, values)[-room:]
        assert running.value(turnover=turnover) == np.quantile(seen, 0.9)
    if turnover < 10:
        assert len(cuts) < rounds / 5


def test_travels_in_the_state():
    draw = generator(1, Stream.POLICY)
    first, second = RunningQuantile(0.9, 64), RunningQuantile(0.9, 64)
    for _ in range(30):
        first.add(draw.random(7))
        first.value(turnover=7)
    second.restore(first.state())
    more = draw.random(20)
    first.add(more)
    second.add(more)
    assert first.value(turnover=7) == second.value(turnover=7)


def test_too_many_values_at_once_are_refused():
    with pytest.raises(ValueError, match="65 values"):
        RunningQuantile(0.9, 64).add(np.zeros(65))
