"""What is held per client: against plain dicts, in bytes, and over a restart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.cost.shapes import load_shape
from fedsim.learn import store as store_module
from fedsim.learn.store import ClientStore
from fedsim.learn.train.importance import GroupScores
from fedsim.structure import ModelShape, Structure

SMALL = ModelShape("small", "bert", 2, 8, 3, 3, 2, 7, 10, 8)


def make_structure(shape, seed):
    draw = np.random.default_rng(seed)
    return Structure(draw.random((shape.layers, shape.head_groups)) < 0.5, draw.random((shape.layers, shape.ffn)) < 0.5)


def make_scores(shape, seed):
    draw = np.random.default_rng(seed)
    sizes = 10.0 ** draw.integers(-6, 2)
    return GroupScores(
        sizes * draw.random((shape.layers, shape.head_groups)), sizes * draw.random((shape.layers, shape.ffn))
    )


def as_stored(scores):
    return GroupScores(
        scores.heads.astype(np.float32).astype(np.float64), scores.channels.astype(np.float32).astype(np.float64)
    )


def assert_same_scores(one, other, tolerance=0.0):
    np.testing.assert_allclose(one.heads, other.heads, rtol=tolerance, atol=0)
    np.testing.assert_allclose(one.channels, other.channels, rtol=tolerance, atol=0)


def states_equal(one, other):
    return one.keys() == other.keys() and all(
        np.array_equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one
    )


writes = st.lists(
    st.tuples(st.sampled_from(["structure", "scores"]), st.integers(0, 9), st.integers(0, 10**6)), max_size=60
)


@settings(max_examples=60, deadline=None)
@given(history=writes, block_bytes=st.sampled_from([1, 200, 1 << 20]), restart=st.integers(0, 60))
def test_it_is_a_dict_of_structures_and_a_dict_of_scores(history, block_bytes, restart):
    """Whatever the blocks, and with a restart anywhere in between: to the bit the same as without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "_BLOCK_BYTES", block_bytes)
        held, straight = ClientStore(SMALL), ClientStore(SMALL)
        structures, scores = {}, {}
        for place, (kind, client, seed) in enumerate(history):
            if place == restart:
                state = {key: np.array(value) for key, value in held.state().items()}
                held = ClientStore(SMALL)
                held.restore(state)
            if kind == "structure":
                structures[client] = make_structure(SMALL, seed)
            else:
                scores[client] = make_scores(SMALL, seed)
            for each in (held, straight):
                if kind == "structure":
                    each.put_structure(client, structures[client])
                else:
                    each.put_scores(client, scores[client])
        assert states_equal(held.state(), straight.state())
        for client in range(10):
            assert (client in held) == (client in structures or client in scores)
            assert held.structure(client).same_as(structures.get(client, Structure.full(SMALL)))
            if client in scores:
                assert_same_scores(held.scores(client), as_stored(scores[client]))
            else:
                assert held.scores(client) is None
        if scores:
            stored = [as_stored(each) for each in scores.values()]
            fleet = held.fleet_scores()
            for name in ("heads", "channels"):
                mean = np.mean([getattr(each, name) for each in stored], axis=0)
                # The bound of the module, for sums that may have held the largest score that the generator makes.
                np.testing.assert_allclose(getattr(fleet, name), mean, rtol=1e-15, atol=3 * 10 * 2.0**-53 * 100 * 10)
        else:
            assert held.fleet_scores() is None


def test_the_running_sum_does_not_drift():
    """20,000 replacements over scores of very unequal size; the mean stays within the bound of the module."""
    held, latest = ClientStore(SMALL), {}
    draw = np.random.default_rng(0)
    for _ in range(20_000):
        client = int(draw.integers(50))
        scale = 10.0 ** draw.uniform(-3, 0)
        latest[client] = GroupScores(scale * draw.random((2, 3)), scale * draw.random((2, 7)))
        held.put_scores(client, latest[client])
    mean = np.mean([as_stored(each).channels for each in latest.values()], axis=0)
    assert np.abs(held.fleet_scores().channels - mean).max() <= 3 * 50 * 2.0**-53 * 50 / 50


def test_a_huge_score_that_came_and_went_leaves_no_trace():
    """1e30 wipes every digit of the running sum; as many replacements as there are clients bring them back."""
    held = ClientStore(SMALL)
    for client in range(5):
        held.put_scores(client, make_scores(SMALL, client))
    held.put_scores(0, GroupScores(np.full((2, 3), 1e30), np.full((2, 7), 1e30)))
    for client in range(5):
        held.put_scores(client, make_scores(SMALL, 10 + client))
    stored = [as_stored(make_scores(SMALL, 10 + client)).heads for client in range(5)]
    np.testing.assert_allclose(held.fleet_scores().heads, np.mean(stored, axis=0), rtol=1e-14)


def test_bytes_of_a_client_with_roberta_base():
    """At most 200 KB each for structure and averages; nothing for clients that never took part."""
    shape = load_shape("roberta-base")
    held = ClientStore(shape)
    empty = held.nbytes
    assert empty < 400_000  # the running sum
    structure, scores = make_structure(shape, 0), make_scores(shape, 0)
    for client in range(0, 300_000, 3_000):
        held.put_structure(client, structure)
        held.put_scores(client, scores)
    assert 152_000 < (held.nbytes - empty) / 100 < 200_000
    assert sum(array.nbytes for array in held.state().values()) / 100 < 200_000
    before = held.nbytes
    for client in range(1, 300_000, 3_000):
        assert held.structure(client).head_mask.all()
        assert held.scores(client) is None
    for client in range(0, 300_000, 3_000):
        held.put_scores(client, scores)
    assert held.nbytes == before


def test_what_is_read_is_not_the_store_itself():
    held = ClientStore(SMALL)
    held.put_structure(1, make_structure(SMALL, 1))
    held.put_scores(1, make_scores(SMALL, 1))
    before = {key: value.copy() for key, value in held.state().items()}
    held.structure(1).head_mask[:] ^= True
    held.structure(2).head_mask[:] = False
    held.scores(1).heads[:] = 7
    held.fleet_scores().heads[:] = 7
    held.state()["score_sum"][:] = 7
    held.state()["scores"][:] = 7
    assert states_equal(held.state(), before)
    assert held.structure(2).head_mask.all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
def test_scores_that_float32_cannot_hold_are_refused(bad):
    held = ClientStore(SMALL)
    held.put_scores(1, make_scores(SMALL, 1))
    before = held.state()
    with pytest.raises(ValueError, match="client 3: averaged group scores must be finite"):
        held.put_scores(3, GroupScores(np.full((2, 3), bad), np.zeros((2, 7))))
    assert states_equal(held.state(), before)
