"""The learner behind the joint: freezing, discarding, pruning, growing, aggregating, checkpointing."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedsim.contracts.common import Outcome
from fedsim.contracts.learning import LocalRequest, LocalRequests, LocalResults
from fedsim.contracts.program import LocalProgram, Phase
from fedsim.data.labelled import Corpus, LabelledText
from fedsim.errors import ConfigError
from fedsim.learn.assemble import build_learner, torch_device
from fedsim.runner.config import build_config
from fedsim.structure import Structure

CLIENTS = 4


def make_corpus():
    draw = np.random.default_rng(5)
    labels = draw.integers(0, 2, 60)
    texts = tuple(
        " ".join(f"w{word}" for word in draw.integers(20 * label, 20 * label + 25, draw.integers(3, 9)))
        for label in labels
    )
    text = LabelledText(texts, None, labels.astype(np.int64), None)
    return Corpus(text.take(np.arange(40)), text.take(np.arange(40, 60)), ("no", "yes"))


PARTS = tuple(np.arange(10 * client, 10 * client + 4 + 2 * client) for client in range(CLIENTS))


def make_learner(folder, tree=None, method="fedspine"):
    base = {
        "method": method,
        "model": {"name": str(folder), "lora_rank": 2, "lora_rank_max": 4},
        "train": {"local_steps": 4, "batch_size": 4, "max_length": 16, "torch_device": "cpu"},
        "server": {"rounds": 10},
    }
    config = build_config(base, tree or {})
    return build_learner(config, method != "fedlora", make_corpus(), PARTS)


def request(client, round_index=0, ratio=0.0, rank=2, rate=1e-2, recovery=1):
    phases = (Phase(4 - recovery, rate, estimate=True), Phase(recovery, rate, estimate=True, cut_before=ratio > 0))
    return LocalRequest(client, round_index, round_index, ratio, rank, LocalProgram(phases))


def submit(learner, *requests):
    """Submit single jobs; returns their tickets."""
    tickets = []
    for one in requests:
        columns = LocalRequests(
            clients=np.array([one.client]),
            flight=np.array([one.flight]),
            version=one.version,
            ratio_asked=np.array([one.ratio_asked]),
            rank=np.array([one.rank]),
            program=one.program,
        )
        assert columns.singles() == [one]
        tickets.append(learner.submit(columns))
    return np.concatenate(tickets)


def singles(results):
    """The rows of a `LocalResults`."""
    return [
        SimpleNamespace(
            client=int(client),
            ratio=results.ratio[row],
            loss_before=results.loss_before[row],
            loss_after=results.loss_after[row],
            outcome=results.outcome[row],
            kept_before=tuple(counts[row] for counts in results.kept_before),
            kept_after=tuple(counts[row] for counts in results.kept_after),
            payload=results.payload[row],
        )
        for row, client in enumerate(results.clients)
    ]


def result_of(learner, one):
    (result,) = singles(learner.result(submit(learner, one)))
    return result


def play(learner, requests):
    results = learner.result(submit(learner, *requests))
    learner.aggregate(results.take(results.outcome == Outcome.OK))
    return singles(results)


def slack(shape):
    """Nearest counts stray from the asked ratio by half a group of each kind at most."""
    per_layer = shape.prunable_weights / shape.layers
    return 0.5 * (shape.weights_per_head_group + shape.weights_per_channel) / per_layer + 1e-9


def states_equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@pytest.fixture(params=["bert", "roberta", "llama"])
def learner(request, tiny_folders):
    return make_learner(tiny_folders[request.param])


def test_a_job_is_frozen_at_dispatch(learner):
    """An aggregation between submit and result must not change the job."""
    alone = result_of(learner, request(0))
    frozen = submit(learner, request(0))
    play(learner, [request(1), request(2)])
    (late,) = singles(learner.result(frozen))
    assert late.loss_before == alone.loss_before
    # Not trained in the same company: equal to rounding.
    assert late.loss_after == pytest.approx(alone.loss_after, rel=1e-5)
    fresh = result_of(learner, request(0))
    assert fresh.loss_before != alone.loss_before


def test_a_discarded_job_is_never_trained(learner, monkeypatch):
    trained = []
    real = learner._parts.engine.trainer.train
    monkeypatch.setattr(learner._parts.engine.trainer, "train", lambda jobs: trained.extend(jobs) or real(jobs))
    tickets = submit(learner, *(request(client) for client in range(3)))
    learner.discard(tickets[1:2])
    learner.result(tickets[:1])
    learner.result(tickets[2:])
    assert [job.request.client for job in trained] == [0, 2]
    with pytest.raises(KeyError):
        learner.result(tickets[1:2])


def test_results_do_not_depend_on_the_company(learner):
    """A job trained alone and in a cohort gives the same update to rounding, whatever the order."""
    together = singles(learner.result(submit(learner, *(request(c, rank=2 + 2 * (c % 2)) for c in (2, 0, 1)))))
    assert [result.client for result in together] == [2, 0, 1]
    for result in together:
        alone = result_of(learner, request(result.client, rank=2 + 2 * (result.client % 2)))
        assert (alone.loss_before, alone.loss_after) == pytest.approx((result.loss_before, result.loss_after), rel=1e-5)


def test_pruning_reaches_the_target_and_only_shrinks(learner):
    shape = learner._parts.backbone.shape
    before = Structure.full(shape)
    for round_index, ratio in enumerate((0.25, 0.5, 0.5), start=1):
        (result,) = play(learner, [request(0, round_index, ratio)])
        structure = result.payload.structure
        assert result.ratio == pytest.approx(structure.ratio(shape))
        assert abs(result.ratio - ratio) <= slack(shape)
        assert not (structure.head_mask & ~before.head_mask).any()
        assert not (structure.channel_mask & ~before.channel_mask).any()
        before = structure
    assert result.kept_after[0].tolist() == structure.heads_kept.tolist()


@pytest.mark.parametrize("selection", ["layer_local", "global"])
def test_a_reversible_device_grows_back_at_dispatch(tiny_folders, selection):
    tree = {"prune.reversible": True, "prune.selection": selection}
    learner = make_learner(tiny_folders["roberta"], tree)
    (small,) = play(learner, [request(0, 1, 0.6)])
    (large,) = play(learner, [request(0, 2, 0.3)])
    assert small.ratio > 0.5
    assert abs(large.ratio - 0.3) < 0.12
    kept = [sum(int(counts.sum()) for counts in pair) for pair in (small.kept_after, large.kept_before)]
    assert kept[1] > kept[0]
    fixed = make_learner(tiny_folders["roberta"], {"prune.reversible": False, "prune.selection": selection})
    (small,) = play(fixed, [request(0, 1, 0.6)])
    (same,) = play(fixed, [request(0, 2, 0.6)])
    assert same.payload.structure.same_as(small.payload.structure)


def test_under_global_selection_nothing_comes_back_where_nothing_may(tiny_folders):
    """Random scores per weight take heads before channels: counts of an equal share would bring heads back."""
    tree = {"prune.reversible": False, "prune.selection": "global", "prune.criterion": "random"}
    learner = make_learner(tiny_folders["roberta"], tree)
    (first,) = play(learner, [request(0, 1, 0.3)])
    assert first.kept_after[0].sum() < first.kept_before[0].sum() * 0.7
    (second,) = play(learner, [request(0, 2, 0.35)])
    before, after = first.payload.structure, second.payload.structure
    assert [counts.tolist() for counts in second.kept_before] == [counts.tolist() for counts in first.kept_after]
    assert not (after.head_mask & ~before.head_mask).any()
    assert not (after.channel_mask & ~before.channel_mask).any()


def test_one_common_structure_for_all_when_asked(tiny_folders):
    learner = make_learner(tiny_folders["bert"], {"prune.structure": "common", "prune.target_scope": "every_device"})
    play(learner, [request(client) for client in range(CLIENTS)])
    results = play(learner, [request(client, 1, 0.5) for client in range(CLIENTS)])
    assert all(result.payload.structure.same_as(results[0].payload.structure) for result in results)
    own = make_learner(tiny_folders["bert"])
    play(own, [request(client) for client in range(CLIENTS)])
    results = play(own, [request(client, 1, 0.5) for client in range(CLIENTS)])
    assert not all(result.payload.structure.same_as(results[0].payload.structure) for result in results)


@pytest.mark.parametrize("criterion", ["random", "magnitude"])
def test_static_criteria_need_no_gradients_of_importance(tiny_folders, criterion):
    learner = make_learner(tiny_folders["llama"], {"prune.criterion": criterion})
    (result,) = play(learner, [request(0, 1, 0.5)])
    assert result.payload.scores is None
    assert abs(result.ratio - 0.5) <= slack(learner._parts.backbone.shape)


@pytest.mark.parametrize("recovery", [0, 1, 3])
def test_recovery_steps_train_the_pruned_model(learner, recovery):
    (result,) = play(learner, [request(0, 1, 0.5, recovery=recovery)])
    assert abs(result.ratio - 0.5) <= slack(learner._parts.backbone.shape)
    assert np.isfinite(result.loss_after)


def test_a_loss_that_is_not_finite_stops_that_client_and_no_other(learner):
    tickets = submit(learner, *(request(client, rate=rate) for client, rate in ((0, 1e30), (1, 1e-2))))
    alone = result_of(learner, request(1))
    results = learner.result(tickets)
    broken, fine = singles(results)
    assert broken.outcome == Outcome.NON_FINITE
    assert fine.outcome == Outcome.OK
    assert fine.loss_after == alone.loss_after
    learner.aggregate(results.take(np.array([False, True])))
    assert all(np.isfinite(array).all() for array in learner.state().values() if array.dtype.kind == "f")
    with pytest.raises(ValueError, match="no usable update"):
        learner.aggregate(results)


def test_state_goes_on_identically(tiny_folders):
    one, other = make_learner(tiny_folders["roberta"]), make_learner(tiny_folders["roberta"])
    play(one, [request(0), request(1)])
    play(one, [request(0, 1, 0.3), request(2, 1, 0.5, rank=4)])
    other.restore({key: np.array(value) for key, value in one.state().items()})
    assert states_equal(one.state(), other.state())
    for learner in (one, other):
        play(learner, [request(0, 2, 0.5), request(3, 2, 0.5)])
    assert states_equal(one.state(), other.state())


def test_the_final_cut_reaches_clients_that_never_took_part(learner):
    play(learner, [request(0)])
    achieved = learner.cut(np.arange(CLIENTS), np.full(CLIENTS, 0.5))
    assert (np.abs(achieved - 0.5) <= slack(learner._parts.backbone.shape)).all()


def test_evaluation_is_the_panel_mean_and_restores_nothing_hidden(learner):
    play(learner, [request(0), request(1)])
    first = learner.evaluate(np.array([0, 1, 2]), 0.0)
    again = learner.evaluate(np.array([0, 1, 2]), 0.0)
    assert first == again
    assert first.accuracy == first.accuracy_consensus  # nothing is pruned
    assert 0 <= first.accuracy <= 1


def test_training_fits_the_clients_text(tiny_folders):
    """Twelve rounds bring the loss on the clients' own probe batches well down: the joint really trains."""
    learner = make_learner(tiny_folders["roberta"])
    losses = []
    for round_index in range(12):
        results = play(learner, [request(client, round_index, rate=1e-2) for client in range(CLIENTS)])
        losses.append(np.mean([result.loss_before for result in results]))
    assert losses[0] == pytest.approx(np.log(2), abs=0.05)
    assert losses[-1] < 0.5 * losses[0]


