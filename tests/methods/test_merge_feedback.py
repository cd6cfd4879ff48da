"""What a merge hands on: every number that the policy, the reward and the evaluation get, against the report.

The report has no two moments alike and the participants are not the whole fleet, so that a number taken from another
place shows.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from test_federation import SHAPE, ToyLearner, make

from fedsim.contracts.common import Labels, Outcome
from fedsim.contracts.control import Arms, Feedback, Work
from fedsim.contracts.flights import Arrivals
from fedsim.control.reward import RewardModel
from fedsim.structure import achieved_ratio, kept_counts

FLEET, CLIENTS = 7, np.array([0, 2, 3, 4, 6])
START_S = 100.0
DOWNLOAD_START_S = np.array([101.0, 102.5, 101.25, 104.0, 103.0])
DOWNLOAD_END_S = np.array([105.0, 108.0, 109.5, 107.0, 111.0])
COMPUTE_END_S = np.array([120.0, 131.0, 127.0, 109.0, 142.0])
UPLOAD_END_S = np.array([123.0, 138.0, 131.0, 109.5, 147.5])
TIME_S = np.array([23.0, 38.0, np.nan, np.nan, 47.5])
"""From dispatch to the end of upload, of those that arrived."""
OUTCOME = np.array([Outcome.OK, Outcome.OK, Outcome.LATE, Outcome.OUT_OF_MEMORY, Outcome.OK])
ARRIVED = np.array([True, True, False, False, True])
TRAINED = np.array([True, False, False, False, True])
"""Client 2 arrives with a loss that is not finite."""


class Learner(ToyLearner):
    """Results of which no two are alike."""

    def result(self, tickets):
        plain = super().result(tickets)
        return replace(
            plain,
            loss_before=1.0 + 0.1 * plain.clients,
            loss_after=0.9 - 0.02 * plain.clients,
            lora_importance=3.0 + plain.clients,
        )


class Watched:
    """A policy of arms that differ between clients; keeps what it is told."""

    def __init__(self):
        self.told = []

    def select(self, context):
        spread = np.linspace(0.2, 0.8, len(context.clients))
        ratio = context.ratio_low + spread * (context.ratio_high - context.ratio_low)
        return Arms(ratio, np.array([2, 4, 8, 4, 2])[: len(context.clients)])

    def update(self, feedback):
        self.told.append(feedback)


class WatchedReward(RewardModel):
    """A reward model that keeps what it is given."""

    def compute(self, **given):
        self.given = given
        return super().compute(**given)


def report_of(plan, outcome=OUTCOME):
    count = len(plan.clients)
    return Arrivals(
        merge_index=int(plan.version[0]),
        start_s=90.0,
        end_s=150.0,
        flights=plan,
        device=Labels(np.zeros(count, dtype=np.int64), np.array(["d"])),
        mode=Labels(np.zeros(count, dtype=np.int64), np.array(["m"])),
        download_start_s=DOWNLOAD_START_S,
        download_end_s=DOWNLOAD_END_S,
        compute_end_s=COMPUTE_END_S,
        upload_end_s=UPLOAD_END_S,
        released_s=np.full(count, 149.0),
        bytes_down=1.0 + np.arange(count),
        bytes_up=20.0 + np.arange(count),
        energy_joules=40.0 + np.arange(count),
        outcome=outcome,
    )


@pytest.fixture
def merged():
    """(plan before, plan, learned, feedback, what the reward was given, learner) of the second of two rounds."""
    federation, learner = make(clients=FLEET, learner=Learner())
    policy = Watched()
    reward = WatchedReward(federation.parts.config.reward, FLEET)
    object.__setattr__(federation.parts, "policy", policy)
    object.__setattr__(federation.parts, "reward", reward)
    first = federation.dispatch(CLIENTS, 4, START_S)
    federation.merge(report_of(first, np.full(len(CLIENTS), Outcome.OK)))
    learner.failing = {2}
    plan = federation.dispatch(CLIENTS, 7, START_S)
    learned = federation.merge(report_of(plan))
    return first, plan, learned, policy.told[-1], reward, learner, federation


def test_every_field_of_the_feedback_against_the_report(merged):
    first, plan, learned, told, *_ = merged
    expected = {
        "round_index": 7,
        "clients": CLIENTS,
        "ratio_before": first.ratio_asked,
        "ratio": plan.ratio_asked,
        "rank": np.array([2, 4, 8, 4, 2]),
        "time_s": TIME_S,
        "arrived": ARRIVED,
        "reward": learned.rewards.reward,
    }
    assert {field.name for field in fields(Feedback)} == {*expected, "work"}
    for name, value in expected.items():
        np.testing.assert_array_equal(getattr(told, name), value, err_msg=name)
    for field in fields(Work):
        np.testing.assert_array_equal(getattr(told.work, field.name), getattr(plan.work, field.name))
    assert len(np.unique(told.ratio)) == len(np.unique(told.ratio_before)) == len(CLIENTS)
    assert (np.isfinite(told.reward) == TRAINED).all()


def test_every_argument_of_the_reward_against_the_report(merged):
    first, plan, _, _, reward, *_ = merged
    expected = {
        "loss_before": np.where(ARRIVED, 1.0 + 0.1 * CLIENTS, np.nan),
        "loss_after": np.where(ARRIVED, 0.9 - 0.02 * CLIENTS, np.nan),
        "ratio_before": first.ratio_asked,
        "ratio": plan.ratio_asked,
        "lora_importance": np.where(ARRIVED, 3.0 + CLIENTS, np.nan),
        "time_s": TIME_S,
        "arrived": TRAINED,
        "step_max": 1.0,
        "target": 0.5,
    }
    assert reward.given.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(reward.given[name], value, err_msg=name)


def test_what_is_recorded_of_a_merge_against_the_report(merged):
    first, plan, learned, told, reward, *_ = merged
    np.testing.assert_array_equal(learned.loss_before, reward.given["loss_before"])
    np.testing.assert_array_equal(learned.loss_after, reward.given["loss_after"])
    np.testing.assert_array_equal(learned.lora_importance, reward.given["lora_importance"])
    assert learned.outcome.tolist() == [
        Outcome.OK,
        Outcome.NON_FINITE,
        Outcome.LATE,
        Outcome.OUT_OF_MEMORY,
        Outcome.OK,
    ]
    assert (plan.flight == 1).all()
    assert (plan.steps == 4).all()
    whole = kept_counts(SHAPE, np.where(TRAINED, told.ratio, first.ratio_asked))
    np.testing.assert_array_equal(learned.ratio, achieved_ratio(SHAPE, whole[0][:, None], whole[1][:, None]))


def test_the_consensus_is_cut_to_the_mean_of_what_was_asked_of_the_whole_fleet(merged):
    """Not to that of the participants, of those that arrived, of the arms just played or of what whole heads allow."""
    first, plan, learned, _, _, learner, federation = merged
    asked = np.zeros(FLEET)
    asked[CLIENTS] = np.where(TRAINED, plan.ratio_asked, first.ratio_asked)
    assert learned.accuracy is not None
    assert learner.panels == [((0, 3), pytest.approx(asked.mean(), rel=1e-12))]
    others = (
        asked[CLIENTS].mean(),
        plan.ratio_asked.mean(),
        plan.ratio_asked.sum() / FLEET,
        learned.ratio.mean(),
        federation.final_sparsity().mean,
    )
    assert all(abs(asked.mean() - other) > 1e-6 for other in others)
