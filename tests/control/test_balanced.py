"""`balanced` on devices that no profile describes, against `oracle`, which is told their times."""

import ast
import inspect

import numpy as np
import pytest
from control_toys import ToyAsk, ToyFleet, play

from fedsim.contracts.control import Feedback, RoundContext
from fedsim.control import balanced, solver
from fedsim.control import time_model as timing
from fedsim.control.policies import PolicyInputs, make_policy
from fedsim.settings import ControlSettings, PruneSettings

FLEETS = {
    "steady": {},
    "compute modes": {"period": 20, "compute_modes": (1.0, 1 / 0.75, 1 / 0.55, 1 / 0.4)},
    "link modes": {"period": 20, "link_modes": (1.0, 1.5, 3.0)},
}


def _both(fleet, ask, **options):
    return {
        name: play(name, ask=ask, expected=fleet.expected, measured=fleet.measured, clients=80, **options)
        for name in ("balanced", "oracle", "uniform")
    }


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_round_time_within_a_tenth_of_the_oracle(kind, seed):
    fleet = ToyFleet(80, seed, **FLEETS[kind])
    # A quarter of a job's steps run after a cut, as in the real job.
    runs = _both(fleet, ToyAsk(change_share=0.25), seed=seed)
    settled = [index for index in range(20, 100) if not fleet.period or index % 20 >= 2]
    time_s = {name: run.duration_s[settled].mean() for name, run in runs.items()}
    assert time_s["balanced"] <= 1.10 * time_s["oracle"]
    assert time_s["balanced"] < 0.85 * time_s["uniform"]
    assert runs["balanced"].duration_s.sum() < runs["uniform"].duration_s.sum()
    assert runs["balanced"].idle[-20:].mean() < 0.5 * runs["uniform"].idle[-20:].mean()


@pytest.mark.parametrize("groups", [4, 100])
@pytest.mark.parametrize("participants", [8, 80])
def test_mean_ratio_is_on_schedule(groups, participants):
    fleet = ToyFleet(80, 5)
    run = play(
        "balanced",
        ask=ToyAsk(groups=groups),
        expected=fleet.expected,
        measured=fleet.measured,
        clients=80,
        participants=participants,
        rounds=60,
    )
    for ratio, schedule, (low, high) in zip(run.ratios, run.schedule, run.reachable, strict=True):
        assert ratio.mean() == pytest.approx(min(max(schedule, low), high), abs=1e-6)


def test_sampled_participation_still_pays():
    fleet = ToyFleet(80, 6)
    runs = _both(fleet, ToyAsk(), participants=8, rounds=150, warmup=20, end=110)
    totals = {name: run.duration_s[40:].sum() for name, run in runs.items()}
    assert totals["balanced"] < 1.10 * totals["oracle"]
    assert totals["balanced"] < 0.85 * totals["uniform"]


def test_irreversible_pruning_and_noisy_times():
    prune = PruneSettings(target=0.5, target_scope="fleet_mean", max_ratio=0.8)
    fleet = ToyFleet(80, 7, jitter=0.15)
    runs = _both(fleet, ToyAsk(), prune=prune)
    totals = {name: run.duration_s[20:].sum() for name, run in runs.items()}
    assert totals["balanced"] < 1.15 * totals["oracle"]
    assert totals["balanced"] < totals["uniform"]
    assert (np.diff(np.array(runs["balanced"].ratios), axis=0) >= -1e-12).all()


def _context(index, high=0.0):
    return RoundContext(
        index, np.arange(6), np.zeros(6), np.zeros(6), np.full(6, high), schedule_ratio=0.0, ratio_max=0.8, step_max=0.8
    )


def test_warm_up_varies_the_rank_and_later_ranks_climb_by_steps():
    ask, fleet = ToyAsk(), ToyFleet(6, 0)
    policy = make_policy(PolicyInputs(ControlSettings(policy="balanced"), clients=6, ask=ask, seed=0, fixed_rank=8))
    ids = np.arange(6)

    def teach(index, arms, rank):
        work = ask.work(np.zeros(6), arms.ratio, rank)
        time_s = fleet.measured(index, ids, work)
        policy.update(Feedback(index, ids, np.zeros(6), arms.ratio, rank, work, time_s, time_s > 0, time_s))

    for index, place in enumerate((0, 4, 1, 3)):
        arms = policy.select(_context(index))
        np.testing.assert_array_equal(arms.rank, ask.ranks[place])
        teach(index, arms, arms.rank)
    # Pretend that the smallest rank was played for some rounds: one step up is all that spare time may buy.
    for index in range(4, 8):
        arms = policy.select(_context(index, high=0.8))
        if index > 4:
            assert arms.rank.max() == ask.ranks[1]
        teach(index, arms, np.full(6, ask.ranks[0]))


def test_absent_updates_teach_nothing():
    ask = ToyAsk()
    policy = make_policy(PolicyInputs(ControlSettings(policy="balanced"), clients=6, ask=ask, seed=0, fixed_rank=8))
    before = policy.state()
    context = _context(0)
    arms = policy.select(context)
    work = ask.work(np.zeros(6), arms.ratio, arms.rank)
    nothing = np.full(6, np.nan)
    here = np.zeros(6, dtype=bool)
    policy.update(Feedback(0, context.clients, np.zeros(6), arms.ratio, arms.rank, work, nothing, here, nothing))
    for key, array in policy.state().items():
        np.testing.assert_array_equal(array, before[key])


def test_balanced_cannot_see_a_profile():
    allowed = {
        "numpy",
        "dataclasses",
        "collections.abc",
        "__future__",
        "fedsim.contracts.common",
        "fedsim.contracts.control",
        "fedsim.state",
    }
    for module in (balanced, solver, timing):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name in allowed or name.startswith("fedsim.control."), f"{module.__name__} imports {name}"


def test_ten_thousand_clients_are_no_matter():
    fleet = ToyFleet(10_000, 0)
    run = play("balanced", ask=ToyAsk(), expected=fleet.expected, measured=fleet.measured, clients=10_000, rounds=13)
    assert run.ratios[-1].mean() == pytest.approx(run.schedule[-1], abs=1e-6)