def test_the_exported_adapter_loads_in_plain_peft_with_identical_hidden_states(tiny_folders, tmp_path):
    from peft import PeftModel
    from transformers import AutoModel

    for architecture, folder in tiny_folders.items():
        learner = make_learner(folder, {"train.engine": "reference"})
        play(learner, [request(0), request(1)])
        target = tmp_path / architecture
        learner.export(target)
        plain = PeftModel.from_pretrained(AutoModel.from_pretrained(folder, dtype=torch.float32), target).eval()
        parts = learner._parts
        tester = parts.engine.tester
        tester._model.load(Structure.full(parts.backbone.shape), learner._adapter)
        inputs = {key: value for key, value in tester._batches[0].inputs.items() if key != "token_type_ids"}
        with torch.no_grad():
            ours = parts.backbone.encoder(**inputs).last_hidden_state
            theirs = plain(**inputs).last_hidden_state
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_devices_are_checked():
    assert torch_device("cpu").type == "cpu"
    assert torch_device("auto").type in ("cpu", "cuda")
    for name in ("tpu", "mps", "cuda:99", ""):
        with pytest.raises(ConfigError, match=r"train\.torch_device"):
            torch_device(name)


def test_results_are_frozen_records(learner):
    results = learner.result(submit(learner, request(0)))
    assert isinstance(results, LocalResults)
    with pytest.raises(dataclasses.FrozenInstanceError):
        results.ratio = np.zeros(1)


