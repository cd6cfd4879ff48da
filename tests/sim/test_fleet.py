from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import yaml
from sim_toys import ToyFleet, ToyStrategy, play, work

from fedsim.contracts.control import Work
from fedsim.cost.device import load_profile, rates_of
from fedsim.cost.estimate import compute_time
from fedsim.errors import ProfileError
from fedsim.fleet.fleet import fleet_names, load_fleet
from fedsim.fleet.fleet_file import LinkSpec, fleet_path, read_fleet_file
from fedsim.settings import FleetSettings, ServerSettings


def number(value, unit, **band):
    return {"value": value, "unit": unit, "status": "assumed", "source": "a test", **band}


def board(name, gflops=500.0, modes=("FAST", "SLOW")):
    """A profile no file describes: its modes run at 1, 1/2, 1/3 ... of the clock."""
    return {
        "name": name,
        "default_mode": modes[0],
        "memory_capacity": number(8, "GB"),
        "memory_reserve": number(1, "GB"),
        "memory_bandwidth": number(50, "GB/s"),
        "reference_memory_clock": number(1600, "MHz"),
        "cores_per_sm": number(100, "cores"),
        "fp16_multiple": number(2, "1"),
        "efficiency_fp32": number(0.5, "1"),
        "efficiency_fp16": number(0.5, "1"),
        "bandwidth_efficiency": number(0.8, "1"),
        "launch_cost": number(80, "us*GHz"),
        "idle_power": number(2, "W"),
        "radio_power": number(1, "W"),
        "modes": {
            mode: {
                "active_sms": number(5, "SM"),
                "gpu_clock": number(gflops / rank, "MHz"),
                "cpu_clock": number(2, "GHz"),
                "memory_clock": number(1600, "MHz"),
                "busy_power": number(10, "W"),
            }
            for rank, mode in enumerate(modes, start=1)
        },
    }


@pytest.fixture
def fleet_file(tmp_path):
    """Write two boards and a fleet file with the given changes; return the settings that name it."""
    for name, gflops in (("red", 500.0), ("blue", 1000.0)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(board(name, gflops, ("FAST", "MIDDLE", "SLOW"))))

    def write(clients=None, period=None, **changes):
        content = {
            "name": "toy",
            "mode_period": 5,
            "compute_jitter_sigma": 0.02,
            "devices": [{"profile": "red.yaml", "mode": "uniform"}, {"profile": "blue.yaml"}],
            "links": {
                "a": {"down_mbps": {"low": 10, "high": 20}, "up_mbps": {"low": 5, "high": 10}, "jitter_sigma": 0.1},
                "b": {"down_mbps": 2, "up_mbps": 1, "latency_ms": 30},
            },
        }
        content.update(changes)
        path = tmp_path / "fleet.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return FleetSettings(name=str(path), clients=clients, mode_period=period)

    return write


def test_pattern_modes_and_links(fleet_file):
    fleet = load_fleet(fleet_file(clients=8), "fp32", seed=1)
    assert fleet.device_of.tolist() == ["red", "blue"] * 4
    down, up = fleet.bandwidth(0, np.arange(8))
    # Device j of pass b has link (j + b) mod 2: a b | b a | a b | b a.
    assert (down == 2e6).tolist() == [False, True, True, False, False, True, True, False]
    on_a = down != 2e6
    assert np.all((down[on_a] >= 10e6) & (down[on_a] <= 20e6) & (up[on_a] >= 5e6) & (up[on_a] <= 10e6))
    assert len(set(down[on_a])) == 4
    assert not np.allclose(down[on_a], 2 * up[on_a])
    assert fleet.latency(np.arange(2)).tolist() == [0.0, 0.03]
    assert set(fleet.mode_names(0)[1::2]) == {"FAST"}
    assert np.array_equal(fleet.rates_at(fleet.mode_rows(0, np.array([1]))).flops_per_s, [0.5 * 5 * 100 * 2 * 1e9])


def computed(fleet, flight, clients, job=None):
    """Seconds of computing in flight and round of the same number."""
    rates = fleet.rates_at(fleet.mode_rows(flight, clients))
    return fleet.compute_seconds(flight, clients, work(clients) if job is None else job, rates)


