"""Pruning in one cut, ranks that clients give up, and what a stack costs: the strategy with a toy learner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_federation import SHAPE, ToyLearner, make, play, report

from fedsim.contracts.common import Outcome
from fedsim.contracts.program import LocalProgram, Phase
from fedsim.control.policies import PolicyInputs, make_policy
from fedsim.cost.ask import JobSetting, ShapeAsk
from fedsim.cost.workload import StepSetting
from fedsim.errors import ConfigError, RunError
from fedsim.federation.broadcast import AdapterBroadcast, StackBroadcast, broadcast_of
from fedsim.runner.config import build_config


def priced(estimates, trains=True):
    """What four steps cost, of which one follows a cut that does not come."""
    step = StepSetting(batch_size=8, seq_len=64, precision="fp32", tuning="lora", train_top_layers=None)
    program = LocalProgram(tuple(Phase(steps, 0.1, estimates, trains=trains) for steps in (3, 1)))
    return ShapeAsk(SHAPE, SHAPE, JobSetting.of(program, step, 1, sends_scores=True), (2, 4, 8))


def test_prune_then_tune_cuts_after_a_pass_that_learns_nothing():
    federation, learner = make({"method": "prune_then_tune"})
    learned = play(federation, range(10))
    by_round = {request.version: request.program for request in learner.trained}
    assert by_round[0].dose == 0.0
    assert by_round[0].estimates
    assert all(by_round[index].dose > 0.0 and not by_round[index].estimates for index in range(1, 10))
    assert not any(program.cuts for program in by_round.values())
    assert [targets.tolist() for targets in learner.cuts] == [[0.5] * 6] * 2  # after the pass; the last changes nothing
    assert all((plan.ratio_before == 0.5).all() and (plan.ratio_asked == 0.5).all() for plan, _ in learned[1:])
    # What a round costs: scores and estimates in the pass alone.
    for index, ask in ((0, priced(estimates=True, trains=False)), (1, priced(estimates=False))):
        plan = learned[index][0]
        expected = ask.work(plan.ratio_before, plan.ratio_asked, plan.rank)
        for name in ("flops", "upload_bytes", "peak_memory_bytes"):
            np.testing.assert_array_equal(getattr(plan.work, name), getattr(expected, name))
    assert (learned[0][0].work.upload_bytes > learned[1][0].work.upload_bytes).all()


@pytest.mark.parametrize("recovery", [0, 3])
def test_tune_then_prune_cuts_before_its_recovery_rounds(recovery):
    federation, learner = make({"method": "tune_then_prune", "prune.recovery_rounds": recovery})
    learned = play(federation, range(10))
    cut = 9 - recovery
    assert [float(plan.ratio_asked.max()) for plan, _ in learned] == [0.0] * (cut + 1) + [0.5] * recovery
    assert (learned[cut][1].ratio > 0.45).all()  # achieved after the cut
    estimates = {request.version: request.program.estimates for request in learner.trained}
    assert [index for index in range(10) if estimates[index]] == list(range(cut + 1))
    assert all(request.program.dose > 0 for request in learner.trained)
    assert learner.panels[-1][1] == pytest.approx(0.5)  # the final accuracy is that after the cut
    assert federation.final_sparsity().mean == pytest.approx(0.5, abs=1e-3)


def test_a_run_out_of_time_is_cut_before_its_cut_round():
    federation, learner = make({"method": "tune_then_prune", "server.time_budget_s": 30.0})
    federation.dispatch(np.arange(6), 0, 20.0)
    plan = federation.dispatch(np.arange(6), 0, 20.0)
    federation.merge(report(plan, start_s=20.0))
    assert [targets.tolist() for targets in learner.cuts] == [[0.5] * 6]


@pytest.mark.parametrize("method", ["prune_then_tune", "tune_then_prune"])
def test_one_shot_methods_take_runs_too_short_for_a_schedule(method):
    config = build_config({"method": method, "server": {"rounds": 2}})
    assert config.prune.structure == "common"
    with pytest.raises(ConfigError, match=r"prune\.warmup_rounds"):
        build_config({"method": "fedspine_uniform", "server": {"rounds": 2}, "prune": {"structure": "common"}})


def test_recovery_must_leave_a_round():
    with pytest.raises(ConfigError, match=r"prune\.recovery_rounds: value 10 .* at most 9"):
        build_config({"method": "tune_then_prune", "server": {"rounds": 10}, "prune": {"recovery_rounds": 10}})


def test_self_pruning_needs_a_rule_for_unequal_ranks():
    with pytest.raises(ConfigError, match=r"method_options\.rank_decay: value 0\.9 .* average_factors"):
        build_config(
            {"method": "hetlora", "method_options": {"rank_decay": 0.9}},
            {"aggregate.rule": "average_factors", "control.policy": "uniform"},
        )


class GivingUp(ToyLearner):
    """Client 2 comes back with a component less, every time."""

    def result(self, tickets):
        plain = super().result(tickets)
        asked = np.array([self.submitted[ticket].rank for ticket in tickets.tolist()])
        return replace(plain, rank=np.where(plain.clients == 2, asked - 1, asked))


def test_a_rank_that_was_given_up_is_not_offered_again():
    federation, _ = make({"method": "fedspine_uniform"}, learner=GivingUp())
    ranks = [plan.rank.tolist() for plan, _ in play(federation, range(3))]
    assert ranks == [[8] * 6, [8, 8, 7, 8, 8, 8], [8, 8, 6, 8, 8, 8]]
    other, _ = make({"method": "fedspine_uniform"}, learner=GivingUp())
    other.restore({name: np.array(value) for name, value in federation.state().items()})
    assert other.dispatch(np.arange(6), 3, 0.0).rank.tolist() == [8, 8, 5, 8, 8, 8]


def test_a_client_whose_update_was_late_gives_nothing_up():
    federation, _ = make({"method": "fedspine_uniform"}, learner=GivingUp())
    late = [Outcome.OK, Outcome.OK, Outcome.LATE, Outcome.OK, Outcome.OK, Outcome.OK]
    (_, (plan, _)) = play(federation, range(2), outcomes=late)
    assert plan.rank.tolist() == [8] * 6


def test_stacks_are_taken_once_each():
    """Five clients: who missed rounds takes all of their stacks; what did not arrive is taken again."""
    stacks = StackBroadcast(5)
    everyone = np.arange(5)
    rank = np.array([2, 4, 8, 4, 2])
    assert stacks.received_rank(everyone, rank).tolist() == [0] * 5
    stacks.merged(np.array([0, 1]), rank[:2])
    assert stacks.received_rank(everyone, rank).tolist() == [6] * 5  # a client's own part comes back in the stack
    stacks.merged(np.array([1, 2]), rank[1:3])
    assert stacks.received_rank(everyone, rank).tolist() == [18, 12, 12, 18, 18]
    again = StackBroadcast(5)
    again.restore(stacks.state())
    for one in (stacks, again):
        one.merged(np.array([0]), rank[:1])
        assert one.received_rank(everyone, rank).tolist() == [2, 14, 14, 20, 20]
    with pytest.raises(RunError, match="another aggregate"):
        again.restore({})
    assert isinstance(broadcast_of("lowrank", 5), AdapterBroadcast)
    assert isinstance(broadcast_of("stack", 5), StackBroadcast)


def test_the_clock_counts_the_stack_and_only_its_download_grows():
    tree = {"method": "fedlora", "aggregate.rule": "stack", "control.policy": "uniform"}
    federation, _ = make(tree)
    outcomes = [Outcome.LATE] + [Outcome.OK] * 5
    plans = [plan for plan, _ in play(federation, range(3), outcomes=outcomes)]
    ask = federation._parts.ask_of(federation._parts.method.local_program(0, federation._parts.config))
    zeros = np.zeros(6)
    own = ask.work(zeros, zeros, plans[0].rank)
    for plan, received in zip(plans, ([0] * 6, [40] * 6, [80] + [40] * 5), strict=True):
        expected = ask.work(zeros, zeros, np.array(received)).download_bytes
        np.testing.assert_allclose(plan.work.download_bytes, expected, rtol=1e-12)
        for name in ("flops", "upload_bytes", "peak_memory_bytes"):
            np.testing.assert_array_equal(getattr(plan.work, name), getattr(own, name))
    other, _ = make(tree)
    other.restore({name: np.array(value) for name, value in federation.state().items()})
    later = [one.dispatch(np.arange(6), 3, 0.0).work.download_bytes for one in (federation, other)]
    np.testing.assert_array_equal(*later)


def test_policies_that_are_not_given_what_they_need_say_so():
    config = build_config({"method": "hetlora"})
    with pytest.raises(ConfigError, match="'static_rank' needs the devices' classes"):
        make_policy(PolicyInputs(config.control, clients=3, ask=priced(estimates=False), seed=0, fixed_rank=4))
    assert PolicyInputs.__dataclass_fields__["speed_class"].default is None
