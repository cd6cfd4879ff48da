"""Figures: which are drawn, the numbers beside them, and that equal runs give equal files."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from made_up import write_run
from matplotlib.colors import to_hex

from fedsim.errors import ConfigError, RunError
from fedsim.plots import frames, write_figures
from fedsim.plots.style import COLOURS, styles
from fedsim.records.reader import find_runs, load
from fedsim.study.belonging import group_runs

NAMES = ("accuracy_over_time", "idle_by_class", "choices_by_class", "timeline")
KINDS = {"png": b"\x89PNG", "pdf": b"%PDF", "csv": b"method,"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    for method in ("fedlora", "fedspine"):
        for seed in (0, 1):
            write_run(base / f"{method}-{seed}", method, seed, rounds=8, clients=16)
    return find_runs([base])


@pytest.fixture(scope="module")
def drawn(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("figures") / "new"
    return out, write_figures(runs, out, 5)


def test_each_figure_is_there_in_three_kinds(drawn):
    out, written = drawn
    assert sorted(written) == sorted(out / f"{name}.{kind}" for name in NAMES for kind in KINDS)
    assert sorted(out.iterdir()) == sorted(written)
    for path in written:
        content = path.read_bytes()
        assert content.startswith(KINDS[path.suffix[1:]])
        assert len(content) > (5_000 if path.suffix != ".csv" else 100)


def test_equal_runs_give_equal_files_without_dates(runs, drawn, tmp_path):
    _, written = drawn
    for path in write_figures(runs, tmp_path, 5):
        before = next(one for one in written if one.name == path.name)
        assert path.read_bytes() == before.read_bytes(), path.name
        assert b"CreationDate" not in path.read_bytes()


def test_the_numbers_behind_accuracy(runs, drawn):
    table = pd.read_csv(drawn[0] / "accuracy_over_time.csv")
    for run in runs:
        own = table[(table["method"] == run.method) & (table["seed"] == run.seed)]
        tested = run.rounds.dropna(subset=["accuracy"])
        np.testing.assert_array_equal(own["end_s"], tested["end_s"])
        np.testing.assert_array_equal(own["accuracy"], tested["accuracy"])
    assert len(table) == sum(run.rounds["accuracy"].notna().sum() for run in runs)


def test_the_numbers_behind_idle(runs, drawn):
    table = pd.read_csv(drawn[0] / "idle_by_class.csv").set_index(["method", "seed", "device"])["idle_fraction"]
    run = runs[-1]
    for device in run.client_rounds["device"].unique():
        shares = []
        for _, rows in run.client_rounds[run.client_rounds["device"] == device].groupby("round"):
            durations = [run.rounds["duration_s"].iloc[int(rows["round"].iloc[0])]] * len(rows)
            shares.append(rows["idle_s"].sum() / sum(durations))
        assert table[run.method, run.seed, device] == pytest.approx(np.mean(shares))


def test_the_numbers_behind_the_choices(runs, drawn):
    table = pd.read_csv(drawn[0] / "choices_by_class.csv")
    rows = pd.concat([run.client_rounds for run in runs if run.method == "fedspine"])
    rows = rows[(rows["round"] == 6) & (rows["device"] == "jetson-tx2")]
    own = table[(table["method"] == "fedspine") & (table["round"] == 6) & (table["device"] == "jetson-tx2")].iloc[0]
    assert own["prune_ratio_target_mean"] == pytest.approx(rows["prune_ratio_target"].mean())
    assert own["lora_rank_mean"] == pytest.approx(rows["lora_rank"].mean())
    assert own["lora_rank_p90"] == pytest.approx(rows["lora_rank"].quantile(0.9))


def test_the_timeline_has_every_client_of_its_round_grouped_by_class(runs, drawn):
    table = pd.read_csv(drawn[0] / "timeline.csv")
    assert set(table["round"]) == {5}
    for method, own in table.groupby("method"):
        assert sorted(own["client"]) == list(range(16))
        assert own["device"].drop_duplicates().tolist() == ["jetson-tx2", "jetson-xavier-nx", "jetson-agx-xavier"]
        duration_s = next(run for run in runs if run.method == method).rounds["duration_s"][5]
        np.testing.assert_allclose(own[[f"{phase}_s" for phase in frames.PHASES]].sum(axis=1), duration_s, atol=1e-9)


def test_the_default_round_is_the_middle_of_the_shortest_run(runs):
    groups, _ = group_runs(runs)
    assert set(frames.timeline(groups, None)["round"]) == {4}


@pytest.mark.parametrize("asked", [-1, 8])
def test_a_round_that_is_not_there_is_refused(runs, tmp_path, asked):
    with pytest.raises(ConfigError, match=rf"--round: value {asked} is not allowed \(rounds 0 to 7"):
        write_figures(runs, tmp_path / "out", asked)
    assert not (tmp_path / "out").exists()


def test_timing_only_and_sparse_runs_draw_what_they_can(tmp_path):
    """Five methods, too: more than panels in a row."""
    path = write_run(tmp_path / "timing", rounds=3, clients=8, with_accuracy=False)
    timing = [load(path) for _ in range(5)]
    for index, run in enumerate(timing):
        run.manifest["method"] = f"method_{index}"
    assert {path.stem for path in write_figures(timing, tmp_path / "a")} == set(NAMES) - {"accuracy_over_time"}
    sparse = load(write_run(tmp_path / "sparse", rounds=3, clients=8, client_rounds=False))
    assert {path.stem for path in write_figures([sparse], tmp_path / "b")} == {"accuracy_over_time"}


def test_unfinished_runs_are_left_out(tmp_path):
    done = load(write_run(tmp_path / "done", rounds=6, clients=8))
    half = load(write_run(tmp_path / "half", "fedlora", rounds=6, clients=8, stop_before=4))
    write_figures([done, half], tmp_path / "out")
    assert set(pd.read_csv(tmp_path / "out" / "idle_by_class.csv")["method"]) == {"fedspine"}
    with pytest.raises(RunError, match="unfinished"):
        write_figures([half], tmp_path / "other")


def test_captions_name_the_clock(tmp_path, monkeypatch):
    from fedsim.plots import figures

    said = []
    monkeypatch.setattr(figures, "caption", lambda _, text: said.append(text))
    write_figures([load(write_run(tmp_path / "done", rounds=6, clients=8))], tmp_path / "out")
    assert len(said) == 4
    for text in said:
        assert text.endswith(
            "Clock: roberta-base, batch 8 x 128 tokens, fp32; fleet fedspine-80, 8 clients; reconstruction."
        )


def test_no_two_of_many_methods_look_alike():
    looks = styles([f"method_{index}" for index in range(60)])
    assert len({(look.colour, str(look.dashes)) for look in looks.values()}) == 60


def test_twelve_rows_differ_in_colour_marker_and_hatch():
    looks = list(styles([f"method_{index}" for index in range(12)]).values())
    assert len({look.colour for look in looks}) == 12
    assert len({look.marker for look in looks}) == 12
    assert len({(look.hatch, look.colour) for look in looks}) == 12
    assert len({look.hatch for look in looks[6:]}) == 6
    assert all(look.hatch for look in looks[6:])


# As Machado, Oliveira and Fernandes (2009) simulate them at full severity, in linear RGB.
SEEN = {
    "all colours": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def lab(colour, seen):
    """CIE L*a*b* (D65) of a hexadecimal sRGB colour as somebody sees it."""
    encoded = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.asarray(seen) @ linear, 0, 1)
    xyz = np.array([[0.41246, 0.35758, 0.18044], [0.21267, 0.71515, 0.07217], [0.01933, 0.11919, 0.95030]]) @ linear
    ratio = xyz / (0.95047, 1.0, 1.08883)
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("who", SEEN)
def test_colour_blind_readers_tell_the_twelve_colours_apart(who):
    """2.3 is a just noticeable difference side by side."""
    colours = np.array([lab(colour, SEEN[who]) for colour in COLOURS])
    apart = np.linalg.norm(colours[:, None] - colours[None], axis=2)[np.triu_indices(len(COLOURS), 1)]
    assert apart.min() > (25 if who == "all colours" else 13)


def test_a_row_keeps_its_look_whatever_else_is_drawn(runs, tmp_path, monkeypatch):
    """The first row recorded no clients: the idle shares are those of the second alone, in the second's colour."""
    from fedsim.plots import figures

    sparse = load(write_run(tmp_path / "sparse", "fedlora", rounds=8, clients=16, client_rounds=False))
    drawn = {}

    def kept(figure, _frame, _out, name, _mark):
        drawn[name] = figure
        return []

    monkeypatch.setattr(figures, "save", kept)
    full = next(run for run in runs if run.method == "fedspine" and run.seed == 0)
    write_figures([sparse, full], tmp_path / "out")
    lines = {line.get_label(): line.get_color() for line in drawn["accuracy_over_time"].axes[0].get_lines()}
    bars = drawn["idle_by_class"].axes[0].containers[0]
    assert bars.get_label() == "fedspine"
    assert to_hex(bars[0].get_facecolor()).upper() == lines["fedspine"] == COLOURS[1]


