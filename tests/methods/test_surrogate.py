"""The surrogate learner: draws that belong to a client and a round, state that comes back, and formulas that hold."""

from __future__ import annotations

import json
import time
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_surrogate import TREE, made_up_model

from fedsim.contracts.common import Outcome
from fedsim.contracts.learning import LocalRequests
from fedsim.contracts.program import LocalProgram, Phase
from fedsim.cost.shapes import load_shape
from fedsim.errors import ConfigError
from fedsim.learn.standins.surrogate import SurrogateLearner
from fedsim.learn.standins.surrogate_model import Contribution, read_surrogate
from fedsim.methods.catalogue import method_named
from fedsim.methods.surrogate_use import check_use, labels_of_use
from fedsim.runner.config import build_config

SHAPE = load_shape("tiny", 2)
ARRAYS = ("clients", "ratio", "loss_before", "loss_after", "lora_importance", "outcome")


def requests(round_index, clients, ratio=0.3, rank=8, rate=5e-3):
    clients = np.asarray(clients)
    return LocalRequests(
        clients=clients,
        flight=np.full(len(clients), round_index),
        version=round_index,
        ratio_asked=np.broadcast_to(np.asarray(ratio, dtype=float), clients.shape).copy(),
        rank=np.broadcast_to(rank, clients.shape).astype(np.int64),
        program=LocalProgram((Phase(4, rate, estimate=True), Phase(1, rate, cut_before=True))),
    )


def learner(clients=20, model=None, seed=3):
    return SurrogateLearner(model or made_up_model(), SHAPE, clients, seed)


def play(own, rounds, clients, **more):
    """Rounds of all `clients`; the last one's results."""
    for index in rounds:
        results = own.result(own.submit(requests(index, clients, **more)))
        own.aggregate(results)
    return results


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)


def test_the_same_seed_draws_the_same_and_another_does_not():
    assert same(play(learner(), range(4), np.arange(20)), play(learner(), range(4), np.arange(20)))
    other = play(learner(seed=4), range(4), np.arange(20))
    assert not np.isclose(other.loss_before, play(learner(), range(4), np.arange(20)).loss_before).any()


def test_another_client_changes_nobody_elses_draws():
    """In one round against the same progress: later, every participant moves the common model, as in a real one."""
    few, more = learner(20), learner(21)
    for index in (0, 5):
        mine = few.result(few.submit(requests(index, np.arange(20))))
        theirs = more.result(more.submit(requests(index, np.arange(21))))
        for name in ARRAYS:
            assert np.array_equal(getattr(mine, name), getattr(theirs, name)[:20]), name
    some = few.result(few.submit(requests(5, [3, 17])))
    assert np.array_equal(some.loss_after, mine.loss_after[[3, 17]])


def test_state_comes_back_bit_equal():
    whole, begun, resumed = learner(), learner(), learner()
    play(whole, range(6), np.arange(20))
    play(begun, range(3), np.arange(20))
    state = {key: value.copy() for key, value in begun.state().items()}
    assert all(isinstance(value, np.ndarray) for value in state.values())
    play(begun, range(3, 6), np.arange(20))  # what goes on must not reach what was written
    resumed.restore(state)
    assert same(play(resumed, range(3, 6), np.arange(20)), play(learner_at(3), range(3, 6), np.arange(20)))
    assert resumed.evaluate(np.arange(3), 0.3) == whole.evaluate(np.arange(3), 0.3)


def learner_at(rounds):
    own = learner()
    play(own, range(rounds), np.arange(20))
    return own


def test_a_job_is_frozen_at_dispatch():
    own = learner()
    early = own.submit(requests(0, [5]))
    play(own, range(1, 8), np.arange(10, 20))
    late = own.submit(requests(8, [5]))
    both = own.result(np.concatenate([late, early]))
    alone = learner()
    assert both.loss_before[1] == alone.result(alone.submit(requests(0, [5]))).loss_before[0]
    assert both.loss_before[0] < both.loss_before[1]
    with pytest.raises(KeyError):
        own.result(early)


def test_what_waits_is_resumed_as_it_was_frozen():
    """Two versions in flight: their progress and dose at dispatch come back, and the tickets."""
    whole, resumed = learner(), learner()
    early = whole.submit(requests(0, np.arange(4)))
    play(whole, range(1, 3), np.arange(10, 20))
    late = whole.submit(requests(3, np.arange(4, 8), rate=1e-3))
    whole.discard(early[:1])
    assert same(whole.peek(late), whole.peek(late))
    resumed.restore({key: value.copy() for key, value in whole.state().items()})
    tickets = np.concatenate([late, early[1:]])
    assert same(whole.result(tickets), resumed.result(tickets))
    assert whole.state().keys() == {"progress", "ratio"} == resumed.state().keys()


