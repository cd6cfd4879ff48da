"""Profiles: every number checked at loading, rates from clocks, bands, and the power modes of the published tables."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from fedsim.cost.bands import joint_samples
from fedsim.cost.describe import devices_json, devices_text, profile_as_dict, profile_text
from fedsim.cost.device import (
    Rates,
    load_profile,
    parse_profile,
    profile_names,
    rates_of,
    stack_rates,
)
from fedsim.cost.estimate import estimate_step
from fedsim.cost.shapes import load_shape
from fedsim.cost.workload import StepSetting
from fedsim.errors import ProfileError
from fedsim.resources import resource_folder

ROOT = Path(__file__).resolve().parents[2]
MODES_CSV = ROOT.parent / "shared/data/jetson/transcribed/nvpmodel_power_modes.csv"
DEVICES = {
    "Nano": "jetson-nano",
    "TX2": "jetson-tx2",
    "Xavier NX": "jetson-xavier-nx",
    "Xavier NX (JetPack 5)": "jetson-xavier-nx",
    "AGX Xavier": "jetson-agx-xavier",
    "AGX Orin 64GB": "jetson-agx-orin",
}


@pytest.fixture
def content():
    return yaml.safe_load((resource_folder("device_profiles") / "jetson-tx2.yaml").read_text())


def test_every_device_loads():
    expected = "agx-orin agx-xavier nano orin-nano orin-nx tx2 xavier-nx"
    others = ("desktop-rtx-3090", "phone-snapdragon-778g", "raspberry-pi-4")
    assert set(profile_names()) == {*(f"jetson-{name}" for name in expected.split()), *others}
    assert all(load_profile(name).name == name for name in profile_names())


@pytest.mark.parametrize("name", profile_names())
def test_default_mode_is_the_fastest(name):
    profile = load_profile(name)
    for shape, setting in (
        (load_shape("roberta-base"), StepSetting(16, 128)),
        (load_shape("bert-base"), StepSetting(4, 256, tuning="full")),
    ):
        times = {mode: estimate_step(profile, shape, setting, mode)["step_time_s"] for mode in profile.modes}
        assert times[profile.default_mode] == min(times.values())


def test_modes_are_those_of_the_published_tables():
    if not MODES_CSV.is_file():
        pytest.skip("the table of power modes is not beside the project")
    table = pd.read_csv(MODES_CSV)
    for device, rows in table.groupby("device"):
        profile = load_profile(DEVICES[device])
        for row in rows.itertuples():
            mode = profile.modes[row.mode]
            assert mode.gpu_clock.value == row.gpu_max_mhz
            assert mode.cpu_clock.value == row.cpu_max_mhz
            if not np.isnan(row.emc_max_mhz):
                assert mode.memory_clock.value == row.emc_max_mhz
    for name in set(DEVICES.values()):
        known = table[table["device"].map(DEVICES) == name]["mode"]
        assert set(load_profile(name).modes) == set(known)


@pytest.mark.parametrize(
    ("name", "mode", "tflops", "gigabytes"),
    [
        ("jetson-tx2", "Max-N", 0.6656, 59.7),
        ("jetson-agx-xavier", "MAXN", 1.4100, 136.5),
        ("jetson-agx-xavier", "MODE_10W", 4 * 64 * 2 * 520e-6, 136.5 * 1065.6 / 2133),
        ("jetson-xavier-nx", "MODE_15W_6CORE", 0.8519, 51.2),
        ("jetson-agx-orin", "MODE_15W", 6 * 128 * 2 * 408e-6, 204.8 * 2133 / 3199),
    ],
)
def test_rates_follow_clocks_multiprocessors_and_memory_clock(name, mode, tflops, gigabytes):
    profile = load_profile(name)
    rates = rates_of(profile, mode, "fp32")
    assert rates.flops_per_s == pytest.approx(tflops * 1e12 * profile.efficiency_fp32.value, rel=1e-3)
    assert rates.memory_bytes_per_s == pytest.approx(gigabytes * 1e9 * profile.bandwidth_efficiency.value, rel=1e-3)
    cpu_ghz = profile.modes[mode].cpu_clock.value / 1e3
    assert rates.seconds_per_launch == pytest.approx(1e-3 * profile.launch_cost.value / cpu_ghz)


def test_half_precision_is_faster_on_matrix_units():
    profile = load_profile("jetson-agx-xavier")
    assert rates_of(profile, None, "fp16").flops_per_s > 2 * rates_of(profile, None, "fp32").flops_per_s


def change(content, path, value):
    changed = copy.deepcopy(content)
    *folders, last = path
    place = changed
    for key in folders:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["efficiency_fp32"], None, "efficiency_fp32 is missing"),
        (["efficiency_fp32"], 0.5, "efficiency_fp32 is 0.5; needed is"),
        (["efficiency_fp32", "value"], 0, "has value 0; it must be a positive number"),
        (["efficiency_fp32", "value"], -1, "has value -1; it must be a positive number"),
        (["efficiency_fp32", "value"], float("nan"), "it must be a positive number"),
        (["efficiency_fp32", "value"], 0.9, "outside its band"),
        (["efficiency_fp32", "high"], 1.2, "a share of a peak is at most 1"),
        (["memory_bandwidth", "unit"], "MHz", "has unit 'MHz'; needed is a memory bandwidth in B/s or MB/s or GB/s"),
        (["launch_cost", "unit"], "ms", "has unit 'ms'"),
        (["idle_power", "status"], "guessed", "has status 'guessed'"),
        (["idle_power", "source"], "", "has no source"),
        (["modes", "Max-N", "gpu_clock"], None, "modes.Max-N.gpu_clock is missing"),
        (["modes", "Max-N", "gpu_clock", "unit"], "W", "modes.Max-N.gpu_clock has unit 'W'"),
        (["modes"], {}, "at least one power mode"),
        (["memory_reserve", "high"], None, "ok"),
        (["eficiency_fp32"], 1, "did you mean 'efficiency_fp32'"),
        (["default_mode"], "MaxN", "unknown power mode of jetson-tx2 'MaxN'; did you mean 'Max-N'"),
    ],
)
def test_unusable_number_is_named(content, path, value, said):
    changed = change(content, path, value)
    if said == "ok":
        assert parse_profile(changed, "x").memory_reserve.high == 1.5
        return
    with pytest.raises(ProfileError) as caught:
        parse_profile(changed, "x")
    assert "jetson-tx2" in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unit_is_parsed_once_and_changes_nothing_else(content):
    same = change(
        content,
        ["memory_bandwidth"],
        content["memory_bandwidth"] | {"value": 59700, "low": 59700, "high": 59700, "unit": "MB/s"},
    )
    assert rates_of(parse_profile(same, "x"), None, "fp32").memory_bytes_per_s == pytest.approx(
        float(rates_of(parse_profile(content, "x"), None, "fp32").memory_bytes_per_s)
    )


@pytest.mark.parametrize(
    ("name", "said"), [("jetson-tx3", "did you mean 'jetson-tx2'"), ("missing.yaml", "does not exist")]
)
def test_unknown_profile(name, said):
    with pytest.raises(ProfileError, match=said):
        load_profile(name)


@pytest.mark.parametrize("text", ["a: [", "- 1", "a: 1\na b"])
def test_file_that_is_no_profile(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert "\n" not in str(caught.value)


def test_a_fault_in_an_own_file_names_the_file(tmp_path, content):
    path = tmp_path / "copied.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if key != "idle_power"}))
    with pytest.raises(ProfileError, match=r"copied\.yaml: profile jetson-tx2: idle_power is missing"):
        load_profile(path)


def test_own_file_may_name_its_default_mode(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content | {"default_mode": "Max-Q", "name": "mine"}))
    assert (load_profile(path).name, load_profile(path).mode(None).name) == ("mine", "Max-Q")


@pytest.mark.parametrize("field", ["gpu_clock", "memory_clock", "cpu_clock", "active_sms"])
def test_a_changed_profile_changes_the_time(content, field):
    def seconds(changed):
        numbers = estimate_step(parse_profile(changed, "x"), load_shape("bert-base"), StepSetting(2, 32), "Max-N")
        return numbers["step_time_s"]

    quantity = content["modes"]["Max-N"][field]
    halved = {key: quantity[key] / 2 for key in ("value", "low", "high")}
    slower = change(content, ["modes", "Max-N", field], quantity | halved)
    assert seconds(slower) > seconds(content)


def test_draws_stay_in_the_bands_and_repeat():
    profile = load_profile("jetson-agx-xavier")
    drawn = [joint_samples(load_profile("jetson-agx-xavier")).drawn(draw) for draw in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    shares = joint_samples(profile).numbers["efficiency_fp32"]
    band = profile.efficiency_fp32
    assert band.low <= shares.min() < band.low + 0.05
    assert band.high - 0.05 < shares.max() <= band.high
    assert np.median(shares) == pytest.approx(band.value, rel=0.02)
    assert drawn[0].modes["MAXN"].gpu_clock == profile.modes["MAXN"].gpu_clock


def test_stacked_rates_keep_order():
    each = [rates_of(load_profile(name), None, "fp32") for name in ("jetson-tx2", "jetson-nano")]
    stacked = stack_rates(each)
    assert isinstance(stacked, Rates)
    assert stacked.flops_per_s.tolist() == [rates.flops_per_s for rates in each]
    assert stacked.usable_memory_bytes.shape == (2,)


def test_descriptions_show_every_number():
    profile = load_profile("jetson-tx2")
    text = profile_text(profile)
    assert "0.605" in text
    assert "derived" in text
    assert "Max-P Denver" in text
    as_dict = profile_as_dict(profile)
    assert set(as_dict["efficiency_fp32"]) == {"value", "unit", "status", "source", "low", "high"}
    assert as_dict["modes"]["Max-N"]["gpu_clock"]["unit"] == "MHz"
    assert len(devices_json()) == len(profile_names()) == 10
    assert devices_json("raspberry-pi-4")["fitted_to"] == ["rpi4-bert-full"]
    assert "fitted to: rpi4-bert-full" in profile_text(load_profile("raspberry-pi-4"))
    assert devices_json("jetson-tx2") == as_dict
    assert devices_text("jetson-tx2") == text
    assert all(name in devices_text() for name in profile_names())
    assert profile_text(replace(profile, description="x")).startswith("jetson-tx2: x\n")


def test_a_budget_is_labelled_and_what_was_measured_is_not():
    text = profile_text(load_profile("jetson-agx-xavier"))
    line = next(line for line in text.splitlines() if line.strip().startswith("busy_power") and "  15 " in line)
    assert "derived, budget" in line
    modes = load_profile("jetson-agx-xavier").modes
    assert modes["MODE_15W"].busy_power.is_budget
    assert not modes["MODE_MLPERF_V1_MAXQ"].busy_power.is_budget


def test_joules_of_agx_orins_modes_are_in_the_order_of_the_measured_rails():
    """The 50 W mode is the thriftiest (rails: 7.3 J a TFLOP, others 10.4 to 10.8); budgets said the opposite."""
    profile, shape = load_profile("jetson-agx-orin"), load_shape("roberta-base")
    joules = {mode: estimate_step(profile, shape, StepSetting(16, 128), mode)["energy_j"] for mode in profile.modes}
    assert min(joules, key=joules.get) == "MODE_50W"
    assert joules["MAXN"] < joules["MODE_15W"]