def test_rows_follow_each_other_as_asked(runs, tmp_path):
    write_figures(runs, tmp_path, order=["fedspine", "fedlora"])
    assert list(pd.read_csv(tmp_path / "idle_by_class.csv")["method"].unique()) == ["fedspine", "fedlora"]


def speedup_rows():
    columns = ["method", "speedup", "speedup_low", "speedup_high", "reached", "runs", "is_baseline"]
    nan = np.nan
    rows = [
        ["a", 0.89, 0.6, 1.45, 3, 3, False],
        ["b", 1.0, 1.0, 1.0, 3, 3, True],
        ["c", 1.2, nan, nan, 1, 3, False],
        ["d", nan, nan, nan, 0, 3, False],
    ]
    return pd.DataFrame(rows, columns=columns)


def test_the_numbers_of_speedups_stand_in_a_column_beside_the_axes():
    """At the end of a bar or a whisker a number reads as the position of that end."""
    from fedsim.plots import summary
    from fedsim.plots.style import settle

    seen = []

    def sink(figure, frame, *_):
        settle(figure, frame, None)
        renderer, axes = figure.canvas.get_renderer(), figure.axes[0]
        assert all(to_hex(bar.get_facecolor()).upper() not in COLOURS for bar in axes.patches)
        for text in axes.texts:
            seen.append((text.get_text(), text.get_window_extent(renderer)))
        seen.append(("axes", axes.get_window_extent(renderer)))
        seen.append(("figure", figure.bbox))

    summary.draw_speedups(speedup_rows(), "time", "b", "", None, sink)
    boxes = dict(seen)
    texts = ["0.89x [0.60, 1.45]", "1.00x, baseline", "1.20x, no interval", "not reached"]
    assert [text for text, _ in seen] == [*texts, "axes", "figure"]
    assert len({round(boxes[text].x0, 1) for text in texts}) == 1
    assert all(boxes["axes"].x1 < boxes[text].x0 < boxes[text].x1 <= boxes["figure"].x1 for text in texts)