def test_clients_stay_as_they_are_in_a_larger_fleet(fleet_file):
    small = load_fleet(fleet_file(clients=7), "fp32", seed=4)
    large = load_fleet(fleet_file(clients=500), "fp32", seed=4)
    seven, some = np.arange(7), np.array([2, 5])
    job = work(seven)
    assert np.array_equal(small.device_of, large.device_of[:7])
    for round_index in (0, 3, 17):
        assert np.array_equal(small.modes(round_index), large.modes(round_index)[:7])
        for seconds in (computed, type(small).expected_seconds):
            small_s = seconds(small, round_index, seven, job)
            assert np.array_equal(small_s, seconds(large, round_index, seven, job))
            assert np.array_equal(small_s[some], seconds(large, round_index, some, work(some)))
        for name in ("download_seconds", "upload_seconds"):
            small_s = getattr(small, name)(round_index, seven, job.download_bytes)
            assert np.array_equal(small_s, getattr(large, name)(round_index, seven, job.download_bytes))
    assert np.array_equal(small.bandwidth(0, seven), large.bandwidth(0, seven))


def test_modes_are_redrawn_every_period(fleet_file):
    red = np.arange(0, 3000, 2)
    fleet = load_fleet(fleet_file(clients=3000), "fp32", seed=2)
    draws = np.array([fleet.modes(r) for r in range(12)])
    for r in range(1, 12):
        assert np.array_equal(draws[r], draws[r - 1]) == (r % 5 != 0)
        assert np.array_equal(fleet.mode_changes(r), np.flatnonzero(draws[r] != draws[r - 1]))
    assert len(fleet.mode_changes(0)) == 3000
    assert np.all(draws[:, 1::2] == 0)
    # 1500 boards, three modes: each count is binomial with standard deviation 18.3.
    assert np.all(np.abs(np.bincount(draws[0, red], minlength=3) - 500) < 4.5 * 18.3)
    never = load_fleet(fleet_file(clients=50, period=0), "fp32", seed=2)
    assert np.array_equal(never.modes(0), never.modes(999))
    often = load_fleet(fleet_file(clients=50, period=1), "fp32", seed=2)
    assert not np.array_equal(often.modes(0), often.modes(1))


def test_modes_do_not_depend_on_which_rounds_were_asked_before(fleet_file):
    """Draws are remembered for a while: in any order of rounds they are those of a fleet that was never asked."""
    fleet = load_fleet(fleet_file(clients=40, period=2), "fp32", seed=3)
    some = np.array([3, 8, 30])
    for r in (9, 0, 4, 5, 9, 2, 3, 11, 1):
        fresh = load_fleet(fleet_file(clients=40, period=2), "fp32", seed=3)
        assert np.array_equal(fleet.modes(r), fresh.modes(r))
        assert np.array_equal(fleet.mode_names(r, some), fresh.mode_names(r)[some])
        fleet.modes(r)[:] = -1  # what is handed out is the caller's own


def test_fixed_and_weighted_modes(fleet_file):
    devices = [
        {"profile": "red.yaml", "mode": "SLOW", "count": 2},
        {"profile": "blue.yaml", "mode": {"MIDDLE": 3.0, "SLOW": 1.0}, "link": "b"},
    ]
    fleet = load_fleet(fleet_file(clients=3000, devices=devices), "fp32", seed=0)
    names = fleet.mode_names(0)
    assert set(names[0::3]) | set(names[1::3]) == {"SLOW"}
    blue = names[2::3]
    assert set(blue) == {"MIDDLE", "SLOW"}
    assert abs((blue == "MIDDLE").mean() - 0.75) < 0.06
    assert np.all(fleet.bandwidth(0, np.arange(2, 3000, 3))[0] == 2e6)


def test_expected_seconds_is_the_model_and_broadcasts(fleet_file):
    fleet = load_fleet(fleet_file(clients=6), "fp32", seed=0)
    clients = np.array([1, 4])
    rng = np.random.default_rng(0)
    grid = Work(*(rng.uniform(1e8, 1e9, (2, 3, 4)) for _ in fields(Work)))
    got = fleet.expected_seconds(7, clients, grid)
    assert got.shape == (2, 3, 4)
    for slot, client in enumerate(clients):
        one = np.array([client])
        rates = rates_of(load_profile(fleet_path_of(fleet_file, fleet, client)), fleet.mode_names(7, one)[0], "fp32")
        (down,), (up,) = fleet.bandwidth(7, one)
        for index in np.ndindex(3, 4):
            job = Work(*(getattr(grid, f.name)[slot][index] for f in fields(Work)))
            slow = 2 * fleet.latency(one)[0] + 8 * job.download_bytes / down + 8 * job.upload_bytes / up
            assert got[slot][index] == pytest.approx(slow + compute_time(job, rates).total_s, rel=1e-12)
    scalar = Work(*(np.float64(1e9) for _ in fields(Work)))
    assert fleet.expected_seconds(0, clients, scalar).shape == (2,)