def test_common_masks_are_one_for_each_ratio_however_late_a_device_is_sampled(tiny_folders):
    tree = {"prune.structure": "common", "prune.target_scope": "every_device"}
    learner = make_learner(tiny_folders["roberta"], {**tree, "prune.reversible": False})
    play(learner, [request(client) for client in range(CLIENTS)])
    play(learner, [request(0, 1, 0.2), request(1, 1, 0.2)])
    play(learner, [request(1, 2, 0.4), request(2, 2, 0.4)])
    results = play(learner, [request(client, 3, 0.6) for client in range(CLIENTS)])
    assert all(result.payload.structure.same_as(results[0].payload.structure) for result in results)
    other = make_learner(tiny_folders["roberta"], {**tree, "prune.reversible": False})
    other.restore({key: np.array(value) for key, value in learner.state().items()})
    assert states_equal(learner.state(), other.state())


@pytest.mark.parametrize("reversible", [False, True])
def test_common_masks_of_unequal_ratios_are_nested(tiny_folders, reversible):
    tree = {"prune.structure": "common", "prune.reversible": reversible}
    learner = make_learner(tiny_folders["bert"], tree)
    play(learner, [request(client) for client in range(CLIENTS)])
    ratios = (0.1, 0.3, 0.5, 0.7)
    for round_index in (1, 2):
        results = play(learner, [request(c, round_index, ratio) for c, ratio in enumerate(ratios)])
        for smaller, larger in zip(results[1:], results[:-1], strict=True):
            inner, outer = smaller.payload.structure, larger.payload.structure
            assert inner.within(outer).same_as(inner)
    achieved = learner.cut(np.arange(CLIENTS), np.full(CLIENTS, 0.7))
    assert np.ptp(achieved) == 0


