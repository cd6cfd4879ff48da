"""The fitted numbers in the profiles and in the workload are those that the calibration prints."""

import json
from pathlib import Path

import pytest

from fedsim.cost import workload
from fedsim.cost.calibrate import main
from fedsim.cost.device import load_profile

DATA = Path(__file__).resolve().parents[2].parent / "shared/data/jetson"


@pytest.fixture(scope="module")
def data():
    if not DATA.is_dir():
        pytest.skip("the Jetson measurements are not beside the project")
    return DATA


@pytest.fixture
def printed(data, capsys):
    assert main(["--data", str(data), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_profiles_hold_the_fitted_values(printed):
    tx2, orin = printed["tx2"], printed["orin"]
    assert load_profile("jetson-tx2").efficiency_fp32.value == tx2["efficiency_fp32"]
    for board in ("nano", "xavier-nx", "agx-xavier"):
        assert load_profile(f"jetson-{board}").efficiency_fp32.value == tx2["efficiency_fp32"]
    assert tx2["framework_bytes"] == workload.FRAMEWORK_BYTES
    assert tx2["memory_growth"] == workload.MEMORY_GROWTH
    assert load_profile("jetson-agx-orin").launch_cost.value == orin["launch_cost_ms_ghz"]
    assert load_profile("jetson-agx-orin").efficiency_fp32.value == orin["agx_orin_efficiency"]
    for board in ("jetson-orin-nano", "jetson-orin-nx"):
        assert load_profile(board).efficiency_fp32.value == orin["gemm_efficiency_fp32"][board]
        assert load_profile(board).efficiency_fp16.value == orin["gemm_efficiency_fp16"][board]
    for board, share in orin["stream_share"].items():
        assert load_profile(board).bandwidth_efficiency.value == share


def test_operations_alone_explain_the_steps_with_a_share_of_0_52(printed):
    assert printed["tx2"]["efficiency_alone"] == pytest.approx(0.52, abs=0.005)


def test_xavier_throughput_follows_its_clock(printed):
    mlperf = printed["mlperf"]
    ratio = mlperf["xavier_maxq_over_maxn_measured"] / mlperf["xavier_maxq_over_maxn_gpu_clock"]
    assert 0.9 < ratio < 1.15


def test_the_report_names_every_depth_and_the_outlier(data, capsys):
    assert main(["--data", str(data)]) == 0
    text = capsys.readouterr().out
    assert "1.86 s published elsewhere" in text
    assert all(f"\n{depth} " in text for depth in (0, 2, 4, 6, 8, 10, 12))
    assert all(board in text for board in ("jetson-nano", "jetson-agx-xavier", "jetson-orin-nx"))


def test_missing_data_is_one_sentence(tmp_path, capsys):
    assert main(["--data", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "has no file transcribed/fedadapter_tx2_bert_base.csv" in error
    assert error.count("\n") == 1
