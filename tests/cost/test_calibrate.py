"""The fitted numbers in the profiles and in the memory model are those that the measurements give."""

import json

import pytest

from fedsim.cost import memory
from fedsim.cost.calibrate import fits, main
from fedsim.cost.device import load_profile


@pytest.fixture(scope="module")
def found():
    return fits()


def test_profiles_hold_the_fitted_efficiencies(found):
    assert set(found["devices"]) == {"jetson-nano", "jetson-tx2", "phone-snapdragon-778g", "raspberry-pi-4"}
    for name, one in found["devices"].items():
        assert one["profile"] == pytest.approx(one["efficiency_fp32"], rel=0.005), name
    assert found["devices"]["jetson-tx2"]["misfit"] < 0.01


def test_boards_without_training_times_carry_the_tx2s(found):
    for board in ("xavier-nx", "agx-xavier"):
        profile = load_profile(f"jetson-{board}")
        assert profile.efficiency_fp32.value == load_profile("jetson-tx2").efficiency_fp32.value
        assert not profile.fitted_to


def test_the_memory_constants_are_the_fitted_ones(found):
    assert pytest.approx(found["memory"]["framework"], rel=0.01) == memory.FRAMEWORK_BYTES
    assert pytest.approx(found["memory"]["growth"], rel=0.01) == memory.ACTIVATION_GROWTH
    assert pytest.approx(found["memory"]["state_bytes"], rel=0.01) == memory.TRAINED_STATE_BYTES


def test_the_orins_take_the_mean_of_two_products(found):
    nano, nx = load_profile("jetson-orin-nano"), load_profile("jetson-orin-nx")
    mean = sum(found["products"].values()) / 2
    assert nano.efficiency_fp32.value == pytest.approx(mean, abs=0.002)
    assert nx.efficiency_fp32.value == nano.efficiency_fp32.value


def test_it_prints(capsys):
    assert main(["--json"]) == 0
    assert "memory" in json.loads(capsys.readouterr().out)
    assert main([]) == 0
    assert "memory: growth" in capsys.readouterr().out
