"""The cost model against published training steps of a Jetson TX2, through the function behind ``fedsim estimate``.

BERT-base, batch 4, length 256, top K layers fully tuned (FedAdapter, UbiquitousLearning/FedAdapter @8e27f2e,
exps_data). The numbers stand here so that the test needs no file beside the project.
"""

import pytest

from fedsim.cost.device import load_profile
from fedsim.cost.estimate import estimate, estimate_step
from fedsim.cost.shapes import load_shape
from fedsim.cost.workload import StepSetting

PUBLISHED_S = {0: 0.5325, 2: 0.696, 4: 0.883, 6: 1.064, 8: 1.2465, 10: 1.419, 12: 1.7}
PUBLISHED_PEAK_GB = {0: 1.2, 2: 1.7, 4: 2.3, 6: 3.2, 8: 3.9, 10: 4.3, 12: 5.3}


def at_depth(depth):
    return estimate(
        device="jetson-tx2", model="bert-base", batch_size=4, seq_len=256, tuning="full", train_top_layers=depth
    )


@pytest.mark.parametrize("depth", PUBLISHED_S)
def test_step_time_of_the_tx2(depth):
    tolerance = 0.07 if depth == 12 else 0.03
    assert at_depth(depth)["step_time_s"] == pytest.approx(PUBLISHED_S[depth], rel=tolerance)


@pytest.mark.parametrize("depth", PUBLISHED_PEAK_GB)
def test_peak_memory_of_the_tx2(depth):
    # Three constants are fitted to these peaks and to those of adapters; they were published rounded to 0.1 GB.
    assert at_depth(depth)["peak_memory_bytes"] / 1e9 == pytest.approx(PUBLISHED_PEAK_GB[depth], rel=0.085)


ADAPTER_S = {1: 0.57, 2: 0.63, 4: 0.71, 6: 0.79, 8: 0.89, 10: 0.99, 12: 1.08}
ADAPTER_PEAK_GB = {1: 1.3, 3: 1.6, 5: 2.1, 7: 2.5, 9: 3.1, 11: 3.5}


def adapter_at(depth):
    return estimate(
        device="jetson-tx2",
        model="bert-base",
        batch_size=4,
        seq_len=256,
        tuning="adapter",
        adapter_width=32,
        train_top_layers=depth,
    )


@pytest.mark.parametrize("depth", ADAPTER_S)
def test_steps_of_adapters_that_nothing_was_fitted_to(depth):
    assert adapter_at(depth)["step_time_s"] == pytest.approx(ADAPTER_S[depth], rel=0.05)


def test_peaks_of_adapters_at_depths_that_nothing_was_fitted_to():
    errors = [adapter_at(depth)["peak_memory_bytes"] / 1e9 / peak - 1 for depth, peak in ADAPTER_PEAK_GB.items()]
    assert sum(map(abs, errors)) / len(errors) < 0.04


def test_one_more_published_layer_costs_what_the_model_says():
    slope = (at_depth(10)["step_time_s"] - at_depth(2)["step_time_s"]) / 8
    assert slope == pytest.approx((PUBLISHED_S[10] - PUBLISHED_S[2]) / 8, rel=0.03)


def test_bert_large_does_not_fit_a_tx2_and_bert_base_does():
    # FeS (UbiquitousLearning/FeS @62f2ffb) plots BERT-large full tuning as out of memory, BERT-base at 5.8 GB.
    tx2 = load_profile("jetson-tx2")
    setting = StepSetting(4, 256, tuning="full")
    assert estimate_step(tx2, load_shape("bert-base"), setting)["fits_memory"]
    assert not estimate_step(tx2, load_shape("bert-large"), setting)["fits_memory"]
