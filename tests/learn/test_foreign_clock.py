"""Work of modules that are not ours, counted and timed on the fleet."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fedsim
from fedsim.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "experiments" / "foreign_vit.py"


@pytest.fixture(scope="module")
def clock():
    return fedsim.Clock("fedspine-80", clients=6)


def test_a_linear_is_counted_by_hand(clock):
    linear, x = nn.Linear(8, 16, bias=False), torch.randn(4, 8)
    with torch.no_grad():
        work = clock.count(lambda: linear(x))
    assert float(work.flops) == 2 * 4 * 8 * 16
    assert float(work.memory_bytes) == 4 * (4 * 8 + 8 * 16 + 4 * 16)
    assert float(work.launches) == 1


def test_seconds_follow_the_devices(clock):
    linear, x = nn.Linear(512, 512), torch.randn(64, 512)
    work = clock.count(lambda: linear(x).sum().backward())
    seconds = clock.step_time(work)
    assert seconds.shape == (6,)
    by_device = dict(zip(clock.devices, seconds, strict=True))
    assert by_device["jetson-tx2"] > by_device["jetson-agx-xavier"]
    assert (clock.step_energy(work) > 0).all()
    low, high = clock.band(work, "jetson-tx2")
    assert low < by_device["jetson-tx2"] < high


def test_a_measured_step_takes_there_what_it_took(clock):
    work = clock.measured(0.7, "jetson-tx2")
    tx2 = clock.devices.index("jetson-tx2")
    assert clock.step_time(work)[tx2] == pytest.approx(0.7)
    with pytest.raises(ConfigError, match="must be positive"):
        clock.measured(0.0, "jetson-tx2")


def test_what_does_not_fit_has_no_time(clock):
    linear, x = nn.Linear(8, 8), torch.randn(2, 8)
    work = clock.count(lambda: linear(x), peak_memory_bytes=20e9)
    seconds = clock.step_time(work)
    assert np.isnan(seconds[clock.devices.index("jetson-tx2")])
    assert np.isfinite(seconds[clock.devices.index("jetson-agx-xavier")])


def test_the_example_runs(capsys):
    if not EXAMPLE.is_file():
        pytest.skip("installed without its source")
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "ms a step" in capsys.readouterr().out


def test_a_step_that_computes_nothing_is_refused(clock):
    with pytest.raises(ValueError, match="computed nothing"):
        clock.count(lambda: None)
