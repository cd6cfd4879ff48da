"""The encoder that a host is calibrated on does what the clock counts, and times it."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from fedsim.bench.calibrate_host import calibrate_host
from fedsim.cost.device import load_profile
from fedsim.cost.setting import StepSetting
from fedsim.cost.workload import step_work
from fedsim.learn.bench import host_steps
from fedsim.structure import ModelShape, kept_counts

SMALL = ModelShape("small", "bert", 2, 48, 4, 4, 12, 96, vocab=50, positions=0)


@pytest.mark.parametrize("tuning", ["lora", "full", "inference"])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_products_are_those_that_are_counted(tuning, ratio):
    import torch

    setting = StepSetting(3, 10, tuning=tuning)
    model = host_steps.HostModel(SMALL, ratio, 4, setting)
    tokens, mask = torch.zeros(3, 10, dtype=torch.long), torch.zeros(3, 1, 1, 10)
    with FlopCounterMode(display=False) as counter:
        loss = model(tokens, mask).sum()
        if tuning != "inference":
            loss.backward()
    heads, channels = kept_counts(SMALL, ratio)
    counted = step_work(SMALL, [heads / 4], [channels / 96], 4, setting)
    # The classifier's biases are in its weights here, and its input needs no gradient of the frozen first token's rest.
    assert counter.get_total_flops() == pytest.approx(float(counted.flops), rel=0.02)


def test_a_host_becomes_a_profile(tmp_path, monkeypatch):
    """With stand-in times: the real ones take minutes."""
    monkeypatch.setattr(host_steps, "micro_rates", lambda device, threads: (90e9, 8e9, 20e-6))

    def time_step(shape, ratio, rank, setting, device, threads):
        heads, channels = kept_counts(shape, ratio)
        work = step_work(shape, [heads / shape.heads], [channels / shape.ffn], rank, setting)
        return float(work.flops) / 80e9 + float(work.memory_bytes) / 6e9 + float(work.launches) * 50e-6

    monkeypatch.setattr(host_steps, "time_step", time_step)
    said = []
    result = calibrate_host(tmp_path / "host.yaml", "cpu", 1, check=True, say=said.append)
    assert "Spearman 1.000" in result.as_text()
    assert load_profile(tmp_path / "host.yaml").name == "host"
    assert len(said) == 5


def test_timing_times():
    assert 0 < host_steps.time_step(SMALL, 0.5, 2, StepSetting(1, 4), "cpu", 1) < 1
