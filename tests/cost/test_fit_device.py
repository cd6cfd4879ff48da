"""A profile fitted to steps: it recovers what made them, says how sure it is, and refuses what it cannot fit."""

import numpy as np
import pytest
import yaml

from fedsim.bench.calibrate_host import POINTS, SHAPE, UNSEEN, measured_step
from fedsim.cli import main
from fedsim.cost.bands import joint_samples, row_work
from fedsim.cost.device import load_profile, parse_profile
from fedsim.cost.fit_device import fit_device, fitted_rates
from fedsim.cost.seconds import compute_time
from fedsim.cost.setting import StepSetting
from fedsim.errors import DataError, ProfileError

RATES = (80e9, 6e9, 50e-6)


def steps(points, noise=0.0, seed=0):
    rng, rows = np.random.default_rng(seed), []
    for at, point in enumerate(points):
        setting = StepSetting(point.batch, point.seq_len, tuning=point.tuning)
        row = measured_step(f"s{at}", "host", setting, point.rank, point.ratio, 1.0)
        work = row_work(row)
        seconds = float(work.flops) / RATES[0] + float(work.memory_bytes) / RATES[1] + float(work.launches) * RATES[2]
        seconds *= float(np.exp(noise * rng.normal()))
        rows.append(measured_step(f"s{at}", "host", setting, point.rank, point.ratio, seconds))
    return rows


@pytest.mark.parametrize("start", [None, (200e9, 20e9, 5e-6)])
def test_steps_without_noise_give_back_what_made_them(start):
    fit = fit_device(steps(POINTS), start)
    assert fit.flops_per_s == pytest.approx(RATES[0], rel=0.05)
    assert fit.seconds(steps(UNSEEN)) == pytest.approx([row.value for row in steps(UNSEEN)], rel=0.03)
    assert np.abs(fit.residual).max() < 0.03


def test_unseen_steps_are_within_the_noise():
    errors = []
    for seed in range(5):
        fit = fit_device(steps(POINTS, 0.05, seed), (100e9, 10e9, 20e-6))
        truth = steps(UNSEEN)
        errors.append(np.abs(fit.seconds(truth) / [row.value for row in truth] - 1).mean())
        assert np.abs(fit.left_out).mean() >= np.abs(fit.residual).mean()
    assert np.mean(errors) < 0.05


def test_the_covariance_covers_the_truth():
    inside = []
    for seed in range(20):
        fit = fit_device(steps(POINTS, 0.05, seed), (100e9, 8e9, 40e-6))
        off = np.log(fit.flops_per_s / RATES[0])
        inside.append(abs(off) < 2.5 * np.sqrt(fit.covariance[0, 0]))
    assert np.mean(inside) >= 0.8


def write_log(path, rows, unit="s"):
    lines = ["model,tuning,batch,seq_len,rank,prune_ratio,labels,quantity,value,unit"]
    for row in rows:
        one = row.setting
        value = row.value * (1000 if unit == "ms" else 1)
        lines.append(
            f"bert-base,{one.tuning},{one.batch_size},{one.seq_len},{row.rank},{row.prune_ratio},2,step_time,{value},{unit}"
        )
    path.write_text("\n".join(lines) + "\n")


def test_a_log_becomes_a_profile_that_predicts_it(tmp_path, capsys):
    from dataclasses import replace

    from fedsim.cost.shapes import load_shape

    bert = load_shape("bert-base")
    rows = []
    for row in steps(POINTS):
        work = row_work(replace(row, shape=bert))
        seconds = float(work.flops) / RATES[0] + float(work.memory_bytes) / RATES[1] + float(work.launches) * RATES[2]
        rows.append(replace(row, shape=bert, value=seconds))
    write_log(tmp_path / "log.csv", rows, "ms")
    out = tmp_path / "board.yaml"
    assert main(["calibrate", "--log", str(tmp_path / "log.csv"), "--out", str(out)]) == 0
    assert "13 steps" in capsys.readouterr().out
    profile = load_profile(out)
    assert profile.name == "board"
    assert profile.covariance is not None
    assert yaml.safe_load(out.read_text())["calibration"]["leave_one_out_mape"] < 0.1
    assert main(["validate", "--profile", str(out), "--log", str(tmp_path / "log.csv")]) == 0
    assert "step_time, unseen" in capsys.readouterr().out
    rates = joint_samples(profile).rates(None, "fp32")
    middle = np.median(compute_time(row_work(rows[0]), rates).total_s)
    assert middle == pytest.approx(rows[0].value, rel=0.1)


def test_too_short_a_log_is_refused(tmp_path, capsys):
    write_log(tmp_path / "log.csv", steps(POINTS[:3]))
    assert main(["calibrate", "--log", str(tmp_path / "log.csv"), "--out", str(tmp_path / "x.yaml")]) == 2
    assert "3 step times were given; a fit of three coefficients needs 4" in capsys.readouterr().err
    assert main(["calibrate", "--log", str(tmp_path / "log.csv"), "--out", str(tmp_path / "x.txt")]) == 2
    assert "a profile is a .yaml file" in capsys.readouterr().err
    assert not (tmp_path / "x.yaml").exists()
    with pytest.raises(DataError):
        fit_device([])


def test_a_covariance_that_is_none_is_refused():
    content = yaml.safe_load(
        (load_profile.__globals__["resource_folder"]("device_profiles") / "jetson-tx2.yaml").read_text()
    )
    content["calibration"] = {"covariance_of_log_rates": [[1, 0], [0, 1]]}
    with pytest.raises(ProfileError, match="it must be a covariance of the logarithms of 3 rates"):
        parse_profile(content, "x")


def test_rates_of_a_fit():
    fit = fit_device(steps(POINTS))
    row = steps(UNSEEN)[0]
    assert float(compute_time(row_work(row), fitted_rates(fit)).total_s) == pytest.approx(float(fit.seconds([row])[0]))
    assert SHAPE.layers == 4
