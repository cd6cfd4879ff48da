"""A selection rule of one's own: clients take turns."""

import numpy as np
import pytest

import fedsim
from fedsim.errors import ConfigError
from fedsim.study.regret import regret

TIMING = {
    "method": "fedspine_uniform",
    "fleet": {"clients": 7},
    "server": {"rounds": 5, "clients_per_round": 3},
    "train": {"engine": "none"},
}


def in_turn(candidates, count, context):
    return np.roll(candidates, -count * context.round_index)[:count]


def chosen(run):
    return run.client_rounds.groupby("round")["client"].apply(list).tolist()


def test_clients_take_turns(tmp_path):
    fedsim.register_selection("in_turn", in_turn)
    run = fedsim.run(TIMING, out=tmp_path / "run", quiet=True, server__selection="in_turn")
    assert chosen(run) == [[0, 1, 2], [3, 4, 5], [0, 1, 6], [2, 3, 4], [0, 5, 6]]
    assert run.config["server"]["selection"] == "in_turn"
    assert len(regret(run).rounds) == 5  # replayed with the same rule

    more = fedsim.run(
        TIMING, out=tmp_path / "more", quiet=True, server__selection="in_turn", server__over_selection=0.5
    )
    assert chosen(more)[:2] == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6]]


@pytest.mark.parametrize(
    ("answer", "said"),
    [([0, 1], "chose 2: 0, 1"), ([4, 4, 4], "chose 1: 4"), ([0, 1, 7], "chose 3: 0, 1, 7"), ([], "chose 0: none")],
)
def test_a_wrong_answer_is_refused(tmp_path, answer, said):
    fedsim.register_selection("wrong", lambda candidates, count, context: np.array(answer, dtype=np.int64))
    with pytest.raises(ConfigError, match=rf"'wrong' must choose 3 different clients of the 7.*round 0 it {said}"):
        fedsim.run(TIMING, out=tmp_path / "run", quiet=True, server__selection="wrong")


def test_a_misspelt_one_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown server\.selection 'unifrom'; did you mean 'uniform'\?"):
        fedsim.run(TIMING, out=tmp_path / "run", quiet=True, server__selection="unifrom")
    assert not (tmp_path / "run").exists()