def test_shares_of_contributions_add_up():
    """Progress of a merge: the mean contribution, each by its weight, and of the mean the share `mix`."""
    one, other = learner(), learner()
    results = one.result(one.submit(requests(0, np.arange(4))))
    one.aggregate(results, mix=0.5, weights=np.array([1.0, 0.0, 0.0, 0.0]))
    other.aggregate(results)
    assert one.state()["progress"] == pytest.approx(other.state()["progress"] / 8.0)


def test_nobodys_update_moves_nothing_and_discarded_jobs_are_gone():
    own = learner()
    before = own.state()
    tickets = own.submit(requests(0, np.arange(4)))
    own.discard(tickets[2:])
    results = own.result(tickets[:2])
    own.aggregate(results.take(np.zeros(2, dtype=bool)))
    assert all(np.array_equal(value, own.state()[key]) for key, value in before.items())
    with pytest.raises(KeyError):
        own.result(tickets[2:])


def test_results_are_whole_records():
    results = play(learner(), range(2), np.arange(20), ratio=np.linspace(0, 0.7, 20))
    assert (results.outcome == Outcome.OK).all()
    assert all(part.shape == (20, SHAPE.layers) for part in (*results.kept_before, *results.kept_after))
    assert {field.name for field in fields(results)} >= set(ARRAYS)
    assert results.ratio == pytest.approx(np.linspace(0, 0.7, 20), abs=0.13)  # whole heads: four a layer
    assert np.isfinite(results.lora_importance).all()
    assert (results.lora_importance > 0).all()


def test_without_noise_losses_follow_the_formulas():
    """An independent transcription, client by client."""
    model = made_up_model(noise={"client": 0.0, "before": 0.0, "after": 0.0})
    own, curve, local = learner(3, model), TREE["curve"], TREE["local"]
    progress, ratio_before = 0.0, np.zeros(3)
    for index in range(6):
        rank, rate = np.array([2, 8, 16]), 5e-3 * (1 - index / 8)
        results = own.result(own.submit(requests(index, np.arange(3), ratio=0.1 * index, rank=rank, rate=rate)))
        own.aggregate(results)
        contributions = []
        for client in range(3):
            dose = rate * 5 / TREE["first_dose"]
            contribution = dose * min(3.0, max(0.1, 1 + 0.2 * np.log2(rank[client] / 6.0)))
            contributions.append(contribution)

            def expected(at, ratio):
                h = at**4 / (3.1**4 + at**4)
                return h, curve["start"] + curve["damage"] * ratio**2 - h * (
                    curve["drop"] + curve["tail"] * np.log(1 + at)
                )

            ratio = results.ratio[client]
            start = min(ratio, ratio_before[client])
            _, before = expected(progress, start)
            h, ahead = expected(progress + local["advance"] * contribution, ratio)
            after = before + local["level"] * (0.2 + 0.8 * h) + local["change"] * (ahead - before)
            after += local["cut"] * h * max(0.0, ratio - start)
            assert np.log(results.loss_before[client]) == pytest.approx(before)
            assert np.log(results.loss_after[client]) == pytest.approx(after)
        progress += np.mean(contributions)
        ratio_before = results.ratio


def test_clients_differ_by_the_fitted_spread():
    many = learner(20_000)
    results = [play(many, [index], np.arange(20_000), ratio=0.0) for index in range(30)][-1]
    again = many.result(many.submit(requests(30, np.arange(20_000), ratio=0.0)))
    logs = np.log([results.loss_before, again.loss_before])
    assert logs.std(axis=1) == pytest.approx([0.5, 0.5], rel=0.03)  # sqrt(0.4^2 + 0.3^2)
    assert np.corrcoef(logs)[0, 1] == pytest.approx(0.4**2 / 0.5**2, abs=0.03)


def test_losses_stay_within_what_was_seen():
    narrow = {**TREE["seen"], "loss_before": [0.2, 0.6], "loss_after": [0.15, 0.5]}
    own = learner(500, made_up_model(seen=narrow))
    for index in range(10):
        results = play(own, [index], np.arange(500))
        assert results.loss_before.min() >= 0.2 - 1e-12
        assert results.loss_before.max() <= 0.6 + 1e-12
        assert results.loss_after.min() >= 0.15 - 1e-12
        assert results.loss_after.max() <= 0.5 + 1e-12


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.floats(0.0, 0.7), st.floats(0.0, 0.7))
def test_tests_rise_with_progress_and_fall_with_pruning(rounds, one, other):
    low, high = sorted((one, other))
    own = learner(4)
    if rounds:
        play(own, range(rounds), np.arange(4))
    own.cut(np.arange(4), np.full(4, low))
    mild = own.evaluate(np.arange(2), low)
    own.cut(np.arange(4), np.full(4, high))
    harsh = own.evaluate(np.arange(2), high)
    assert harsh.accuracy <= mild.accuracy
    assert harsh.loss >= mild.loss
    own.aggregate(own.result(own.submit(requests(rounds, np.arange(4), ratio=high))))
    later = own.evaluate(np.arange(2), high)
    assert later.accuracy >= harsh.accuracy
    assert later.loss <= harsh.loss
    assert 0.0 < later.accuracy < 1.0


