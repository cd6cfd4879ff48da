"""The comparison: numbers by hand, pairs by seed, and runs that do not belong together."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import config_of, write_run

from fedsim.errors import ConfigError, RunError
from fedsim.experiment.compare import compare, final_sparsity, idle_of_class, speedup, time_to_target
from fedsim.experiment.results import Run, load

FINISHED = {
    "status": "finished",
    "labels": ["reconstruction"],
    "model": {"name": "tiny", "sha256": "1"},
    "data": {"name": "synthetic", "sha256": "2"},
    "fleet": {"name": "two", "clients": 2},
    "clock": {"model": "roberta-base", "batch_size": 8, "seq_len": 128, "precision": "fp32"},
    "versions": {"fedsim": "0.1.0"},
}


def hand_run(method, seed, end_s, accuracy, idle=0.25, manifest=None, ratio=0.0, config=None):
    """A run in memory: rounds that end at `end_s`, accuracies with None between evaluations, two clients a round."""
    count = len(end_s)
    rounds = pd.DataFrame(
        {
            "round": range(count),
            "end_s": end_s,
            "idle_fraction": idle,
            "bytes_down": 3e6,
            "bytes_up": 1e6,
            "energy_j": 500.0,
            "prune_ratio_mean": ratio,
            "accuracy": np.array(accuracy, dtype=float),
            "accuracy_consensus": np.array(accuracy, dtype=float) - 0.125,
        }
    )
    clients = pd.DataFrame(
        {
            "round": np.repeat(range(count), 2),
            "client": [0, 1] * count,
            "device": ["slow", "fast"] * count,
            "prune_ratio": [ratio - 0.1, ratio + 0.1] * count if ratio else 0.0,
            "wait_s": 0.0,
            "download_s": 1.0,
            "compute_s": [8.0, 4.0] * count,
            "upload_s": 1.0,
            "idle_s": [0.0, 4.0] * count,
            "outcome": "ok",
        }
    )
    run = Run(
        path=f"{method}-{seed}",
        config=config or {"seed": seed, "method": method, "records": {"client_rounds": True, "events": True}},
        manifest={**FINISHED, "method": method, "seed": seed, **(manifest or {})},
    )
    run.__dict__.update(rounds=rounds, client_rounds=clients)  # what the lazy properties would have read
    return run


def row_of(comparison, method):
    return comparison.rows.set_index("method").loc[method]


def test_by_hand():
    """fedlora reaches 0.8 at 30 s and 40 s, fedspine at 20 s and 20 s: sqrt(1.5 * 2) over two seeds, no interval."""
    comparison = compare(
        [
            hand_run("fedlora", 0, [10, 20, 30, 40], [None, 0.7, 0.8, 0.9]),
            hand_run("fedlora", 1, [10, 20, 30, 40], [None, 0.7, 0.75, 0.85]),
            hand_run("fedspine", 0, [10, 20, 25, 31], [None, 0.8, 0.7, 0.81], ratio=0.5),
            hand_run("fedspine", 1, [10, 20, 25, 29], [None, 0.83, 0.7, 0.79], ratio=0.5, idle=0.125),
        ],
        target_accuracy=0.8,
    )
    assert comparison.baseline == "fedlora"
    assert comparison.speedup_of == "time_to_target_s"
    lora, spine = row_of(comparison, "fedlora"), row_of(comparison, "fedspine")
    assert lora["time_to_target_s"] == 35.0
    assert lora["speedup"] == 1.0
    assert spine["time_to_target_s"] == 20.0
    assert spine["speedup"] == pytest.approx(math.sqrt(1.5 * 2.0))
    assert math.isnan(spine["speedup_low"])
    assert spine["accuracy_final"] == pytest.approx(0.8)
    assert spine["accuracy_final_sd"] == pytest.approx(0.02 / math.sqrt(2))
    assert spine["accuracy_consensus_final"] == pytest.approx(0.675)
    assert spine["accuracy_best"] == pytest.approx(0.82)
    assert spine["simulated_s"] == 30.0
    assert (spine["sparsity"], spine["sparsity_low"], spine["sparsity_high"]) == pytest.approx((0.5, 0.4, 0.6))
    assert spine["idle_fraction"] == pytest.approx(0.1875)
    assert comparison.fastest_class == "fast"
    assert spine["idle_fastest_fraction"] == pytest.approx(0.4)
    assert spine["traffic_bytes"] == 16e6
    assert spine["energy_j"] == 2000.0
    assert lora["is_reference"]
    assert not spine["is_reference"]
    assert comparison.warnings == ()


def test_the_default_target_is_what_every_finished_run_reaches():
    runs = [
        hand_run("fedlora", 0, [10, 20], [0.7, 0.9]),
        hand_run("fedspine", 0, [10, 20], [0.85, 0.8]),
        hand_run("fedspine", 1, [10], [0.6], manifest={"status": "running"}),
    ]
    comparison = compare(runs)
    assert comparison.target_accuracy == 0.85
    assert comparison.target_is_default
    text = comparison.as_text()
    assert "Target accuracy 0.8500: the highest that every finished run reaches" in text
    # The unfinished one is in, and marked: it has not reached the target in one of two runs.
    assert "fedspine *" in text
    assert "10 (1 of 2)" in text
    assert "'fedspine-1' is unfinished" in text
    assert row_of(comparison, "fedspine")["speedup_pairs"] == 1


def test_not_reached_is_said_plainly():
    comparison = compare(
        [hand_run("fedlora", 0, [10], [0.9]), hand_run("fedspine", 0, [10], [0.5])], target_accuracy=0.8
    )
    row = row_of(comparison, "fedspine")
    assert row["reached"] == 0
    assert math.isnan(row["speedup"])
    line = next(line for line in comparison.as_text().splitlines() if line.startswith("fedspine"))
    assert "not reached  " in line
    as_json = {row["method"]: row for row in comparison.as_dict()["rows"]}
    assert as_json["fedspine"]["time_to_target_s"] is None
    assert as_json["fedspine"]["speedup"] is None


@pytest.mark.parametrize("target", [0.0, -0.1, 1.5, 81.0, math.nan])
def test_a_target_that_is_no_fraction_is_refused(target):
    with pytest.raises(ConfigError, match=r"--target-accuracy: value .* is not allowed"):
        compare([hand_run("fedlora", 0, [10], [0.9])], target)


@pytest.mark.parametrize(
    ("methods", "asked", "chosen"),
    [
        (["fedspine", "fedspine_uniform", "fedlora"], None, "fedlora"),
        (["fedspine", "fedspine_uniform"], None, "fedspine_uniform"),
        (["fedspine", "mine"], None, "mine"),
        (["fedspine", "fedlora"], "fedspine", "fedspine"),
    ],
)
def test_choice_of_the_baseline(methods, asked, chosen):
    runs = [hand_run(method, 0, [10, 20 + index], [0.5, 0.9]) for index, method in enumerate(methods)]
    comparison = compare(runs, None, asked)
    assert comparison.baseline == chosen
    assert f"Speedup over {chosen}" in comparison.as_text()


def test_an_unknown_baseline_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"--baseline: unknown method 'fedlor'; did you mean 'fedlora'"):
        compare([hand_run("fedlora", 0, [10], [0.9])], None, "fedlor")


def test_speedups_pair_seeds():
    """Seeds differ tenfold, the ratio is 2 in each: paired, the speedup is exactly 2 and its interval has no width."""
    runs = []
    for seed, scale in enumerate([1.0, 10.0, 100.0]):
        runs.append(hand_run("fedlora", seed, [20 * scale], [0.9]))
        runs.append(hand_run("fedspine", seed, [10 * scale], [0.9]))
    row = row_of(compare(runs), "fedspine")
    assert (row["speedup"], row["speedup_low"], row["speedup_high"]) == pytest.approx((2.0, 2.0, 2.0))
    comparison = compare([*runs, hand_run("fedlora", 7, [1.0], [0.9])])
    assert row_of(comparison, "fedspine")["speedup"] == pytest.approx(2.0)
    assert any("same seeds" in warning for warning in comparison.warnings)


def test_the_interval_against_all_resamples():
    """Oracle: percentiles of the mean over every one of the n^n equally likely resamples."""
    ratios = [1.1, 1.6, 2.4, 1.3]
    means = [np.exp(np.mean(pick)) for pick in itertools.product(np.log(ratios), repeat=4)]
    mean, low, high = speedup(ratios, [0, 1, 2, 3])
    assert mean == pytest.approx(float(np.prod(ratios)) ** 0.25)
    np.testing.assert_allclose([low, high], np.percentile(means, [2.5, 97.5]), rtol=0.02)
    assert speedup(ratios, [0, 1, 2, 3]) == (mean, low, high)


@given(st.lists(st.floats(0.01, 100), max_size=6))
@settings(max_examples=30, deadline=None)
def test_the_interval_is_there_from_three_pairs_on_and_holds_the_mean(ratios):
    mean, low, high = speedup(ratios, list(range(len(ratios))))
    assert math.isnan(mean) == (not ratios)
    assert math.isnan(low) == (len(ratios) < 3)
    if len(ratios) >= 3:
        assert low <= mean * (1 + 1e-9)
        assert mean <= high * (1 + 1e-9)
        assert min(ratios) * (1 - 1e-9) <= low
        assert high <= max(ratios) * (1 + 1e-9)


@given(
    st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=12),
    st.floats(0.01, 1),
)
@settings(max_examples=100, deadline=None)
def test_first_crossing_against_a_loop(accuracies, target):
    rounds = pd.DataFrame(
        {"end_s": np.arange(len(accuracies)) * 2.0 + 1, "accuracy": np.array(accuracies, dtype=float)}
    )
    expected = math.nan
    for index, accuracy in enumerate(accuracies):
        if accuracy is not None and accuracy >= target:
            expected = index * 2.0 + 1
            break
    found = time_to_target(rounds, target)
    assert found == expected or (math.isnan(found) and math.isnan(expected))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("data", {"name": "synthetic", "sha256": "3"}, r"data differs \(sha256: 2 and 3\)"),
        ("fleet", {"name": "two", "clients": 3}, r"fleet differs \(clients: 2 and 3\)"),
        ("clock", {**FINISHED["clock"], "seq_len": 64}, r"clock \(cost model\) differs \(seq_len: 128 and 64\)"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(field, value, said):
    with pytest.raises(RunError, match=said):
        compare([hand_run("fedlora", 0, [10], [0.9]), hand_run("fedspine", 0, [10], [0.9], manifest={field: value})])


def test_equal_data_under_another_path_belongs_together():
    other = {"data": {"name": "elsewhere/train.tsv", "sha256": "2"}}
    compare([hand_run("fedlora", 0, [10], [0.9]), hand_run("fedspine", 0, [10], [0.9], manifest=other)])


def test_lesser_differences_are_warned_of():
    config = {"method": "fedspine", "server": {"rounds": 5, "checkpoint_every": 2}, "control": {"policy": "sucb"}}
    base = {"method": "fedlora", "server": {"rounds": 9, "checkpoint_every": 1}, "control": {"policy": "uniform"}}
    comparison = compare(
        [
            hand_run("fedlora", 0, [10], [0.9], config=base),
            hand_run("fedspine", 0, [10], [0.9], config=config, manifest={"model": {"sha256": "x"}}),
        ]
    )
    assert list(comparison.warnings) == [
        "the runs start from different model weights",
        "the runs differ in server.rounds",
    ]
    assert "Warning: the runs differ in server.rounds." in comparison.as_text()


def test_configurations_of_one_method_stay_apart_and_are_named():
    def spine(seed, exploration, end_s):
        config = {"seed": seed, "method": "fedspine", "control": {"exploration": exploration, "split": 0.25}}
        return hand_run("fedspine", seed, [end_s], [0.9], config=config)

    runs = [spine(0, 0.1, 10.0), spine(1, 0.1, 10.0), spine(0, 0.2, 40.0), spine(1, 0.2, 40.0)]
    comparison = compare(runs)
    rows = comparison.rows.set_index("method")
    assert sorted(rows.index) == ["fedspine (control.exploration=0.1)", "fedspine (control.exploration=0.2)"]
    assert rows["runs"].tolist() == [2, 2]
    assert comparison.baseline == "fedspine (control.exploration=0.2)"
    assert rows.loc["fedspine (control.exploration=0.1)", "speedup"] == pytest.approx(4.0)
    assert compare(runs, None, "fedspine (control.exploration=0.1)").baseline == "fedspine (control.exploration=0.1)"
    with pytest.raises(ConfigError, match="several configurations"):
        compare(runs, None, "fedspine")


def test_draws_of_the_profiles_are_repeats_and_pair_up():
    runs = [
        hand_run(method, 0, [end_s * (1 + draw)], [0.9], manifest={"profile_draw": draw})
        for method, end_s in (("fedlora", 30.0), ("fedspine", 10.0))
        for draw in range(3)
    ]
    row = row_of(compare(runs), "fedspine")
    assert (row["runs"], row["speedup_pairs"]) == (3, 3)
    assert (row["speedup"], row["speedup_low"]) == pytest.approx((3.0, 3.0))


def test_a_repeated_run_counts_once():
    comparison = compare([hand_run("fedlora", 0, [10], [0.9]), hand_run("fedlora", 0, [50], [0.9])])
    assert comparison.rows["simulated_s"].tolist() == [10.0]
    assert any("left out" in warning for warning in comparison.warnings)


def test_rows_are_grouped_by_achieved_sparsity():
    ratios = {"fedlora": 0.0, "a": 0.3, "b": 0.5, "c": 0.31, "d": 0.49}
    comparison = compare([hand_run(method, 0, [10], [0.9], ratio=ratio) for method, ratio in ratios.items()])
    groups = comparison.rows.set_index("method")["sparsity_group"].to_dict()
    assert groups == {"fedlora": 0, "a": 1, "c": 1, "b": 2, "d": 2}
    assert comparison.rows["sparsity_group"].is_monotonic_increasing
    lines = comparison.as_text().splitlines()
    titles = [line for line in lines if line.startswith("[")]
    assert titles == [
        "[unpruned: references, not rivals of the pruned]",
        "[fleet-mean sparsity 0.30 to 0.31]",
        "[fleet-mean sparsity 0.49 to 0.50]",
    ]


def test_sparsity_prefers_the_manifest_of_a_finished_run_then_each_clients_last_record():
    run = hand_run("fedspine", 0, [10, 20], [0.5, 0.9], ratio=0.5)
    assert final_sparsity(run) == pytest.approx((0.5, 0.4, 0.6))
    run.client_rounds.loc[run.client_rounds["round"] == 1, "prune_ratio"] = [np.nan, 0.8]
    assert final_sparsity(run) == pytest.approx((0.6, 0.4, 0.8))
    stated = {**run.manifest, "final_prune_ratio": {"mean": 0.51, "low": 0.2, "high": 0.7}}
    cut = dataclasses.replace(run, manifest=stated)
    assert final_sparsity(cut) == (0.51, 0.2, 0.7)
    unfinished = dataclasses.replace(run, manifest={**stated, "status": "running"})
    unfinished.__dict__.update(rounds=run.rounds, client_rounds=run.client_rounds)
    assert final_sparsity(unfinished) == pytest.approx((0.6, 0.4, 0.8))


def test_idle_of_a_class_against_a_loop():
    rows = load_rows = hand_run("fedspine", 0, [10, 20, 30], [0.5] * 3).client_rounds
    load_rows["idle_s"] = [0.0, 4.0, 1.0, 2.0, 0.0, 9.0]
    shares = []
    for index in range(3):
        own = rows[(rows["round"] == index) & (rows["device"] == "fast")]
        total = sum(float(own[f"{phase}_s"].sum()) for phase in ("wait", "download", "compute", "upload", "idle"))
        shares.append(float(own["idle_s"].sum()) / total)
    assert idle_of_class(rows, "fast") == pytest.approx(np.mean(shares))
    assert math.isnan(idle_of_class(rows, "none"))


def test_timing_only_runs_compare_total_time():
    runs = [hand_run("fedlora", 0, [10, 30], [None, None]), hand_run("fedspine", 0, [10, 20], [None, None], ratio=0.5)]
    comparison = compare(runs)
    assert comparison.target_accuracy is None
    assert comparison.speedup_of == "simulated_s"
    assert row_of(comparison, "fedspine")["speedup"] == pytest.approx(1.5)
    assert "No accuracy was evaluated: speedups are of total simulated time." in comparison.as_text()


def test_the_clock_and_its_standing_stand_under_every_table():
    labelled = {"labels": ["reconstruction", "timing only: nothing was trained"]}
    comparison = compare([hand_run("fedlora", 0, [10], [0.9], manifest={"labels": []})])
    last = comparison.as_text().splitlines()[-1]
    assert last == "Clock: roberta-base, batch 8 x 128 tokens, fp32; fleet two, 2 clients; reconstruction."
    comparison = compare([hand_run("fedlora", 0, [10], [0.9], manifest=labelled)])
    assert comparison.as_text().splitlines()[-1].endswith("reconstruction; timing only: nothing was trained.")
    assert comparison.as_dict()["labels"] == ["reconstruction", "timing only: nothing was trained"]


def test_columns_are_aligned_under_their_units():
    comparison = compare([hand_run(name, 0, [10, 20], [None, 0.9]) for name in ("fedlora", "a_very_long_method_name")])
    lines = comparison.as_text().splitlines()
    header, units, rule = lines[:3]
    body = [line for line in lines[3:] if line.startswith(("fedlora", "a_very"))]
    assert set(rule) == {"-"}
    assert len(body) == 2
    # Numbers are flush right under header and unit.
    for title, unit, cell in (("time to 0.9", "s", "20"), ("idle", "share", "25.0%"), ("energy", "kJ", "1.00")):
        end = header.index(title) + len(title)
        assert all(line[:end].endswith(f" {cell}") for line in body)
        assert units[:end].endswith(f" {unit}")


def test_nothing_to_compare():
    with pytest.raises(RunError, match="no run given"):
        compare([])


def test_from_disk_with_unfinished_and_unbegun_runs(tmp_path):
    """Through the files: the JSON holds no NaN, an unbegun run is left out and named."""
    for method, stop in (("fedlora", None), ("fedspine_uniform", 7), ("fedspine", 0)):
        write_run(tmp_path / method, method, 1, rounds=9, clients=16, stop_before=stop)
    comparison = compare([load(tmp_path / method) for method in ("fedlora", "fedspine_uniform", "fedspine")])
    content = json.loads(json.dumps(comparison.as_dict(), allow_nan=False))
    assert [row["method"] for row in content["rows"]] == ["fedlora", "fedspine_uniform"]
    assert [row["unfinished"] for row in content["rows"]] == [0, 1]
    assert [run["rounds"] for run in content["runs"]] == [9, 7]
    assert any("fedspine' has no closed round yet and is left out" in warning for warning in content["warnings"])
    assert content["fastest_class"] == "jetson-agx-xavier"
    assert compare([load(tmp_path / "fedlora")]).rows["speedup"].tolist() == [1.0]
    with pytest.raises(RunError, match="no run has a closed round"):
        compare([load(tmp_path / "fedspine")])


def test_runs_without_client_records_do_without_the_fastest_class(tmp_path):
    config = config_of("fedlora", 0, 3, client_rounds=False)
    write_run(tmp_path / "run", "fedlora", config=config, clients=16)
    comparison = compare([load(tmp_path / "run")])
    assert comparison.fastest_class is None
    assert "fastest" not in comparison.as_text().lower()
