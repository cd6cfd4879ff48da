"""The common shift within bounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.control.recentre import recentre


@st.composite
def cases(draw):
    size = draw(st.integers(1, 40))
    unit = st.floats(0.0, 1.0, allow_nan=False)
    wish = np.array(draw(st.lists(unit, min_size=size, max_size=size)))
    ends = np.sort(np.array(draw(st.lists(st.tuples(unit, unit), min_size=size, max_size=size))), axis=1)
    return wish, draw(unit), ends[:, 0], ends[:, 1]


@settings(max_examples=200, deadline=None)
@given(cases())
def test_mean_is_reached_or_as_near_as_the_bounds_allow(case):
    wish, target, low, high = case
    moved = recentre(wish, target, low, high)
    assert (moved >= low).all()
    assert (moved <= high).all()
    nearest = min(max(target, low.mean()), high.mean())
    assert moved.mean() == pytest.approx(nearest, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_all_that_no_bound_holds_move_by_the_same_amount(case):
    wish, target, low, high = case
    moved = recentre(wish, target, low, high)
    free = (moved > low + 1e-9) & (moved < high - 1e-9)
    shifts = (moved - wish)[free]
    if low.mean() < target < high.mean() and free.any():
        assert np.ptp(shifts) < 1e-9
        # Whoever is held at a bound would have gone beyond it with the common shift.
        held_low, held_high = moved <= low + 1e-9, moved >= high - 1e-9
        assert ((wish + shifts[0])[held_low & ~held_high] <= (low + 2e-9)[held_low & ~held_high]).all()
        assert ((wish + shifts[0])[held_high & ~held_low] >= (high - 2e-9)[held_high & ~held_low]).all()


def test_known_values():
    # Shift 0.2 puts the first two at 0.3 and 0.6; the third is held at 0.9: mean 0.6.
    moved = recentre([0.1, 0.4, 0.8], 0.6, 0.0, 0.9)
    np.testing.assert_allclose(moved, [0.3, 0.6, 0.9], atol=1e-9)
    np.testing.assert_allclose(recentre([0.5, 0.5], 0.9, [0.0, 0.1], [0.2, 0.3]), [0.2, 0.3])
    np.testing.assert_allclose(recentre([0.5, 0.5], 0.0, [0.1, 0.2], 1.0), [0.1, 0.2])
    assert recentre([], 0.5, [], []).shape == (0,)


@pytest.mark.parametrize(("low", "high", "word"), [(0.5, 0.4, "lower bound"), (np.nan, 1.0, "finite")])
def test_unusable_bounds_are_refused(low, high, word):
    with pytest.raises(ValueError, match=word):
        recentre([0.2], 0.3, low, high)