def test_rank_contributes_within_bounds():
    contribution = Contribution(rank_reference=8.0, rank_slope=0.8)
    assert contribution.of(np.array([1, 8, 1024])).tolist() == [0.1, 1.0, 3.0]


def test_without_importance_the_reward_goes_without():
    results = play(learner(model=made_up_model(importance=None)), range(2), np.arange(20))
    assert np.isnan(results.lora_importance).all()


def test_ten_thousand_clients_cost_less_than_ten_microseconds_each():
    own, clients = learner(10_000), np.arange(10_000)
    own_s = []
    for index in range(5):
        began_s = time.perf_counter()
        play(own, [index], clients)
        own.evaluate(clients[:8], 0.3)
        own_s.append(time.perf_counter() - began_s)
    assert min(own_s) < 10e-6 * 10_000


# -- the file ---------------------------------------------------------------------------------------------------------


def write(path, tree):
    path.write_text(json.dumps(tree))
    return path


def test_a_file_is_read_back_whole(tmp_path):
    model, sha256 = read_surrogate(write(tmp_path / "s.json", TREE))
    assert model.model_dump(mode="json") == TREE
    assert len(sha256) == 64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"is damaged \(not JSON\)"),
        (json.dumps([1]), "is no surrogate"),
        (json.dumps({**TREE, "kind": "x"}), "is no surrogate"),
        (json.dumps({**TREE, "schema_version": 7}), "has schema 7 and this version reads 1"),
        (json.dumps({key: value for key, value in TREE.items() if key != "curve"}), "is damaged .'curve': field"),
        (json.dumps({**TREE, "first_dose": float("nan")}), "is damaged .'first_dose'"),
        (json.dumps({**TREE, "noise": {**TREE["noise"], "after": -1.0}}), "is damaged .'noise.after'"),
        (json.dumps({**TREE, "more": 1}), "is damaged .'more'"),
    ],
)
def test_a_file_that_is_not_usable_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "s.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"^train.surrogate: file '.*s.json' {message}"):
        read_surrogate(path)


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"s.json' cannot be read \(No such file or directory\)"):
        read_surrogate(tmp_path / "s.json")


# -- its use ----------------------------------------------------------------------------------------------------------

USE = {
    "method": "fedspine",
    "model": {"name": "tiny", "lora_rank_max": 16},
    "server": {"rounds": 30},
    "train": {"engine": "surrogate", "surrogate": "s.json", "local_steps": 5, "learning_rate": 5e-3},
}


def test_a_use_within_the_source_has_one_label():
    config = build_config(USE)
    check_use(made_up_model(), config, method_named("fedspine"))
    labels = labels_of_use(made_up_model(), config, method_named("fedspine"), 80, (2, 4, 8, 16))
    assert labels == [
        "surrogate: losses and accuracies come from a model fitted to run abcdef012345, not from training"
    ]


def test_what_lies_beyond_the_source_is_labelled_extrapolated():
    config = build_config(
        USE,
        {
            "method": "fedspine_balanced",
            "model.lora_rank_max": 32,
            "prune.max_ratio": 0.9,
            "server.rounds": 60,
            "train.local_steps": 10,
        },
    )
    _, label = labels_of_use(made_up_model(), config, method_named("fedspine_balanced"), 10_000, (2, 4, 8, 16, 32))
    assert label == (
        "extrapolated: pruning ratios 0 to 0.9 (fitted on 0 to 0.8); ranks 2 to 32 (fitted on 2 to 16); progress "
        "0 to 61 (fitted on 0 to 15.5); participants a round 10,000 (fitted on 80); method fedspine_balanced (fitted "
        "on fedspine); train.local_steps 10 (fitted on 5)"
    )


def test_another_model_and_unseen_pruning_are_refused():
    config = build_config({**USE, "model": {"name": "bert-base"}})
    with pytest.raises(ConfigError, match="was fitted to model.name 'tiny', not to 'bert-base'"):
        check_use(made_up_model(), config, method_named("fedspine"))
    never = made_up_model(source={**TREE["source"], "method": "fedlora", "prunes": False})
    with pytest.raises(ConfigError, match="a run of fedlora, which never pruned"):
        check_use(never, build_config(USE), method_named("fedspine"))
    unpruned = {key: value for key, value in USE.items() if key != "method"} | {"method": "fedlora"}
    check_use(never, build_config(unpruned), method_named("fedlora"))
