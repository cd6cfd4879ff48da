"""The fixed evaluation panel."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedsim.runner.panel import draw_panel


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    size=st.integers(1, 60),
    seed=st.integers(0, 1000),
)
def test_every_class_has_a_seat_and_shares_are_kept(counts, size, seed):
    devices = np.repeat([f"d{index}" for index in range(len(counts))], counts)
    panel = draw_panel(devices, size, seed)
    expected = min(max(size, len(counts)), len(devices))
    assert len(panel) == len(set(panel.tolist())) == expected
    assert (np.diff(panel) > 0).all()
    seats = np.array([(devices[panel] == f"d{index}").sum() for index in range(len(counts))])
    share = np.array(counts) * expected / len(devices)
    assert (seats >= 1).all()
    assert (seats <= counts).all()
    assert (seats - share < len(counts)).all()
    np.testing.assert_array_equal(panel, draw_panel(devices, size, seed))


def test_the_quickstart_fleet_gives_3_4_1():
    devices = np.array((["tx2"] * 3 + ["nx"] * 4 + ["agx"]) * 10)
    panel = draw_panel(devices, 8, 0)
    assert sorted(devices[panel]) == ["agx"] + ["nx"] * 4 + ["tx2"] * 3