def fleet_path_of(fleet_file, fleet, client):
    from pathlib import Path

    return Path(fleet_file().name).parent / f"{fleet.device_of[client]}.yaml"


def test_seed_changes_draws_and_profiles_change_time(fleet_file):
    clients = np.arange(40)
    base = load_fleet(fleet_file(clients=40), "fp32", seed=0)
    other = load_fleet(fleet_file(clients=40), "fp32", seed=1)
    assert not np.array_equal(base.modes(0), other.modes(0))
    assert not np.array_equal(base.bandwidth(0, clients)[0], other.bandwidth(0, clients)[0])

    def halved(profile):
        return replace(profile, efficiency_fp32=replace(profile.efficiency_fp32, value=0.25))

    slow = load_fleet(fleet_file(clients=40), "fp32", seed=0, perturb=halved)
    assert np.all(computed(slow, 0, clients) > computed(base, 0, clients))
    half = load_fleet(fleet_file(clients=40), "fp16", seed=0)
    assert np.all(computed(half, 0, clients) < computed(base, 0, clients))
    options = ServerSettings(rounds=2)
    assert play(slow, options)[0].trace_hash != play(base, options)[0].trace_hash
    assert play(base, options)[0] == play(load_fleet(fleet_file(clients=40), "fp32", seed=0), options)[0]


def test_draws_do_not_depend_on_the_order_of_questions(fleet_file):
    one, two = (load_fleet(fleet_file(clients=20), "fp32", seed=0) for _ in range(2))
    clients = np.arange(20)
    forward = [computed(one, r, clients) for r in range(4)]
    backward = [computed(two, r, clients[::-1])[::-1] for r in reversed(range(4))][::-1]
    assert np.array_equal(forward, backward)


def test_a_zero_time_is_an_error():
    fleet = ToyFleet([1.0, 1.0], [1.0, 0.0], [1.0, 1.0])
    with pytest.raises(ProfileError, match=r"compute time of client 1 \(toy\) in flight 0 is 0.0 s"):
        play(fleet, ServerSettings(rounds=1))
    fleet = ToyFleet([1.0, np.nan], [1.0, 1.0], [1.0, 1.0])
    with pytest.raises(ProfileError, match="download time of client 1"):
        play(fleet, ServerSettings(rounds=1))


def test_work_of_nothing_is_an_error(fleet_file):
    fleet = load_fleet(fleet_file(clients=4), "fp32", seed=0)
    nothing = ToyStrategy(work_of=lambda clients: Work(*(np.zeros(len(clients)) for _ in fields(Work))))
    with pytest.raises((ProfileError, ValueError), match="compute time"):
        play(fleet, ServerSettings(rounds=1), nothing)


BAD = [
    ({"devises": []}, "devises is not a known key; did you mean 'devices'"),
    ({"devices": None}, "devices is missing"),
    ({"devices": []}, "devices"),
    ({"clients_": 0}, "clients_ is not a known key; did you mean 'clients'"),
    ({"devices": [{"profile": "red.yaml", "count": 0}]}, "devices.0.count is 0: .*greater than or equal to 1"),
    ({"mode_period": -1}, "mode_period is -1: .*greater than or equal to 0"),
    ({"compute_jitter_sigma": -0.1}, "compute_jitter_sigma must be"),
    ({"compute_jitter_sigma": "much"}, "compute_jitter_sigma is 'much': must be a number"),
    ({"devices": [{"profile": "red.yaml", "mode": "TURBO"}]}, "mode of red 'TURBO' .*allowed: FAST, MIDDLE, SLOW"),
    ({"devices": [{"profile": "red.yaml", "mode": {"FAST": -1.0}}]}, "devices.0.mode.FAST is -1.0: .*greater than 0"),
    ({"devices": [{"profile": "red.yaml", "link": "c"}]}, r"unknown link 'c'.*allowed: a, b"),
    ({"devices": [{"profile": "red.yaml", "colour": 1}]}, "devices.0.colour is not a known key .*profile, count"),
    ({"devices": [{"profile": "green.yaml"}]}, "green.yaml"),
    ({"devices": [{"profile": "jetson-nanoo"}]}, "unknown device 'jetson-nanoo'"),
    ({"links": {}}, "links"),
    ({"links": {"a": {"down_mbps": 5}}}, "links.a.up_mbps is missing"),
    ({"links": {"a": {"down_mbps": 0, "up_mbps": 5}}}, "down_mbps is 0, it must be above 0"),
    ({"links": {"a": {"down_mbps": {"low": 9, "high": 5}, "up_mbps": 5}}}, "low <= value <= high"),
    ({"links": {"a": {"down_mbps": 5, "up_mbps": 5, "latency_ms": -1}}}, "latency_ms is -1, it must be at least 0"),
    ({"links": {"a": {"down_mbps": {"value": 5, "unit": "MB/s"}, "up_mbps": 5}}}, "unit 'MB/s' .*'Mb/s'"),
    ({"links": {"a": {"down_mbps": {"valeu": 5}, "up_mbps": 5}}}, "did you mean 'value'|down_mbps.value is missing"),
    ({"links": {"a": {"down_mbps": float("inf"), "up_mbps": 5}}}, "finite"),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD)
