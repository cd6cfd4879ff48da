"""The cost model beside measurements: what is counted, what the statistics say, and what is refused."""

import json
import shutil
import time

import numpy as np
import pytest
from scipy import stats

from fedsim.cli import main
from fedsim.cost.bands import SAMPLES, joint_samples, row_work
from fedsim.cost.device import load_profile, profile_names, rates_of
from fedsim.cost.measurements import built_in_measurements, matching, read_measurements
from fedsim.cost.seconds import compute_time
from fedsim.cost.validate import check, validate
from fedsim.errors import DataError
from fedsim.resources import resource_folder

STEP = "model,tuning,batch,seq_len,quantity,value,unit"


@pytest.fixture(scope="module")
def result():
    return validate()


def log(tmp_path, *lines, header=STEP):
    path = tmp_path / "log.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_every_built_in_row_says_where_it_is_from():
    rows = built_in_measurements()
    assert len({row.id for row in rows}) == len(rows) > 190
    assert all(row.source and row.conditions and row.licence for row in rows)


def test_profiles_name_rows_that_exist():
    rows = built_in_measurements()
    for name in profile_names():
        profile = load_profile(name)
        for pattern in (*profile.rests_on, *profile.fitted_to):
            assert matching(rows, [pattern]), f"{name}: {pattern}"


def test_predictions_are_those_of_the_cost_model(result):
    chosen = [one for one in result.checked if one.row.quantity == "step_time" and not one.row.relative_to]
    for one in chosen[::7]:
        rates = rates_of(load_profile(one.row.device), one.row.mode, one.row.precision)
        assert one.predicted == float(compute_time(row_work(one.row), rates).total_s)
        assert one.low <= one.predicted <= one.high


def test_a_ratio_is_of_two_predictions(result):
    by_id = {one.row.id: one for one in result.checked}
    for one in result.checked:
        if one.row.relative_to:
            base = by_id[one.row.relative_to]
            own = float(
                compute_time(
                    row_work(one.row), rates_of(load_profile(one.row.device), one.row.mode, one.row.precision)
                ).total_s
            )
            assert one.predicted == pytest.approx(own / base.predicted)


def test_statistics_are_those_of_the_rows(result):
    summary = next(one for one in result.summaries if one.group == "step_time, unseen")
    rows = [one for one in result.checked if one.kind == "step_time" and one.row.counted and not one.fitted]
    predicted, measured = np.array([one.predicted for one in rows]), np.array([one.row.value for one in rows])
    errors = predicted / measured - 1
    assert summary.rows == len(rows)
    assert summary.mape == pytest.approx(np.abs(errors).mean())
    assert summary.bias == pytest.approx(errors.mean())
    assert summary.spearman == pytest.approx(stats.spearmanr(predicted, measured).statistic)
    assert summary.coverage == np.mean([one.low <= one.row.value <= one.high for one in rows])


def test_the_worst_is_the_furthest_off_of_the_unseen(result):
    off = {
        one.row.id: abs(np.log(one.predicted / one.row.value))
        for one in result.checked
        if one.row.counted and not one.fitted
    }
    assert result.worst[0].row.id == max(off, key=off.get)