def test_a_criterion_of_the_user_s_own_takes_the_reference_engine(tiny_folders, monkeypatch):
    from fedsim.learn.entries import CRITERIA, CriterionEntry
    from fedsim.learn.train import importance

    own = CriterionEntry("mine", estimate=lambda model: importance.lora_guided(model))
    monkeypatch.setitem(CRITERIA, "mine", own)
    learner = make_learner(tiny_folders["roberta"], {"prune.criterion": "mine"})
    assert learner.facts["engine"] == "reference"
    (result,) = play(learner, [request(0, 1, 0.5)])
    assert result.ratio > 0.3
    with pytest.raises(ConfigError, match=r"prune\.criterion: .*train\.engine to 'reference'"):
        make_learner(tiny_folders["roberta"], {"prune.criterion": "mine", "train.engine": "sliced"})


def test_an_activation_that_moves_zero_is_masked_and_refused_sliced(make_folder):
    import json

    folder = make_folder("roberta")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "sigmoid"}))
    assert make_learner(folder).facts["engine"] == "masked"
    with pytest.raises(ConfigError, match=r"train\.engine: value 'sliced' .*does not map 0 to 0"):
        make_learner(folder, {"train.engine": "sliced"})


def test_a_memory_budget_below_one_client_is_refused(tiny_folders):
    with pytest.raises(ConfigError, match=r"train\.memory_budget_bytes: value 1 .*one client takes about \d+ bytes"):
        make_learner(tiny_folders["bert"], {"train.memory_budget_bytes": 1})
    assert make_learner(tiny_folders["bert"], {"train.memory_budget_bytes": 10**9}).facts["chunk_clients"] >= 1
