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

from fedsim.cli import main
from fedsim.errors import ConfigError, RunError
from fedsim.records.reader import Run, find_runs, load
from fedsim.runner.config import build_config
from fedsim.settings import Config
from fedsim.study.belonging import group_runs
from fedsim.study.bootstrap import mean_interval, ratio_interval
from fedsim.study.compare import (
    compare,
    evaluated_every,
    final_sparsity,
    idle_of_class,
    time_known_to,
    time_to_target,
)
from fedsim.sweeps.notes import sweep_notes

FINISHED = {
    "status": "finished",
    "labels": ["reconstruction"],
    "model": {"name": "tiny", "sha256": "1"},
    "data": {"name": "synthetic", "sha256": "2"},
    "fleet": {"name": "two", "clients": 2},
    "clock": {"model": "roberta-base", "batch_size": 8, "seq_len": 128, "precision": "fp32"},
    "versions": {"fedsim": "0.1.0"},
}


def hand_run(method, seed, end_s, accuracy, idle=0.25, manifest=None, ratio=0.0, config=None, lost=0):
    """A run in memory: rounds that end at `end_s`, accuracies with None between evaluations, two clients a round."""
    count = len(end_s)
    rounds = pd.DataFrame(
        {
            "round": range(count),
            "end_s": end_s,
            "idle_fraction": idle,
            "participants": 2,
            "dropped": lost,
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


def test_the_default_target_is_what_every_run_reaches_and_unfinished_ones_are_named_and_left_out():
    runs = [
        hand_run("fedlora", 0, [10, 20], [0.7, 0.9]),
        hand_run("fedspine", 0, [10, 20], [0.85, 0.8]),
        hand_run("fedspine", 1, [10], [0.6], manifest={"status": "running"}),
    ]
    comparison = compare(runs)
    assert comparison.target_accuracy == 0.85
    assert comparison.target_is_default
    text = comparison.as_text()
    assert "Target accuracy 0.8500: the highest that every run reaches" in text
    assert "PROVISIONAL: runs are missing or unfinished" in text
    assert "s, provisional" in text.splitlines()[1]
    assert comparison.as_dict()["target_is_provisional"]
    assert row_of(comparison, "fedspine")["runs"] == 1
    assert comparison.warnings == ("'fedspine-1' is unfinished and is left out",)
    assert "Warning: 'fedspine-1' is unfinished and is left out." in text


def test_a_default_target_is_provisional_only_while_runs_are_missing_and_none_was_given():
    runs = [hand_run("fedlora", 0, [10, 20], [0.7, 0.9])]
    half = hand_run("fedlora", 1, [10], [0.6], manifest={"status": "running"})
    missing = ["sweep 'x' lacks 1 of 2 cells"]
    for comparison, provisional in (
        (compare(runs), False),
        (compare([*runs, half]), True),
        (compare(runs, notes=missing), True),
        (compare([*runs, half], 0.8, notes=missing), False),
        (compare([hand_run("fedlora", 0, [10], [None]), half]), False),
    ):
        assert comparison.target_is_provisional == provisional
        assert ("rovisional" in comparison.as_text().lower()) == provisional


def test_a_sweep_of_unfinished_cells_has_no_finished_cell(tmp_path):
    for seed in range(2):
        write_run(tmp_path / f"cell{seed}", "fedlora", seed, rounds=4, clients=8, stop_before=2)
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(RunError, match=r"nothing to compare: sweep '.*' has no finished cell"):
        compare(find_runs([tmp_path]))


def test_only_unfinished_runs_are_nothing_to_compare():
    half = {"status": "stopped"}
    with pytest.raises(RunError, match=r"nothing to compare: 'fedlora-0' is unfinished \(go on with"):
        compare([hand_run("fedlora", 0, [10], [0.9], manifest=half)])
    with pytest.raises(RunError, match="nothing to compare: all 2 are unfinished"):
        compare([hand_run("fedlora", seed, [10], [0.9], manifest=half) for seed in (0, 1)])


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


def test_missed_targets_are_counted_and_never_filled_in():
    """One of three seeds misses: the mean is over the other two, there is no interval, and the cell says so."""
    runs = [hand_run("fedlora", seed, [40], [0.9]) for seed in range(3)]
    runs += [hand_run("fedspine", seed, [20], [0.9 if seed else 0.5]) for seed in range(3)]
    comparison = compare(runs, 0.8)
    row = row_of(comparison, "fedspine")
    assert (row["reached"], row["runs"], row["speedup_pairs"], row["speedup_pairs_missed"]) == (2, 3, 2, 1)
    assert row["speedup"] == pytest.approx(2.0)
    assert math.isnan(row["speedup_low"])
    text = comparison.as_text()
    assert "2.00x [no interval] (2 of 3)" in text
    assert "Not reached by fedspine (1 of 3 runs)" in text
    assert "No run reached 0.99: the best mean over seeds is 0.9000." in compare(runs, 0.99).as_text()


def test_the_gain_in_accuracy_is_paired():
    """Seeds differ by 0.2, the gain is 0.01, 0.02 and 0.03."""
    runs = [hand_run("fedlora", seed, [40], [0.5 + 0.2 * seed]) for seed in range(3)]
    runs += [hand_run("fedspine", seed, [20], [0.51 + 0.21 * seed]) for seed in range(3)]
    row = row_of(compare(runs), "fedspine")
    assert row["accuracy_gain"] == pytest.approx(0.02)
    assert 0.01 <= row["accuracy_gain_low"] < 0.02 < row["accuracy_gain_high"] <= 0.03 + 1e-12
    content = {one["method"]: one for one in compare(runs).as_dict()["rows"]}["fedspine"]
    assert (content["speedup"], content["speedup_low"]) == pytest.approx((2.0, 2.0))


def test_no_values_have_no_mean():
    assert all(math.isnan(one) for one in mean_interval([], []))


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
    mean, low, high = ratio_interval(ratios, [0, 1, 2, 3])
    assert mean == pytest.approx(float(np.prod(ratios)) ** 0.25)
    np.testing.assert_allclose([low, high], np.percentile(means, [2.5, 97.5]), rtol=0.02)
    assert ratio_interval(ratios, [0, 1, 2, 3]) == (mean, low, high)


@given(st.lists(st.floats(0.01, 100), max_size=6))
@settings(max_examples=30, deadline=None)
def test_the_interval_is_there_from_three_pairs_on_and_holds_the_mean(ratios):
    mean, low, high = ratio_interval(ratios, list(range(len(ratios))))
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


def test_how_closely_a_time_is_known_by_hand():
    """Tests after rounds 1, 3 and 4, at 20, 45 and 60 s."""
    run = hand_run("fedlora", 0, [10, 20, 30, 45, 60], [None, 0.7, None, 0.8, 0.75])
    assert [time_known_to(run.rounds, target) for target in (0.5, 0.8)] == [20.0, 25.0]
    assert math.isnan(time_known_to(run.rounds, 0.9))
    assert evaluated_every(run.rounds) == (2.0, 20.0)
    assert all(math.isnan(one) for one in evaluated_every(hand_run("fedlora", 0, [10], [None]).rounds))
    comparison = compare([run], 0.8)
    row = row_of(comparison, "fedlora")
    assert (row["time_to_target_s"], row["time_known_to_s"]) == (45.0, 25.0)
    text = comparison.as_text()
    assert "evaluations are every 2 rounds. Known to: simulated seconds since the evaluation before" in text
    assert text.splitlines()[0].split("time to 0.8")[1].split()[:2] == ["known", "to"]
    content = comparison.as_dict()
    assert "first evaluation at or above the target" in content["time_to_target_is"]
    assert content["rows"][0]["time_known_to_s"] == 25.0
    often = hand_run("fedspine", 0, [10, 20], [0.5, 0.9])
    assert "every 1 to 2 rounds" in compare([run, often], 0.8).as_text()
    assert "after every round" in compare([often]).as_text()
    assert "Known to" not in compare([hand_run("fedlora", 0, [10], [None])]).as_text()


@pytest.mark.parametrize("trained_first", [True, False])
def test_timing_only_runs_are_not_compared_with_trained_ones(trained_first):
    data = {"name": None, "sha256": None, "train": 0, "test": 0}
    runs = [
        hand_run("fedlora", 0, [10], [0.9], manifest={"engine": "sliced"}),
        hand_run("fedspine", 0, [10], [None], manifest={"engine": "none", "data": data}),
    ]
    said = r"'fedlora-0' was trained and 'fedspine-0' is timing only \(train\.engine: none\)"
    with pytest.raises(RunError, match=said):
        compare(runs if trained_first else runs[::-1])


def asked(seed, engine, precision, ran=("sliced", "fp32")):
    config = {"seed": seed, "method": "fedlora", "train": {"engine": engine, "precision": precision}}
    return hand_run("fedlora", seed, [10], [0.9], manifest={"engine": ran[0], "precision": ran[1]}, config=config)


def test_what_auto_came_to_is_no_difference_from_the_same_thing_named():
    comparison = compare([asked(0, "auto", "auto"), asked(1, "sliced", "fp32")])
    assert comparison.rows[["method", "runs"]].values.tolist() == [["fedlora", 2]]
    assert comparison.warnings == ()


def test_what_auto_came_to_is_a_difference_from_something_else():
    comparison = compare([asked(0, "auto", "auto", ("sliced", "bf16")), asked(0, "auto", "fp32")])
    assert set(comparison.rows["method"]) == {"fedlora (train.precision=bf16)", "fedlora (train.precision=fp32)"}
    assert comparison.warnings == ("the runs differ in train.precision",)


def test_seeds_that_asked_alike_stay_together_and_a_host_that_chose_otherwise_is_told():
    comparison = compare([asked(0, "auto", "auto", ("sliced", "bf16")), asked(1, "auto", "auto")])
    assert comparison.rows["method"].tolist() == ["fedlora"]
    assert comparison.warnings == ("train.precision: auto came to bf16 in some runs and fp32 in others",)


def test_the_fleets_own_number_of_clients_is_no_difference_from_the_same_number():
    def sized(seed, clients):
        config = {"seed": seed, "method": "fedlora", "fleet": {"clients": clients}}
        return hand_run("fedlora", seed, [10], [0.9], config=config)

    assert compare([sized(0, None), sized(1, 2)]).rows["runs"].tolist() == [2]


def test_labels_write_values_as_the_user_does():
    settings = [{"control": {"smooth": True}, "prune": {"max_step": None}, "reward": {"weights": [1.0, 0.5, 0.5]}}]
    settings += [{"control": {"smooth": False}, "prune": {"max_step": 0.1}}]
    groups, _ = group_runs([hand_run("fedspine", 0, [10], [0.9], config=one) for one in settings])
    assert [group.label for group in groups] == [
        "fedspine (control.smooth=true, prune.max_step=null, reward.weights=[1.0, 0.5, 0.5])",
        "fedspine (control.smooth=false, prune.max_step=0.1, reward.weights=[1.0, 0.25, 0.25])",
    ]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("data", {"name": "synthetic", "sha256": "3"}, r"data differs \(sha256: 2 and 3\)"),
        ("data", {"name": "a", "sha256": None}, r"data differs \(.*sha256: 2 and null\)"),
        ("fleet", {"name": "two", "clients": 3}, r"fleet differs \(clients: 2 and 3\)"),
        ("clock", {**FINISHED["clock"], "seq_len": 64}, r"clock \(cost model\) differs \(seq_len: 128 and 64\)"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(field, value, said):
    with pytest.raises(RunError, match=said):
        compare([hand_run("fedlora", 0, [10], [0.9]), hand_run("fedspine", 0, [10], [0.9], manifest={field: value})])


def drawn(method, seed, sha256, **data):
    """A run whose samples the seed draws."""
    config = {"method": method, "data": {"path": "a.tsv", "test_path": None, "max_samples": None}}
    return hand_run(
        method, seed, [10], [0.9], manifest={"data": {"name": "a.tsv", "sha256": sha256, **data}}, config=config
    )


def test_where_the_seed_draws_the_samples_only_runs_of_one_seed_must_hold_the_same():
    compare([drawn(method, seed, f"hash {seed}") for method in ("fedlora", "fedspine") for seed in (0, 1)])
    with pytest.raises(RunError, match=r"data differs \(sha256: hash 0 and hash 1\)"):
        compare([drawn("fedlora", 0, "hash 0"), drawn("fedspine", 0, "hash 1")])
    with pytest.raises(RunError, match=r"data differs \(test: 100 and 200\)"):
        compare([drawn("fedlora", 0, "hash 0", test=100), drawn("fedspine", 1, "hash 1", test=200)])


def test_a_refusal_says_how_the_runs_fall_apart():
    other = {"fleet": {"name": "three", "clients": 3}}
    runs = [hand_run("fedlora", seed, [10], [0.9]) for seed in range(3)]
    runs.append(hand_run("fedlora", 0, [10], [0.9], manifest=other))
    runs[-1] = dataclasses.replace(runs[-1], path="elsewhere")
    with pytest.raises(RunError, match=r"\(by fleet: 3 such as 'fedlora-0', 1 such as 'elsewhere'\)"):
        compare(runs)


def test_equal_data_under_another_path_belongs_together():
    other = {"data": {"name": "elsewhere/train.tsv", "sha256": "2"}}
    compare([hand_run("fedlora", 0, [10], [0.9]), hand_run("fedspine", 0, [10], [0.9], manifest=other)])


def test_a_method_s_own_settings_are_no_difference_but_other_values_of_them_are():
    def runs(*decays):
        options = [{"method_options": {"rank_decay": decay, "rank_penalty": 0.005}} for decay in decays]
        return [
            hand_run("fedlora", 0, [10], [0.9]),
            *(hand_run("hetlora", 0, [10], [0.9], config={"method": "hetlora", **own}) for own in options),
        ]

    assert list(compare(runs(0.99)).warnings) == []
    both = compare(runs(0.99, 0.5))
    assert list(both.warnings) == []
    assert {"hetlora (method_options.rank_decay=0.99)", "hetlora (method_options.rank_decay=0.5)"} <= set(
        both.rows["method"]
    )


def test_a_run_from_before_methods_had_options_is_a_repeat_of_one_since():
    now = build_config({"method": "hetlora"}).model_dump(mode="json")
    before = {key: value for key, value in now.items() if key != "method_options"}
    before["train"] = now["train"] | {"rank_decay": 0.99, "rank_penalty": 0.005}
    runs = [hand_run("hetlora", seed, [10], [0.9], config=own) for seed, own in enumerate((now, before))]
    plain = build_config({"method": "fedlora"}).model_dump(mode="json")
    old = {key: value for key, value in plain.items() if key != "method_options"}
    old["train"] = plain["train"] | {"rank_decay": 1.0, "rank_penalty": 0.0}
    runs += [hand_run("fedlora", seed, [10], [0.9], config=own) for seed, own in enumerate((plain, old))]
    table = compare(runs).rows
    assert sorted(table["method"]) == ["fedlora", "hetlora"]
    assert set(table["runs"]) == {2}


def test_runs_of_several_commits_are_warned_of():
    def run_at(method, commit):
        return hand_run(method, 0, [10], [0.9], manifest={"git": {"commit": commit, "dirty": False}})

    assert list(compare([run_at("fedlora", "a" * 40), run_at("fedspine", "a" * 40)]).warnings) == []
    (told,) = compare([run_at("fedlora", "b" * 40), run_at("fedspine", "a" * 40)]).warnings
    assert told == "the runs were made by different commits of fedsim: aaaaaaa, bbbbbbb"


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
    assert "No accuracy was evaluated: speedups are of the total simulated time." in comparison.as_text()


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


def test_from_disk_with_unfinished_runs(tmp_path):
    """Through the files: the JSON holds no NaN, unfinished runs are named."""
    for method, stop in (("fedlora", None), ("fedspine_uniform", 7), ("fedspine", 0)):
        write_run(tmp_path / method, method, 1, rounds=9, clients=16, stop_before=stop)
    comparison = compare([load(tmp_path / method) for method in ("fedlora", "fedspine_uniform", "fedspine")])
    content = json.loads(json.dumps(comparison.as_dict(), allow_nan=False))
    assert [row["method"] for row in content["rows"]] == ["fedlora"]
    assert [run["rounds"] for run in content["runs"]] == [9]
    assert sum("is unfinished and is left out" in warning for warning in content["warnings"]) == 2
    assert content["fastest_class"] == "jetson-agx-xavier"
    assert compare([load(tmp_path / "fedlora")]).rows["speedup"].tolist() == [1.0]


def test_runs_without_client_records_do_without_the_fastest_class(tmp_path):
    config = config_of("fedlora", 0, 3, client_rounds=False)
    write_run(tmp_path / "run", "fedlora", config=config, clients=16)
    comparison = compare([load(tmp_path / "run")])
    assert comparison.fastest_class is None
    assert "fastest" not in comparison.as_text().lower()


def test_a_sweep_says_which_cells_are_missing(tmp_path):
    cells = [{"state": "finished", "label": "a", "error": None}]
    cells += [{"state": "failed", "label": f"cell {index}", "error": "ValueError: no\nmore"} for index in range(4)]
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": cells}))
    (note,) = sweep_notes([tmp_path, tmp_path / "elsewhere"])
    assert sweep_notes(sorted(tmp_path.iterdir())) == [note]  # SWEEP/* names the list of cells itself
    assert f"sweep '{tmp_path}' lacks 4 of 5 cells: cell 0 (failed, ValueError: no); cell 1" in note
    assert note.endswith("and 1 more")
    comparison = compare([hand_run("fedlora", 0, [10], [0.9])], notes=[note])
    assert f"Warning: {note}." in comparison.as_text()
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": cells[:1]}))
    assert sweep_notes([tmp_path]) == []
    for damaged in ("{", "[]", '{"cells": [1]}'):
        (tmp_path / "sweep.json").write_text(damaged)
        assert "cannot be read" in sweep_notes([tmp_path])[0]


def test_where_many_keys_differ_a_label_names_only_what_is_unusual():
    from fedsim.study.belonging import _told_apart

    usual = {"a": "1", "b": "1", "c": "1", "d": "1"}
    rivals = [usual, {**usual, "a": "2"}, {**usual, "b": "2", "c": "2"}, {**usual, "d": "2"}]
    assert _told_apart(rivals) == ["", "a=2", "b=2, c=2", "d=2"]
    assert _told_apart(rivals[:2]) == ["a=1", "a=2"]
    two = [{"a": "1", "b": "1", "c": "1", "d": "1"}, {"a": "2", "b": "2", "c": "2", "d": "2"}]
    assert len(set(_told_apart(two))) == 2


def test_the_speedups_are_drawn_beside_the_other_figures(tmp_path, capsys):
    for method, clients in (("fedlora", 8), ("fedspine", 8)):
        write_run(tmp_path / "runs" / method, method, rounds=4, clients=clients)
    assert main(["compare", str(tmp_path / "runs"), "--out", str(tmp_path / "figures")]) == 0
    assert "Speedup over fedlora" in capsys.readouterr().out
    kinds = {path.suffix for path in (tmp_path / "figures").glob("speedup.*")}
    assert kinds == {".png", ".pdf", ".csv"}
    drawn = pd.read_csv(tmp_path / "figures" / "speedup.csv")
    assert drawn["method"].tolist() == ["fedlora", "fedspine"]
    assert main(["compare", str(tmp_path / "runs" / "fedlora"), "--out", str(tmp_path / "alone")]) == 0
    assert not list((tmp_path / "alone").glob("speedup.*"))
    assert (tmp_path / "alone" / "timeline.png").exists()


def test_runs_of_different_length_are_compared_by_the_mean_round_and_told():
    """Half the rounds in half the time are no speedup."""
    runs = [hand_run("fedlora", 0, [10, 20, 30, 40], [None] * 4), hand_run("fedspine", 0, [10, 20], [None] * 2)]
    comparison = compare(runs)
    assert comparison.speedup_of == "round_s"
    assert row_of(comparison, "fedspine")["speedup"] == 1.0
    text = comparison.as_text()
    assert "speedups are of the mean simulated time of a round" in text
    assert "the rows hold 2 to 4 rounds: their total times, traffic and energy are not of equal work" in text
    assert text.splitlines()[0].split()[-1] == "rounds"
    same = compare([hand_run(name, 0, [10, 20], [None] * 2) for name in ("fedlora", "fedspine")])
    assert "rounds: their" not in same.as_text()
    assert "rounds" not in same.as_text().splitlines()[0]


def test_lost_updates_are_a_column_and_a_warning():
    runs = [hand_run("fedlora", 0, [10, 20], [0.6, 0.7]), hand_run("fedspine", 0, [5, 10], [0.6, 0.7], lost=2)]
    comparison = compare(runs)
    assert row_of(comparison, "fedspine")["lost_fraction"] == 1.0
    text = comparison.as_text()
    assert text.splitlines()[0].split()[-1] == "lost"
    assert "not finite): fedspine 100%; their rounds are short" in text
    assert "lost" not in compare(runs[:1]).as_text()


@pytest.mark.parametrize(("accuracy", "warned"), [(0.52, True), (0.62, False)])
def test_a_target_that_guessing_reaches_is_told(accuracy, warned):
    labelled = {"data": {**FINISHED["data"], "label_names": ["no", "yes"]}}
    runs = [
        hand_run("fedlora", 0, [10, 20], [0.5, accuracy], manifest=labelled),
        hand_run("fedspine", 0, [10, 20], [0.5, 0.9], manifest=labelled),
    ]
    assert ("hardly above guessing among 2 labels" in compare(runs).as_text()) is warned


def test_a_target_that_every_first_evaluation_reaches_is_told():
    runs = [hand_run("fedlora", 0, [10, 20], [0.7, 0.8]), hand_run("fedspine", 0, [9, 18], [0.75, 0.9])]
    said = "every run is at the target at its first evaluation"
    assert said in compare(runs, 0.7).as_text()
    assert said not in compare(runs, 0.75).as_text()
    assert said not in compare(runs[:1], 0.7).as_text()


def test_a_speedup_over_fewer_seeds_than_the_row_has_says_so():
    runs = [
        *(hand_run("fedlora", seed, [10, 20], [0.7, 0.8]) for seed in (0, 1)),
        *(hand_run("fedspine", seed, [5, 10], [0.7, 0.8]) for seed in (0, 2)),
    ]
    assert "2.00x [no interval] (1 of 2)" in compare(runs, 0.8).as_text()


def test_the_default_baseline_says_that_it_is_one():
    runs = [hand_run("fedlora", 0, [10, 20], [0.7, 0.8]), hand_run("fedspine", 0, [5, 10], [0.7, 0.8])]
    assert "Speedup over fedlora (by default; --baseline sets another), paired" in compare(runs).as_text()
    assert "Speedup over fedlora, paired" in compare(runs, baseline="fedlora").as_text()


def test_what_a_policy_brings_along_is_not_named_beside_it():
    def run(policy, **control):
        config = Config.model_validate({"method": "fedspine", "control": {"policy": policy, **control}})
        return hand_run("fedspine", 0, [10], [0.9], config=config.model_dump(mode="json"))

    own = {"exploration": 2.0**0.5, "cut": "played"}
    groups, _ = group_runs([run("sucb"), run("e_ucb", **own)])
    assert [group.label for group in groups] == ["fedspine (control.policy=sucb)", "fedspine (control.policy=e_ucb)"]
    groups, _ = group_runs([run("sucb"), run("e_ucb", **own), run("e_ucb", exploration=0.5, cut="played")])
    assert groups[2].label == "fedspine (control.exploration=0.5, control.policy=e_ucb)"
    groups, _ = group_runs(
        [run("sucb"), run("e_ucb", **own), run("sucb", exploration=0.5, discount=0.9), run("sucb", arms="absolute")]
    )
    assert groups[1].label == "fedspine (control.policy=e_ucb)"


def test_where_devices_were_cut_unlike_the_consensus_stands_beside_the_panel():
    runs = [hand_run("fedlora", 0, [10], [0.9]), hand_run("fedspine", 0, [10], [0.8], ratio=0.5)]
    text = compare(runs).as_text()
    assert text.splitlines()[0].split()[4] == "consensus"
    assert "0.675" in next(line for line in text.splitlines() if line.startswith("fedspine"))
    assert "Consensus: one model cut to the fleet-mean ratio" in text
    assert "onsensus" not in compare(runs[:1]).as_text()
