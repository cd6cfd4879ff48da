"""FedScale's formula: the same seconds for every arm, and what that gets wrong for LoRA and pruning."""

import numpy as np
import pytest

import fedsim
from fedsim.cost.device import load_profile
from fedsim.cost.estimate import estimate_step
from fedsim.cost.fedscale import FedScaleAsk
from fedsim.cost.setting import StepSetting
from fedsim.cost.shapes import load_shape

BERT = load_shape("bert-base")


def test_three_forward_passes_a_step_whatever_the_arm():
    ask = FedScaleAsk(BERT, StepSetting(8, 64), 20, [2, 8])
    work = ask.work(np.zeros((3, 1)), np.array([[0.0], [0.4], [0.8]]), np.array([2, 8]))
    forward = estimate_step(load_profile("jetson-tx2"), BERT, StepSetting(8, 64, tuning="inference"))
    assert work.flops.shape == (3, 2)
    assert set(work.flops.ravel()) == {60 * forward["flops"]}
    assert set(work.upload_bytes.ravel()) == {4.0 * BERT.all_weights}
    counts = ask.work_of_counts(np.ones((5, 12)), np.ones((5, 12)), np.ones((5, 12)), np.ones((5, 12)), np.full(5, 8))
    assert counts.launches.shape == (5,)


def test_a_clock_blind_to_the_method_sees_no_pruning(tmp_path):
    """Pruned or not, a run takes the same; ours sees pruning save compute time."""
    small = {"train.engine": "none", "fleet.clients": 6, "server.rounds": 6, "records.events": False}
    small |= {"prune.warmup_rounds": 1, "prune.end_round": 4}
    seconds = {}
    for backend in ("analytic", "fedscale"):
        for method in ("fedlora", "fedspine_uniform"):
            options = small | {"cost.backend": backend}
            run = fedsim.run("quickstart", method=method, out=tmp_path / f"{backend}-{method}", quiet=True, **options)
            last = run.client_rounds[run.client_rounds["round"] == 5]
            seconds[backend, method] = float(last["compute_s"].mean())
    assert seconds["fedscale", "fedlora"] == pytest.approx(seconds["fedscale", "fedspine_uniform"])
    assert seconds["analytic", "fedspine_uniform"] < 0.9 * seconds["analytic", "fedlora"]