def test_bad_fleet_files_are_refused(fleet_file, changes, sentence):
    with pytest.raises(ProfileError, match=sentence) as caught:
        load_fleet(fleet_file(**changes), "fp32", seed=0)
    assert "\n" not in str(caught.value)


def test_unknown_fleets_are_refused(tmp_path):
    with pytest.raises(ProfileError, match=r"unknown fleet 'fedspine-8'; did you mean 'fedspine-80'"):
        load_fleet(FleetSettings(name="fedspine-8"), "fp32", 0)
    with pytest.raises(ProfileError, match="no such file"):
        load_fleet(FleetSettings(name=str(tmp_path / "none.yaml")), "fp32", 0)
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ProfileError, match="must hold keys and values"):
        load_fleet(FleetSettings(name=str(tmp_path / "list.yaml")), "fp32", 0)
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ProfileError, match="is not YAML"):
        load_fleet(FleetSettings(name=str(tmp_path / "broken.yaml")), "fp32", 0)


def test_two_profiles_of_one_name_are_refused(fleet_file, tmp_path):
    settings = fleet_file(devices=[{"profile": "red.yaml"}, {"profile": "copy.yaml"}])
    (tmp_path / "copy.yaml").write_text((tmp_path / "red.yaml").read_text())
    with pytest.raises(ProfileError, match="two profiles are called 'red'"):
        load_fleet(settings, "fp32", 0)


@pytest.mark.parametrize("name", ["fedspine-80", "fedspine-80-campus", "fedspine-80-modes"])
def test_built_in_fleets_state_every_source(name):
    assert name in fleet_names()
    spec = read_fleet_file(fleet_path(name))
    numbers = [spec.compute_jitter_sigma]
    numbers += [getattr(link, field) for link in spec.links.values() for field in LinkSpec.model_fields]
    for entry in numbers:
        assert entry.source not in ("the fleet file", "default of fleet files")
        assert entry.unit is not None
        assert entry.low < entry.high


def test_built_in_fleets_have_the_testbeds_devices():
    fleet = load_fleet(FleetSettings(), "fp32", seed=0)
    names, counts = np.unique(fleet.device_of, return_counts=True)
    expected = {"jetson-agx-xavier": 10, "jetson-tx2": 30, "jetson-xavier-nx": 40}
    assert dict(zip(names.tolist(), counts.tolist(), strict=True)) == expected
    everyone = np.arange(80)
    down, up = fleet.bandwidth(0, everyone)
    assert (down.min() >= 15e6, down.max() <= 25e6, up.min() >= 15e6, up.max() <= 25e6) == (True,) * 4
    assert np.array_equal(fleet.mode_names(0), fleet.mode_names(99))

    modes = load_fleet(FleetSettings(name="fedspine-80-modes"), "fp32", seed=0)
    down = modes.bandwidth(0, everyone)[0] / 1e6
    groups = np.digitize(down, [4.5, 11, 20])
    assert np.bincount(groups).tolist() == [20] * 4
    for device in expected:
        per_group = np.bincount(groups[modes.device_of == device], minlength=4)
        assert per_group.max() - per_group.min() <= 3
    assert len(set(modes.mode_names(0))) > 8
    assert np.array_equal(modes.modes(0), modes.modes(19))
    assert not np.array_equal(modes.modes(19), modes.modes(20))
