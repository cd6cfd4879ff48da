from __future__ import annotations

import numpy as np
import pytest

from fedsim.control.client_history import ClientHistory
from fedsim.control.client_selection import SELECTIONS, SelectionContext, choose_clients
from fedsim.control.selection_rules import (
    available_fastest,
    chances,
    explored_share,
    oort,
    power_of_choice,
    utility,
)

EVERYONE = np.arange(10)


def known(loss, time_s, heard=0):
    history = ClientHistory(len(loss))
    clients = np.flatnonzero(~np.isnan(np.asarray(time_s, float)))
    history.merged(clients, np.asarray(loss, float)[clients], np.asarray(time_s, float)[clients], heard)
    return history


def test_power_of_choice_takes_the_highest_losses_of_those_drawn():
    history = known(np.arange(10.0), np.ones(10))
    draws = np.array([0.1, 0.9, 0.2, 0.9, 0.3, 0.9, 0.4, 0.9, 0.9, 0.9])  # drawn: 0, 2, 4, 6
    assert power_of_choice(EVERYONE, 2, history, draws).tolist() == [6, 4]


def test_power_of_choice_hears_everybody_first():
    history = known(np.arange(10.0), [1.0] * 5 + [np.nan] * 5)
    counts = np.zeros(10)
    for index in range(200):
        counts[power_of_choice(EVERYONE, 2, history, chances(3, EVERYONE, index, 0))] += 1
    assert counts[5:].min() > counts[:5].max()


def test_the_fastest_are_taken_and_unknown_ones_before_them():
    history = known(np.ones(10), [9, 8, 7, 6, 5, 4, 3, 2, np.nan, np.nan])
    draws = chances(0, EVERYONE, 0, 0)
    assert sorted(available_fastest(EVERYONE, 4, history, draws).tolist()) == [6, 7, 8, 9]
    assert available_fastest(EVERYONE[:8], 2, history, draws[:8]).tolist() == [7, 6]


def test_oort_utility_by_hand():
    """Losses 1, 2, 3 at equal times, all heard in merge 0; at merge 9 the bonus is sqrt(0.1 ln 10)."""
    history = known([1.0, 2.0, 3.0], [5.0, 5.0, 5.0])
    top = np.percentile([1.0, 2.0, 3.0], 95)
    bonus = np.sqrt(0.1 * np.log(10))
    expected = [bonus, 1 / (top - 1) + bonus, 1 + bonus]
    np.testing.assert_allclose(utility(np.arange(3), history, 9), expected)
    slow = known([2.0, 2.0, 2.0], [5.0, 5.0, 50.0])  # the third takes ten times the preferred time
    np.testing.assert_allclose(utility(np.arange(3), slow, 0), [1.0, 1.0, 0.01])


def test_oort_bonus_rises_with_the_time_since_a_client_was_heard():
    history = known(np.ones(2), np.ones(2), heard=0)
    history.merged(np.array([1]), np.ones(1), np.ones(1), 50)
    first, second = utility(np.arange(2), history, 60)
    assert first > second


def test_oort_explores_less_and_less_and_exploits_the_useful():
    assert [explored_share(0), explored_share(10_000)] == [0.9, 0.2]
    history = known(np.r_[np.zeros(4), np.full(4, 5.0), np.nan, np.nan], np.r_[np.ones(8), np.nan, np.nan])
    counts = np.zeros(10)
    for index in range(300):
        chosen = oort(EVERYONE, 4, history, chances(1, EVERYONE, index, 0), round_index=200)
        assert len(set(chosen.tolist())) == 4
        counts[chosen] += 1
    # A fifth of four places is one, for 8 or 9; the other three are of the four with losses.
    assert counts[8:].sum() == 300
    assert counts[4:8].sum() == 900
    assert counts[:4].sum() == 0


@pytest.mark.parametrize("name", sorted(SELECTIONS.built_in))
def test_each_rule_answers_with_as_many_different_candidates_whatever_is_known(name):
    rng = np.random.default_rng(0)
    for index in range(60):
        history = ClientHistory(30)
        heard = rng.choice(30, rng.integers(0, 31), replace=False)
        loss = np.full(len(heard), np.nan) if index % 3 == 0 else rng.exponential(size=len(heard))
        history.merged(heard, loss, rng.exponential(size=len(heard)) + 0.1, index)
        candidates = np.sort(rng.choice(30, rng.integers(1, 31), replace=False))
        count = int(rng.integers(1, len(candidates) + 1))
        chosen = choose_clients(name, candidates, count, SelectionContext(7, index, index % 2, history))
        assert len(chosen) == count
