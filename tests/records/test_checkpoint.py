"""Checkpoints: what goes in comes out, and damage or a kill never costs the previous one."""

import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsim.errors import RunError
from fedsim.records.checkpoint import AUTO_SHARE, CheckpointPace, has_checkpoint, load_checkpoint, save_checkpoint

DTYPES = [np.bool_, np.int8, np.int32, np.int64, np.uint8, np.uint64, np.float16, np.float32, np.float64]
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    state=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1), ARRAYS, max_size=4
    ),
    next_round=st.integers(0, 2_000_000),
)
def test_round_trip(tmp_path, state, next_round):
    state.pop("__metadata__", None)
    folder = tmp_path / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    save_checkpoint(folder, next_round, state, {"now_s": 1.5, "hash": "ab", "list": [1, None]})
    loaded_round, loaded, meta = load_checkpoint(folder)
    assert loaded_round == next_round
    assert meta == {"now_s": 1.5, "hash": "ab", "list": [1, None]}
    assert loaded.keys() == state.keys()
    assert all(same(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "array",
    [np.array(3.5), np.empty((0, 4)), np.arange(6.0).reshape(2, 3).T, np.arange(10)[::-2], np.arange(4, dtype=">f8")],
    ids=["0-d", "empty", "transposed", "reversed", "big-endian"],
)
def test_awkward_arrays(tmp_path, array):
    save_checkpoint(tmp_path, 1, {"a": array}, {})
    _, state, _ = load_checkpoint(tmp_path)
    assert state["a"].shape == array.shape
    np.testing.assert_array_equal(state["a"], array)


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([None])])
def test_objects_are_refused(tmp_path, array):
    with pytest.raises(TypeError, match="'a'"):
        save_checkpoint(tmp_path, 1, {"a": array}, {})
    assert not has_checkpoint(tmp_path)


def test_the_last_two_are_kept_in_order_of_rounds_not_of_names(tmp_path):
    for next_round in (999_999, 1_000_000, 1_000_001):
        save_checkpoint(tmp_path, next_round, {"a": np.array(next_round)}, {})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["round-1000000", "round-1000001"]
    assert load_checkpoint(tmp_path)[0] == 1_000_001


def test_layout_has_no_pickle(tmp_path):
    folder = save_checkpoint(tmp_path, 12, {"a": np.arange(3)}, {"x": 1})
    assert folder == tmp_path / "round-000012"
    assert sorted(entry.name for entry in folder.iterdir()) == ["meta.json", "state.safetensors"]
    assert json.loads((folder / "meta.json").read_text())["meta"] == {"x": 1}


def test_without_a_checkpoint(tmp_path):
    assert not has_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(RunError, match=r"no checkpoint in .*--force"):
        load_checkpoint(tmp_path / "checkpoint")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "damage", [truncate, flip, lambda path: path.unlink()], ids=["truncated", "flipped", "missing"]
)
@pytest.mark.parametrize("name", ["state.safetensors", "meta.json"])
def test_damage_is_named_with_its_remedy(tmp_path, name, damage):
    if name == "meta.json" and damage is flip:
        pytest.skip("the last byte of meta.json is white space")
    save_checkpoint(tmp_path, 4, {"a": np.arange(3)}, {})
    save_checkpoint(tmp_path, 5, {"a": np.arange(3)}, {})
    broken = tmp_path / "round-000005" / name
    damage(broken)
    with pytest.raises(RunError) as caught:
        load_checkpoint(tmp_path)
    assert str(broken) in str(caught.value)
    assert f"remove '{tmp_path / 'round-000005'}' to go on from round 4" in str(caught.value)
    # The remedy works.
    shutil.rmtree(tmp_path / "round-000005")
    assert load_checkpoint(tmp_path)[0] == 4


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"next_round": 9, "state_sha256": "x", "meta": {}}', '{"next_round": 5, "meta": {}}']
)
def test_meta_that_is_json_but_not_ours_is_damage(tmp_path, text):
    save_checkpoint(tmp_path, 5, {"a": np.arange(3)}, {})
    (tmp_path / "round-000005" / "meta.json").write_text(text)
    with pytest.raises(RunError, match=r"meta\.json' is damaged.*no older one"):
        load_checkpoint(tmp_path)


class Killed(BaseException):
    """Stands for the end of the process: no handler of ours may tidy up after it."""


@pytest.mark.parametrize("moment", range(20))
def test_killed_at_any_system_call_a_complete_checkpoint_still_loads(tmp_path, monkeypatch, moment):
    """Each of the first `moment` calls that reach the disk succeeds, the next one never returns."""
    save_checkpoint(tmp_path, 1, {"a": np.array(1)}, {})
    save_checkpoint(tmp_path, 2, {"a": np.array(2)}, {})
    calls = 0

    def counted(real):
        def call(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls > moment:
                raise Killed
            return real(*arguments, **keywords)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "mkdir", "unlink", "rmdir", "open"):
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            save_checkpoint(tmp_path, 3, {"a": np.array(3)}, {})
            finished = True
        except Killed:
            finished = False
    next_round, state, _ = load_checkpoint(tmp_path)
    assert next_round in ((3,) if finished else (2, 3))
    assert state["a"] == next_round
    # And the run goes on over whatever was left.
    save_checkpoint(tmp_path, next_round + 1, {"a": np.array(next_round + 1)}, {})
    assert load_checkpoint(tmp_path)[0] == next_round + 1
    assert not list(tmp_path.glob(".*"))


def test_half_written_folders_are_never_read(tmp_path):
    save_checkpoint(tmp_path, 2, {"a": np.array(2)}, {})
    half = tmp_path / ".round-000003.tmp"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"\x08\x00")
    assert load_checkpoint(tmp_path)[0] == 2


def test_a_full_disk_is_one_sentence_and_gives_its_space_back(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 2, {"a": np.array(2)}, {})

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"round-000003'.*disk is full .* bytes"):
            save_checkpoint(tmp_path, 3, {"a": np.zeros(100)}, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["round-000002"]


def test_the_same_round_again_replaces_its_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 2, {"a": np.array(1)}, {})
    save_checkpoint(tmp_path, 2, {"a": np.array(2)}, {})
    assert load_checkpoint(tmp_path)[1]["a"] == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["round-000002"]


def test_a_pace_in_rounds():
    pace = CheckpointPace(3)
    assert [next_round for next_round in range(1, 10) if pace.due(next_round, 0.0)] == [3, 6, 9]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-4, 10.0), st.floats(1e-4, 10.0)), min_size=1, max_size=60))
def test_the_pace_auto_bounds_what_checkpoints_cost(rounds):
    """One after the first round; each costs at most a twentieth of the time to the next."""
    pace, now_s, between_s, costs = CheckpointPace("auto"), 0.0, [], []
    ended_s = 0.0
    for number, (round_s, cost_s) in enumerate(rounds, start=1):
        now_s += round_s
        if pace.due(number, now_s):
            between_s.append(now_s - ended_s)
            pace.wrote(now_s, now_s + cost_s)
            now_s += cost_s
            ended_s = now_s
            costs.append(cost_s)
        else:
            assert now_s - ended_s < AUTO_SHARE * costs[-1] + 1e-9
    assert between_s[0] == rounds[0][0]
    for cost_s, following_s in zip(costs, between_s[1:], strict=False):
        assert cost_s <= following_s / AUTO_SHARE + 1e-9