def test_runs_that_do_not_belong_together_are_not_drawn(runs, tmp_path):
    other = load(write_run(tmp_path / "other", rounds=2, clients=8))
    with pytest.raises(RunError, match="fleet"):
        write_figures([*runs, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(runs, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="cannot write"):
        write_figures(runs, tmp_path / "file" / "figures")


def test_importing_the_plots_loads_no_matplotlib():
    code = "import sys, fedsim.plots; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_timeline_reaches_to_the_end_of_its_longest_round():
    """The panels share an axis; the first one drawn may be the shortest."""
    import pandas as pd

    from fedsim.plots import figures
    from fedsim.plots.frames import PHASES

    def rows(method: str, seconds: float) -> pd.DataFrame:
        phases = {f"{phase}_s": [seconds / len(PHASES)] * 2 for phase in PHASES}
        about = {"method": method, "seed": 0, "round": 1, "client": [0, 1], "device": "a", "mode": "m", "outcome": "ok"}
        return pd.DataFrame({**about, **phases})

    limits = []
    frame = pd.concat([rows("short", 5.0), rows("long", 20.0)], ignore_index=True)
    figures.draw_timeline(frame, "", None, lambda figure, *_: limits.extend(axes.get_xlim() for axes in figure.axes))
    assert len(limits) == 2
    assert all(low == 0.0 and 20.0 < high < 22.0 for low, high in limits)


def timeline_rows(method: str, seconds: dict[str, float], devices: list[str]) -> pd.DataFrame:
    phases = {f"{phase}_s": [seconds.get(phase, 0.0)] * len(devices) for phase in frames.PHASES}
    about = {"method": method, "seed": 0, "round": 1, "client": range(len(devices)), "mode": "m", "outcome": "ok"}
    return pd.DataFrame({**about, "device": devices, **phases})


def test_waiting_is_hatched_and_named_only_where_somebody_waits():
    from fedsim.plots import figures

    legends = []

    def sink(figure, *_):
        legend = figure.legends[0]
        names = [text.get_text() for text in legend.get_texts()]
        legends.append(dict(zip(names, legend.legend_handles, strict=True)))

    figures.draw_timeline(timeline_rows("a", {"wait": 2.0, "compute": 1.0}, ["x"]), "", None, sink)
    figures.draw_timeline(timeline_rows("a", {"compute": 1.0, "idle": 1.0}, ["x"]), "", None, sink)
    assert list(legends[0]) == ["wait", "compute"]
    assert legends[0]["wait"].get_hatch()
    assert not legends[0]["compute"].get_hatch()
    assert list(legends[1]) == ["compute", "idle"]


def test_each_panel_of_a_timeline_names_its_own_classes():
    """Other clients take part in another round; the names of the first panel would be wrong beside the second."""
    from fedsim.plots import figures

    named = []

    def sink(figure, *_):
        named.append([[text.get_text() for text in axes.get_yticklabels()] for axes in figure.axes])

    one, other = ["x", "x", "y"], ["x", "y", "y"]
    for second in (one, other):
        rows = [timeline_rows("a", {"compute": 1.0}, one), timeline_rows("b", {"compute": 2.0}, second)]
        figures.draw_timeline(pd.concat(rows, ignore_index=True), "", None, sink)
    assert named == [[["x", "y"], ["", ""]], [["x", "y"], ["x", "y"]]]


def test_legends_lie_within_their_figure():
    from fedsim.plots import summary
    from fedsim.plots.style import settle

    classes = ["jetson-tx2", "jetson-xavier-nx", "jetson-agx-xavier"]
    frame = pd.DataFrame({"method": "a", "device": classes, "cause": ["compute", "link", "wait"], "share": 1 / 3})
    boxes = []

    def sink(figure, frame, *_):
        settle(figure, frame, None)
        boxes.append((figure.legends[0].get_window_extent(figure.canvas.get_renderer()), figure.bbox))

    summary.draw_critical(frame, classes, "", None, sink)
    legend, figure = boxes[0]
    assert figure.x0 <= legend.x0 < legend.x1 <= figure.x1


def test_a_legend_of_long_names_lies_within_its_figure(runs):
    """Names of 34 characters a line, two to a row."""
    from fedsim.plots import figures
    from fedsim.plots.style import settle
    from fedsim.study.belonging import Group

    label = "fedspine (control.cut=middle, control.exploration=1.4142135623730951, control.policy=sucb{})"
    groups = [Group(label.format(place), "fedspine", {(0, -1): runs[0]}) for place in range(4)]
    boxes = []

    def sink(figure, frame, *_):
        settle(figure, frame, None)
        legend = figure.axes[0].get_legend()
        assert "exploration=1.4142," in legend.get_texts()[0].get_text()
        boxes.append((legend.get_window_extent(figure.canvas.get_renderer()), figure.bbox))

    figures.draw_accuracy(groups, "", None, sink)
    legend, figure = boxes[0]
    assert figure.x0 <= legend.x0 < legend.x1 <= figure.x1
    assert figure.y0 <= legend.y0 < legend.y1 <= figure.y1


def test_a_page_takes_the_caption_off_and_gets_its_text():
    from fedsim.plots.style import canvas, caption, without_caption

    said = "Bold: mean over seeds. " * 12
    with canvas(6.4, 4.0) as figure:
        caption(figure, said)
        assert without_caption(figure) == said.strip()
        assert figure.texts == []
        assert without_caption(figure) == ""
        assert tuple(figure.get_size_inches()) == pytest.approx((6.4, 4.0))


def test_a_long_caption_takes_no_room_from_the_axes():
    from fedsim.plots.style import canvas, caption, settle

    heights = []
    for lines in (3, 9):
        with canvas(6.4, 4.0) as figure:
            axes = figure.add_subplot()
            caption(figure, "word " * 23 * lines)
            settle(figure, pd.DataFrame(), None)
            heights.append(axes.get_window_extent().height)
    assert heights[1] == pytest.approx(heights[0], rel=0.02)


def test_a_bar_too_low_for_its_number_has_it_above_and_without_a_box(runs):
    """A coloured box over a bar of no height reads as a bar."""
    from fedsim.plots import figures
    from fedsim.study.belonging import Group

    run = load(runs[0].path)
    run.client_rounds.loc[run.client_rounds["device"] == "jetson-tx2", "idle_s"] = 0.0
    said = {}

    def sink(figure, *_):
        said.update({text.get_text(): text for text in figure.axes[0].texts})

    classes = ["jetson-tx2", "jetson-xavier-nx", "jetson-agx-xavier"]
    figures.draw_idle([Group("a", "fedlora", {(0, -1): run})], classes, "", None, sink)
    assert len(said) == 3
    assert said["0%"].get_bbox_patch() is None
    assert to_hex(said["0%"].get_color()) != "#ffffff"
    assert sum(text.get_bbox_patch() is not None for text in said.values()) == 2