def test_rows_that_do_not_count_are_shown_with_their_reason(result, capsys):
    assert main(["validate", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    context = {row["id"]: row for row in printed["rows"] if not row["counted"]}
    assert "one of the two is wrong" in context["tx2-full-second"]["conditions"]
    assert printed["devices_without_measurements"] == list(result.silent)


def test_a_profile_is_checked_against_its_own_rows(tmp_path, result):
    path = tmp_path / "board.yaml"
    shutil.copy(resource_folder("device_profiles") / "jetson-tx2.yaml", path)
    own = validate(path)
    assert {one.row.device for one in own.checked} == {"jetson-tx2"}
    assert [one.predicted for one in own.checked] == [
        one.predicted for one in result.checked if one.row.device == "jetson-tx2"
    ]


def test_a_log_of_ones_own(tmp_path, capsys):
    path = log(tmp_path, "bert-base,full,4,256,step_time,1700,ms", "bert-base,lora,4,256,step_time,1.2,s")
    profile = str(resource_folder("device_profiles") / "jetson-tx2.yaml")
    assert main(["validate", "--profile", profile, "--log", str(path)]) == 0
    assert "step_time, unseen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bert-base,full,4,256,step_time,1700,s", "milliseconds for seconds"),
        ("bert-base,full,4,256,step_time,0.0017,s", "milliseconds for seconds"),
        ("bert-base,full,4,256,step_tim,1,s", "quantity is 'step_tim'; did you mean 'step_time'"),
        ("bert-base,full,4,256,step_time,1,GB", "unit of step_time is 'GB' (allowed: s, ms)"),
        ("bert-base,full,4,256,step_time,-1,s", "value is '-1'; it must be positive"),
        ("bert-base,full,4,256,step_time,fast,s", "value is 'fast'; it must be a number"),
        ("bert-base,full,4,,step_time,1,s", "a step_time without conditions: seq_len must be given"),
        ("./bert-bas,full,4,256,step_time,1,s", "model './bert-bas'"),
        ("bert-base,tuned,4,256,step_time,1,s", "tuning is 'tuned'"),
        ("bert-base,full,four,256,step_time,1,s", "batch is 'four'; it must be a whole number"),
    ],
)
def test_bad_logs_are_refused_by_name(line, said, tmp_path, capsys):
    profile = str(resource_folder("device_profiles") / "jetson-tx2.yaml")
    assert main(["validate", "--profile", profile, "--log", str(log(tmp_path, line))]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_row_must_name_a_device_that_there_is(tmp_path):
    with pytest.raises(DataError, match="names no device, and no --profile was given"):
        validate(log=log(tmp_path, "bert-base,full,4,256,step_time,1,s"))
    path = log(tmp_path, "jetson-tx3,bert-base,full,4,256,step_time,1,s", header="device," + STEP)
    with pytest.raises(DataError, match="unknown device 'jetson-tx3'; did you mean 'jetson-tx2'"):
        validate(log=path)


def test_a_profile_that_no_row_describes_is_refused_by_name(tmp_path):
    path = tmp_path / "mine.yaml"
    text = (resource_folder("device_profiles") / "jetson-tx2.yaml").read_text()
    path.write_text(text.replace("name: jetson-tx2", "name: my-board", 1))
    with pytest.raises(DataError, match="no measurement describes the device 'my-board'"):
        validate(path)


def test_columns_and_ids_are_checked(tmp_path):
    with pytest.raises(DataError, match="'modell' is not a known column"):
        read_measurements(log(tmp_path, "a,1", header="modell,quantity"))
    with pytest.raises(DataError, match="has no column 'unit'"):
        read_measurements(log(tmp_path, "step_time,1", header="quantity,value"))
    with pytest.raises(DataError, match="has no rows"):
        read_measurements(log(tmp_path), device="jetson-tx2")
    rows = ["a,idle_power,3,W", "a,idle_power,4,W"]
    with pytest.raises(DataError, match="two rows have the id 'a'"):
        read_measurements(log(tmp_path, *rows, header="id,quantity,value,unit"), "jetson-tx2", strict=False)
    with pytest.raises(DataError, match="source is empty"):
        read_measurements(log(tmp_path, "a,idle_power,3,W,x", header="id,quantity,value,unit,conditions"), "jetson-tx2")


def test_samples_reproduce_the_rows_that_a_device_is_fitted_to():
    """Any bandwidth share and launch cost, and yet the fitted steps: each sample has an efficiency of its own."""
    profile = load_profile("raspberry-pi-4")
    samples = joint_samples(profile)
    rows = matching(built_in_measurements(), profile.fitted_to)
    shares = samples.numbers["bandwidth_efficiency"]
    assert shares.max() / shares.min() > 1.3
    for row in rows:
        seconds = compute_time(row_work(row), samples.rates(row.mode, "fp32")).total_s
        assert seconds.shape == (SAMPLES,)
        assert np.abs(seconds / row.value - 1).max() < 0.06
    # What it takes from one it gives to the other: less bandwidth, more efficiency.
    assert stats.spearmanr(shares, samples.numbers["efficiency_fp32"]).statistic < -0.5


def test_a_drawn_profile_is_the_sample_it_is_made_of():
    profile = load_profile("jetson-xavier-nx")
    samples = joint_samples(profile)
    drawn = samples.drawn(7)
    assert drawn.name == profile.name
    rates, expected = rates_of(drawn, "MODE_10W_2CORE", "fp32"), samples.rates("MODE_10W_2CORE", "fp32")
    for field in ("flops_per_s", "memory_bytes_per_s", "seconds_per_launch", "busy_power_watts"):
        assert getattr(rates, field) == pytest.approx(float(getattr(expected, field)[7]), rel=1e-12)
    assert samples.drawn(SAMPLES + 7) == drawn


def test_the_page_holds_every_row(tmp_path, capsys, result):
    page = tmp_path / "docs" / "fidelity.md"
    assert main(["validate", "--page", str(page)]) == 0
    text = page.read_text()
    assert all(f"| {one.row.id} |" in text for one in result.checked)
    assert (tmp_path / "docs" / "figures" / "fidelity.png").stat().st_size > 10_000
    assert "no measurement describes" in text.lower() or not result.silent


def test_all_rows_take_seconds():
    began = time.process_time()
    check(built_in_measurements(), {})
    assert time.process_time() - began < 10
