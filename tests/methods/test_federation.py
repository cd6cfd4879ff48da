"""The strategy behind the server, with a toy learner whose every call is written down."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedsim.contracts.common import Labels, Outcome
from fedsim.contracts.control import Arms
from fedsim.contracts.flights import Arrivals
from fedsim.contracts.learning import Evaluation
from fedsim.control.policies import PolicyInputs, make_policy
from fedsim.control.reward import RewardModel
from fedsim.cost.ask import JobSetting, ShapeAsk
from fedsim.cost.shapes import load_shape
from fedsim.cost.workload import StepSetting
from fedsim.errors import ConfigError
from fedsim.federation.federation import Federation
from fedsim.federation.parts import Parts
from fedsim.learn.standins.timing_only import TimingLearner
from fedsim.methods.catalogue import method_named
from fedsim.runner.config import build_config
from fedsim.structure import achieved_ratio, kept_counts

SHAPE = load_shape("roberta-base")


class ToyLearner(TimingLearner):
    """A timing learner with losses, that fails on chosen clients and remembers what was asked of it."""

    def __init__(self, failing=()):
        super().__init__(SHAPE)
        self.failing = set(failing)
        self.submitted = {}
        self.trained, self.discarded, self.aggregated, self.cuts, self.panels = [], [], [], [], []

    def submit(self, requests):
        tickets = super().submit(requests)
        self.submitted.update(zip(tickets.tolist(), requests.singles(), strict=True))
        return tickets

    def result(self, tickets):
        self.trained += [self.submitted[ticket] for ticket in tickets.tolist()]
        return self._with_losses(super().result(tickets))

    def peek(self, tickets):
        self.trained += [self.submitted[ticket] for ticket in tickets.tolist()]
        return self._with_losses(super().peek(tickets))

    def _with_losses(self, plain):
        count = len(plain.clients)
        outcome = np.where(np.isin(plain.clients, list(self.failing)), Outcome.NON_FINITE, Outcome.OK)
        return replace(plain, loss_before=np.full(count, 1.0), loss_after=np.full(count, 0.5), outcome=outcome)

    def discard(self, tickets):
        self.discarded += [self.submitted[ticket].client for ticket in tickets.tolist()]
        super().discard(tickets)

    def aggregate(self, results, mix=1.0, weights=None):
        self.aggregated.append(results.clients.tolist())

    def cut(self, clients, ratios):
        self.cuts.append(np.array(ratios))
        return super().cut(clients, ratios)

    def evaluate(self, panel, consensus_ratio):
        self.panels.append((tuple(panel), consensus_ratio))
        return Evaluation(0.75, 0.5, 0.7)


def make(tree=None, clients=6, learner=None):
    base = {
        "method": "fedspine_uniform",
        "server": {"rounds": 10},
        "prune": {"warmup_rounds": 2, "end_round": 8, "max_step": 1.0},
        "train": {"local_steps": 4},
        "evaluate": {"every_rounds": 4},
    }
    config = build_config(base, tree or {})
    method = method_named(config.method)
    step = StepSetting(batch_size=8, seq_len=64, precision="fp32", tuning="lora", train_top_layers=None)

    def ask_of(program):
        return ShapeAsk(SHAPE, SHAPE, JobSetting.of(program, step, 1, sends_scores=method.prunes), (2, 4, 8))

    ask = ask_of(method.local_program(2, config))
    learner = learner or ToyLearner()
    policy = make_policy(PolicyInputs(config.control, clients=clients, ask=ask, seed=0, fixed_rank=8))
    parts = Parts(
        config, method, learner, policy, RewardModel(config.reward, clients), ask_of, clients, clients, np.array([0, 3])
    )
    return Federation(parts), learner


def report(plan, outcomes=None, start_s=0.0):
    count = len(plan.clients)
    ends = start_s + np.linspace(10.0, 20.0, count)
    return Arrivals(
        merge_index=int(plan.version[0]),
        start_s=start_s,
        end_s=float(ends.max()),
        flights=plan,
        device=Labels(np.zeros(count, dtype=np.int64), np.array(["d"])),
        mode=Labels(np.zeros(count, dtype=np.int64), np.array(["m"])),
        download_start_s=np.full(count, start_s),
        download_end_s=np.full(count, start_s + 1.0),
        compute_end_s=ends - 1.0,
        upload_end_s=ends,
        released_s=np.full(count, ends.max()),
        bytes_down=plan.work.download_bytes,
        bytes_up=plan.work.upload_bytes,
        energy_joules=np.ones(count),
        outcome=np.array(outcomes or [Outcome.OK] * count, dtype=np.int64),
    )


def play(federation, rounds, clients=6, outcomes=None):
    learned = []
    for index in rounds:
        plan = federation.dispatch(np.arange(clients), index, 0.0)
        learned.append((plan, federation.merge(report(plan, outcomes))))
    return learned


def test_nothing_is_pruned_in_warm_up_and_the_target_is_met_after_the_final_cut():
    federation, learner = make()
    learned = play(federation, range(10))
    targets = np.array([plan.ratio_asked.mean() for plan, _ in learned])
    assert (targets[:2] == 0).all()
    assert (np.diff(targets) >= 0).all()
    assert not any(request.program.cuts for request in learner.trained if request.version < 2)
    assert all(request.program.cuts for request in learner.trained if request.version >= 2)
    assert len(learner.cuts) == 1
    assert federation.final_sparsity().mean == pytest.approx(0.5, abs=1e-3)


def test_evaluation_comes_every_few_rounds_and_at_the_end():
    federation, learner = make()
    learned = play(federation, range(10))
    assert [index for index, (_, round_) in enumerate(learned) if round_.accuracy is not None] == [3, 7, 9]
    assert learner.panels[-1] == ((0, 3), pytest.approx(0.5))


def test_a_run_that_ends_at_its_time_budget_is_cut_and_evaluated_in_that_round():
    federation, learner = make({"server.time_budget_s": 30.0})
    plan = federation.dispatch(np.arange(6), 2, 0.0)
    assert federation.merge(report(plan)).accuracy is None
    plan = federation.dispatch(np.arange(6), 4, 20.0)
    assert federation.merge(report(plan, start_s=20.0)).accuracy is not None
    assert len(learner.cuts) == 1
    assert federation.final_sparsity().mean == pytest.approx(0.5, abs=1e-3)


def test_what_did_not_arrive_is_never_trained_and_keeps_its_ratio():
    federation, learner = make()
    outcomes = [Outcome.LATE, Outcome.OUT_OF_MEMORY, Outcome.DROPPED, Outcome.OK, Outcome.OK, Outcome.OK]
    (plan, learned), (later, _) = play(federation, [4, 5], outcomes=outcomes)
    assert sorted(set(learner.discarded)) == [0, 1, 2]
    assert {request.client for request in learner.trained} == {3, 4, 5}
    assert learner.aggregated == [[3, 4, 5], [3, 4, 5]]
    assert learned.outcome.tolist() == outcomes
    assert np.isnan(learned.loss_before[:3]).all()
    assert np.isnan(learned.rewards.reward[:3]).all()
    assert (learned.ratio[:3] == 0).all()
    assert (later.ratio_before[:3] == 0).all()
    assert (later.ratio_before[3:] == plan.ratio_asked[3:]).all()


def test_a_loss_that_is_not_finite_stops_that_client_only():
    federation, learner = make(learner=ToyLearner(failing=[2]))
    ((plan, learned), (later, _)) = play(federation, [4, 5])
    assert learned.outcome.tolist() == [Outcome.NON_FINITE if client == 2 else Outcome.OK for client in range(6)]
    assert learner.aggregated[0] == [0, 1, 3, 4, 5]
    assert later.ratio_before[2] == 0
    assert (np.delete(later.ratio_before, 2) == np.delete(plan.ratio_asked, 2)).all()


def test_a_round_from_which_nothing_arrived_changes_nothing():
    federation, learner = make()
    ((_, learned),) = play(federation, [4], outcomes=[Outcome.LATE] * 6)
    assert learner.aggregated == [[]]
    assert np.isnan(learned.rewards.reward).all()


def test_an_unpruned_method_never_asks_for_pruning():
    federation, learner = make({"method": "fedlora"})
    play(federation, range(10))
    assert not any(request.program.cuts for request in learner.trained)
    assert not learner.cuts
    assert federation.final_sparsity().mean == 0


@pytest.mark.parametrize("method", ["fedspine", "fedspine_balanced"])
def test_fleet_mean_ends_at_the_target_for_every_controller(method):
    federation, _ = make({"method": method})
    play(federation, range(10))
    sparsity = federation.final_sparsity()
    assert sparsity.mean == pytest.approx(0.5, abs=5e-3)
    heads, channels = kept_counts(SHAPE, 0.8)  # the cap, in whole heads
    assert sparsity.high <= achieved_ratio(SHAPE, [heads], [channels]) + 1e-12


def test_the_learning_rate_falls_linearly():
    federation, learner = make()
    play(federation, range(10))
    rates = {request.version: request.program.phases[0].rate for request in learner.trained}
    assert rates[0] == pytest.approx(1e-3)
    assert rates[5] == pytest.approx(0.5e-3)
    assert rates[9] == pytest.approx(0.1e-3)


@pytest.mark.parametrize("method", ["fedspine", "fedspine_balanced", "fedspine_uniform"])
def test_state_taken_between_rounds_goes_on_identically(method):
    whole, _ = make({"method": method})
    expected = [plan for plan, _ in play(whole, range(10))]
    first, _ = make({"method": method})
    play(first, range(5))
    second, _ = make({"method": method})
    second.restore({name: np.array(value) for name, value in first.state().items()})
    for plan, (again, _) in zip(expected[5:], play(second, range(5, 10)), strict=True):
        np.testing.assert_array_equal(plan.ratio_asked, again.ratio_asked)
        np.testing.assert_array_equal(plan.rank, again.rank)


def test_global_selection_counts_the_groups_that_were_really_kept():
    """The clock must see the unequal layers that training chose, not the schedule's equal shares."""
    federation, learner = make({"prune": {"selection": "global"}, "method": "fedspine_uniform"})
    plan = federation.dispatch(np.arange(6), 4, 0.0)
    assert len(learner.trained) == 6  # trained at dispatch
    ask = federation.round_ask(4, plan.clients)
    expected = ask.work(plan.ratio_before, plan.ratio_asked, plan.rank)
    np.testing.assert_allclose(plan.work.upload_bytes, expected.upload_bytes)  # the toy's layers are alike
    outcomes = [Outcome.LATE] + [Outcome.OK] * 5
    learned = federation.merge(report(plan, outcomes))
    assert learner.aggregated == [[1, 2, 3, 4, 5]]
    assert learned.ratio[0] == 0


@pytest.mark.parametrize(
    ("ratio", "rank", "words"),
    [
        (2.0, 4, r"'uniform' chose 2.0 for client 0 in round 4; it must be within"),
        (float("nan"), 4, "chose nan for client 0"),
        (0.0, 0, "chose 0 for client 0 in round 4; it must be a rank of 1 to 32"),
        (0.0, 64, "chose 64"),
    ],
)
def test_a_policy_that_breaks_its_bounds_is_named(ratio, rank, words):
    federation, _ = make()

    class Wrong:
        def select(self, context):
            return Arms(np.full(6, ratio), np.full(6, rank))

    object.__setattr__(federation._parts, "policy", Wrong())
    with pytest.raises(ConfigError, match=words):
        federation.dispatch(np.arange(6), 4, 0.0)
