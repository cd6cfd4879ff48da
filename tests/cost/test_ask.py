"""What arms ask: phases of a job, fractions of the learner on the clock's shape, traffic."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.contracts.program import ExtraCost, LocalProgram, Phase
from fedsim.cost.ask import JobSetting, ShapeAsk, Share
from fedsim.cost.shapes import load_shape
from fedsim.cost.workload import (
    ADAMW_PASSES,
    OPTIMIZER_LAUNCHES,
    StepSetting,
    importance_work,
    kept_sums,
    lora_weights,
    slicing_work,
    step_work,
)
from fedsim.errors import ConfigError
from fedsim.structure import ModelShape, achieved_ratio, kept_counts

TINY = ModelShape("tiny", "roberta", 2, 64, 4, 4, 16, 256, vocab=400, positions=66, labels=2, pooler_width=64)
BASE = load_shape("roberta-base")
STEP = StepSetting(4, 32)
RANKS = (2, 4, 8, 16, 32)


def job(steps=20, recovery=5, importance_every=5, prunes=True, step=STEP, importance_memory="group"):
    phases = (Phase(steps - recovery, 1e-3, prunes), Phase(recovery, 1e-3, prunes, cut_before=prunes))
    return JobSetting.of(LocalProgram(phases), step, importance_every, prunes, importance_memory)


def slow_work(learner, clock, steps, recovery, every, before, after, rank):
    """A job step by step: (flops, bytes, launches)."""
    start, end = kept_counts(learner, min(before, after)), kept_counts(learner, after)
    dispatched = kept_counts(learner, before)
    pruned = start != end
    total = np.zeros(3)

    def add(work):
        nonlocal total
        total += np.array([work.flops, work.memory_bytes, work.launches], dtype=float)

    def share(counts):
        return [counts[0] / learner.head_groups], [counts[1] / learner.ffn]

    for index in range(1, steps + 1):
        recovering = pruned and index > steps - recovery
        kept = share(end if recovering else start)
        add(step_work(clock, *kept, rank, STEP))
        if every and index % every == 0:
            add(importance_work(clock, kept_sums(clock, STEP, *kept), rank))
    if pruned or dispatched != start:
        heads, channels = share(end)
        weights = clock.prunable_weights
        attention = clock.layers * clock.head_groups * clock.weights_per_head_group
        add(slicing_work(clock, np.array(heads[0] * attention + channels[0] * (weights - attention)), "fp32"))
    return total


@settings(max_examples=60, deadline=None)
@given(
    before=st.floats(0, 0.8),
    after=st.floats(0, 0.8),
    rank=st.sampled_from(RANKS),
    every=st.none() | st.integers(1, 7),
    recovery=st.integers(0, 20),
    clock=st.sampled_from([TINY, BASE]),
)
def test_a_job_is_the_sum_of_its_steps(before, after, rank, every, recovery, clock):
    setting = job(importance_every=every, recovery=recovery)
    work = ShapeAsk(TINY, clock, setting, RANKS).work(before, after, rank)
    slow = slow_work(TINY, clock, 20, recovery, every, before, after, rank)
    assert [float(work.flops), float(work.memory_bytes), float(work.launches)] == pytest.approx(slow, rel=1e-12)


def test_rank_8_of_roberta_base_is_5_3_megabytes_a_way_beside_the_head():
    work = ShapeAsk(BASE, BASE, job(prunes=False), RANKS).work(0.0, 0.0, 8)
    head = 4 * BASE.head_weights
    assert (float(work.download_bytes) - head) / 1e6 == pytest.approx(5.3, abs=0.05)
    assert work.upload_bytes == work.download_bytes
    factors = 12 * (4 * (768 + 768) + 2 * (768 + 3072)) * 8
    assert float(work.download_bytes) == 4 * factors + head


def test_download_has_the_start_structure_and_upload_the_end_and_its_scores():
    work = ShapeAsk(BASE, BASE, job(), RANKS).work(0.25, 0.5, 8)
    kept = {ratio: [c / f for c, f in zip(kept_counts(BASE, ratio), (12, 3072), strict=True)] for ratio in (0.25, 0.5)}
    sent = {
        ratio: 4 * (float(lora_weights(BASE, kept_sums(BASE, STEP, [h], [c]), 8)) + BASE.head_weights)
        for ratio, (h, c) in kept.items()
    }
    assert float(work.download_bytes) == sent[0.25]
    assert float(work.upload_bytes) == sent[0.5] + 4 * 12 * (6 + 1536)


def test_a_falling_ratio_runs_and_downloads_at_the_end_structure():
    ask = ShapeAsk(BASE, BASE, job(), RANKS)
    falling, steady = ask.work(0.5, 0.25, 8), ask.work(0.25, 0.25, 8)
    assert falling.flops == steady.flops
    assert falling.download_bytes == steady.download_bytes
    assert falling.memory_bytes > steady.memory_bytes  # growing back reads and writes weights


def test_pruning_late_costs_between_the_two_structures():
    ask = ShapeAsk(BASE, BASE, job(), RANKS)
    full, cut, half = (float(ask.work(a, b, 8).flops) for a, b in ((0.0, 0.0), (0.0, 0.5), (0.5, 0.5)))
    assert half < cut < full
    assert (full - cut) / (full - half) == pytest.approx(0.25, abs=0.02)  # 5 of 20 steps


def test_grid_equals_single_calls_and_every_field_has_its_shape():
    ask = ShapeAsk(TINY, BASE, job(), RANKS)
    before, ratio = np.array([0.0, 0.3])[:, None, None], np.linspace(0, 0.6, 4)[None, :, None]
    grid = ask.work(before, ratio, ask.ranks)
    for field, values in vars(grid).items():
        assert values.shape == (2, 4, 5), field
        for i, j, k in np.ndindex(2, 4, 5):
            one = ask.work(before[i, 0, 0], ratio[0, j, 0], ask.ranks[k])
            assert values[i, j, k] == pytest.approx(float(getattr(one, field)), rel=1e-12)
    assert all(np.shape(value) == (5,) for value in vars(ask.work(0.0, 0.0, ask.ranks)).values())


def test_counts_of_equal_layers_ask_what_the_ratio_asks():
    ask = ShapeAsk(TINY, BASE, job(), RANKS)
    start, end = kept_counts(TINY, 0.25), kept_counts(TINY, 0.5)
    rows = [np.full((3, 2), count) for count in (*start, *end)]
    by_counts, by_ratio = ask.work_of_counts(*rows, np.array([2, 8, 32])), ask.work(0.25, 0.5, [2, 8, 32])
    for field in vars(by_ratio):
        assert getattr(by_counts, field) == pytest.approx(getattr(by_ratio, field), rel=1e-12)


@pytest.mark.parametrize("clock", ["minilm-l6", "roberta-base", "bert-large", "tinyllama-1.1b", "llama-7b"])
@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("top", [None, 0, 2])
def test_prices_equal_counting_layer_by_layer(clock, every, top):
    shape = load_shape(clock)
    setting = job(importance_every=every, step=StepSetting(4, 32, "fp16", train_top_layers=top))
    ask = ShapeAsk(shape, shape, setting, RANKS)
    before = np.linspace(0.0, 0.6, 40)
    after = before + np.linspace(0.0, 0.3, 40)[::-1]
    rank = np.array(RANKS)[np.arange(40) % len(RANKS)]
    counts = [
        np.tile(kept[:, None], shape.layers) for kept in (*kept_counts(shape, before), *kept_counts(shape, after))
    ]
    counted, priced = ask.work_of_counts(*counts, rank), ask.work(before, after, rank)
    for field, values in vars(counted).items():
        np.testing.assert_allclose(getattr(priced, field), values, rtol=1e-12, err_msg=field)


def test_layers_of_the_clock_take_the_fractions_of_the_learner_in_order():
    # Training the clock's top 6 layers alone: only the learner's second layer may matter for what is trained.
    ask = ShapeAsk(TINY, BASE, job(step=StepSetting(4, 32, train_top_layers=6), prunes=False), RANKS)

    def upload(heads):
        counts = np.array([heads]), np.full((1, 2), 256)
        return float(ask.work_of_counts(*counts, *counts, 8).upload_bytes[0])

    assert upload([2, 4]) == upload([4, 4])
    assert upload([4, 2]) < upload([4, 4])


def test_learners_whole_heads_decide_the_clocks_work():
    assert float(achieved_ratio(TINY, *(c[None] for c in kept_counts(TINY, 0.3)))) != pytest.approx(0.3, abs=1e-3)
    by_tiny = ShapeAsk(TINY, BASE, job(importance_every=None), RANKS).work(0.3, 0.3, 8)
    steps = 20 * step_work(BASE, [3 / 4], [179 / 256], 8, STEP).flops
    assert float(by_tiny.flops) == pytest.approx(float(steps), rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0, "recovery": 0}, "has no steps"),
        ({"recovery": 21}, "a phase of -1 steps"),
        ({"importance_every": 0}, "importance_every is 0"),
    ],
)
def test_bad_job_is_named(changes, said):
    with pytest.raises(ConfigError, match=said):
        job(**changes)


@pytest.mark.parametrize("ranks", [(), (0, 2), (4, 2), (2, 2)])
def test_ranks_must_ascend(ranks):
    with pytest.raises(ConfigError, match="must be positive and ascend"):
        ShapeAsk(TINY, TINY, job(), ranks)


def test_importance_held_by_weight_takes_a_number_a_weight():
    """Between estimates one fp32 number per kept weight, at the larger structure; nothing else of the job changes."""
    group, weight = (ShapeAsk(TINY, BASE, job(importance_memory=held), RANKS) for held in ("group", "weight"))
    one, other = (ask.work(0.0, 0.5, 8) for ask in (group, weight))
    assert other.peak_memory_bytes - one.peak_memory_bytes == pytest.approx(4 * BASE.prunable_weights)
    assert (other.flops, other.upload_bytes) == (one.flops, one.upload_bytes)


def test_a_job_that_cuts_has_two_peaks():
    ask = ShapeAsk(TINY, BASE, job(), RANKS)
    during, after = ask.peaks(0.0, 0.5, 8)
    assert during == ask.work(0.0, 0.0, 8).peak_memory_bytes
    assert after == ask.work(0.5, 0.5, 8).peak_memory_bytes < during


class Priced:
    """An objective that costs something of everything."""

    extra_cost = ExtraCost(flops=3.0, memory_bytes=16.0, peak_memory_bytes=4.0, download_bytes=5.0, upload_bytes=7.0)

    def penalty(self, now, start, ranks):
        raise NotImplementedError


@pytest.mark.parametrize("ratios", [(0.0, 0.0), (0.25, 0.5)])
def test_an_objective_costs_what_it_says_per_trained_weight(ratios):
    phases = (Phase(15, 1e-3, estimate=True), Phase(5, 1e-3, estimate=True, cut_before=True))
    plain, dear = (
        ShapeAsk(BASE, BASE, JobSetting.of(LocalProgram(phases, own), STEP, 5, sends_scores=True), RANKS).work(
            *ratios, 8
        )
        for own in (None, Priced())
    )

    def weights(ratio):
        heads, channels = (count / full for count, full in zip(kept_counts(BASE, ratio), (12, 3072), strict=True))
        return float(lora_weights(BASE, kept_sums(BASE, STEP, [heads], [channels]), 8)) + BASE.head_weights

    before, after = map(weights, ratios)
    steps = 15 * before + 5 * after
    expected = {
        "flops": 3.0 * steps,
        "memory_bytes": 16.0 * steps,
        "launches": 0.0,
        "peak_memory_bytes": 4.0 * before,
        "download_bytes": 5.0 * before,
        "upload_bytes": 7.0 * after,
    }
    for field, more in expected.items():
        got = float(getattr(dear, field)) - float(getattr(plain, field))
        assert got == pytest.approx(more, rel=1e-4, abs=1e-9), field


def test_estimates_are_counted_over_the_whole_job_where_a_phase_estimates():
    """Every third step of 2 + 5 + 4; the first phase estimates nothing, and the cut comes before the last."""
    phases = (Phase(2, 1e-3), Phase(5, 1e-3, estimate=True), Phase(4, 1e-3, estimate=True, cut_before=True))
    job = JobSetting.of(LocalProgram(phases), STEP, 3, sends_scores=True)
    assert (job.start, job.end) == (Share(7, 0, 2), Share(4, 0, 1))
    quiet = JobSetting.of(LocalProgram((Phase(11, 1e-3),)), STEP, 3, sends_scores=True)
    assert (quiet.start, quiet.end, quiet.estimates, quiet.sends_scores) == (
        Share(0, 0, 0),
        Share(11, 0, 0),
        False,
        False,
    )


def test_the_rate_costs_nothing():
    """Rounds whose programs differ in the rate alone share a price."""
    one, other = (JobSetting.of(LocalProgram((Phase(4, rate),)), STEP, None, sends_scores=False) for rate in (0.1, 0.2))
    assert one == other
    assert hash(one) == hash(other)


def test_a_pass_that_changes_no_weight_pays_for_no_optimizer():
    """Gradients as in any step; none of AdamW's traffic, launches and moments."""

    def work(*trains):
        program = LocalProgram(tuple(Phase(5, 1e-3, estimate=True, trains=own) for own in trains))
        return ShapeAsk(BASE, BASE, JobSetting.of(program, STEP, 5, sends_scores=True), RANKS).work(0.0, 0.0, 8)

    steps, passes, mixed = work(True, True), work(False, False), work(True, False)
    weights = float(lora_weights(BASE, kept_sums(BASE, STEP, [1.0], [1.0]), 8)) + BASE.head_weights
    assert float(steps.flops) == float(passes.flops)
    assert float(steps.memory_bytes - passes.memory_bytes) == pytest.approx(10 * ADAMW_PASSES * 4 * weights, rel=1e-6)
    assert float(steps.launches - passes.launches) == pytest.approx(10 * OPTIMIZER_LAUNCHES)
    assert float(steps.peak_memory_bytes - passes.peak_memory_bytes) == pytest.approx(2 * 4 * weights, rel=1e-6)
    assert float(mixed.memory_bytes) == pytest.approx(float(steps.memory_bytes + passes.memory_bytes) / 2)
    assert float(mixed.peak_memory_bytes) == float(steps.peak_memory_bytes)
    assert float(steps.upload_bytes) == float(passes.upload_bytes)
