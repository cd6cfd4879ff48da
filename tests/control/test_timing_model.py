"""What the time model learns of devices."""

import numpy as np
import pytest
from control_toys import ToyAsk

from fedsim.control.time_model import TimeModel
from fedsim.rng import Stream, generator

ASK = ToyAsk()
RANKS = (2, 32, 8, 16)


def _learn(model, truth, rounds, *, jitter=0.0, start=0, change=True):
    """Feed rounds of jobs whose ratio and rank vary (or not); truth (clients, 3) in s/TFLOP, s/MB, s."""
    ids = np.arange(truth.shape[0])
    for index in range(start, start + rounds):
        ratio = np.full(ids.size, min(0.7, 0.02 * index) if change else 0.3)
        work = ASK.work(ratio, ratio, RANKS[index % 4] if change else 2)
        model.update(ids, work, _true_time(truth, work) * (1 + jitter * generator(1, Stream.POLICY, index).normal()))


def _true_time(truth, work):
    traffic = (work.download_bytes + work.upload_bytes) / 1e6
    return truth[:, 0] * work.flops / 1e12 + truth[:, 1] * traffic + truth[:, 2]


def _worst_error(model, truth):
    ids = np.arange(truth.shape[0])
    errors = []
    for ratio in (0.1, 0.4, 0.7):
        for rank in RANKS:
            work = ASK.work(np.full(ids.size, ratio), np.full(ids.size, ratio), rank)
            errors.append(np.abs(model.predict(ids, work) / _true_time(truth, work) - 1).max())
    return max(errors)


TRUTH = np.array([[2.0, 0.4, 5.0], [1.0, 2.0, 1.0], [3.0, 0.05, 0.0]])


def test_recovers_devices_from_exact_times():
    model = TimeModel(3)
    _learn(model, TRUTH, 30)
    assert _worst_error(model, TRUTH) < 0.03
    np.testing.assert_allclose(model.parameters(np.arange(3))[:, 0], TRUTH[:, 0], rtol=0.08)


def test_jitter_is_averaged():
    model = TimeModel(3)
    _learn(model, TRUTH, 40, jitter=0.02)
    assert _worst_error(model, TRUTH) < 0.06


def test_a_new_power_mode_is_followed_at_once():
    model = TimeModel(3)
    _learn(model, TRUTH, 20)
    slowed = TRUTH * [2.5, 1.0, 1.0]
    _learn(model, slowed, 1, start=20)
    ids = np.arange(3)
    work = ASK.work(np.full(3, 0.4), np.full(3, 0.4), 2)
    assert np.abs(model.predict(ids, work) / _true_time(slowed, work) - 1).max() < 0.15
    _learn(model, slowed, 8, start=21)
    assert _worst_error(model, slowed) < 0.1


def test_a_new_link_is_followed():
    model = TimeModel(3)
    _learn(model, TRUTH, 20)
    slowed = TRUTH * [1.0, 4.0, 1.0]
    _learn(model, slowed, 9, start=20)
    assert _worst_error(model, slowed) < 0.12


def test_monotony_does_not_make_compute_look_constant():
    # Without the renewed belief about the constant, the compute shares end at 0.23 to 0.48 here.
    model = TimeModel(3)
    _learn(model, TRUTH, 4)
    for index in range(100):
        _learn(model, TRUTH, 1, start=index, change=False, jitter=0.1)
    shares = model.parameters(np.arange(3))[:, 0] / TRUTH[:, 0]
    assert (shares > 0.75).all()
    assert (shares < 1.25).all()


def test_caution_grows_with_noise_and_with_what_was_not_tried():
    steady, noisy = TimeModel(3), TimeModel(3)
    _learn(steady, TRUTH, 20)
    _learn(noisy, TRUTH, 20, jitter=0.1)
    ids = np.arange(3)
    work = ASK.work(np.full(3, 0.3), np.full(3, 0.3), 8)
    margins = [model.cautious(ids, work) / model.predict(ids, work) - 1 for model in (steady, noisy)]
    assert (margins[0] > 0.0).all()
    assert (margins[1] > 2.0 * margins[0]).all()
    for _ in range(40):
        _learn(steady, TRUTH, 1, change=False)
    large = ASK.work(np.full(3, 0.3), np.full(3, 0.3), 32)
    small = ASK.work(np.full(3, 0.3), np.full(3, 0.3), 2)
    margin = [steady.cautious(ids, job) / steady.predict(ids, job) - 1 for job in (small, large)]
    assert (margin[1] > margin[0]).all()


def test_never_negative_whatever_is_measured():
    model = TimeModel(5)
    ids = np.arange(5)
    draw = np.random.default_rng(7)
    for _ in range(200):
        ratio = draw.uniform(0, 0.8, 5)
        model.update(ids, ASK.work(ratio, ratio, draw.choice(RANKS)), draw.lognormal(3, 1.5, 5))
        theta = model.parameters(ids)
        assert np.isfinite(theta).all()
        assert (theta >= 0).all()
        assert (theta.sum(axis=1) > 0).all()


def test_a_stranger_is_judged_by_the_fleet_and_then_by_its_own_time():
    model = TimeModel(4)
    ids = np.arange(3)
    for index in range(20):
        ratio = np.full(3, 0.02 * index)
        work = ASK.work(ratio, ratio, RANKS[index % 4])
        model.update(ids, work, _true_time(TRUTH, work))
    np.testing.assert_allclose(model.parameters(np.array([3]))[0], np.median(model.parameters(ids), axis=0))
    slow = np.array([[8.0, 1.6, 20.0]])
    work = ASK.work(np.array([0.0]), np.array([0.0]), 8)
    model.update(np.array([3]), work, _true_time(slow, work))
    other = ASK.work(np.array([0.4]), np.array([0.4]), 8)
    np.testing.assert_allclose(model.predict(np.array([3]), other), _true_time(slow, other), rtol=0.15)


@pytest.mark.parametrize("shape", [(6,), (6, 4), (1, 4)])
def test_expected_and_cautious_times_are_the_products_of_their_definition(shape):
    draw = generator(2, Stream.POLICY)
    model = TimeModel(9)
    ids = np.array([0, 2, 3, 5, 7, 8])  # 8 was never heard of: the medians of the others stand in
    for _ in range(5):
        work = ASK.work(draw.random(8), draw.random(8), draw.choice([2, 8, 32], 8))
        model.update(np.arange(8), work, draw.uniform(20, 60, 8))
    work = ASK.work(draw.random(shape), draw.random(shape), 8)
    state = model.state()
    expected, cautious = np.empty((6, *shape[1:])), np.empty((6, *shape[1:]))
    for row, client in enumerate(ids):
        theta = state["theta"][client] if client < 8 else np.median(state["theta"][:8], axis=0)
        for place in np.ndindex(shape[1:]):
            at = (row if shape[0] > 1 else 0, *place)
            phi = [work.flops[at] / 1e12, (work.download_bytes[at] + work.upload_bytes[at]) / 1e6, 1.0]
            mean = float(np.dot(phi, theta))
            variance = phi @ state["covariance"][client] @ phi + state["noise_variance"][client] * mean**2
            expected[(row, *place)], cautious[(row, *place)] = mean, mean + 2.0 * np.sqrt(variance)
    np.testing.assert_allclose(model.predict(ids, work), expected, rtol=1e-12)
    np.testing.assert_allclose(model.cautious(ids, work), cautious, rtol=1e-12)
