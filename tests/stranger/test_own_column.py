"""A column of a user's own, with its figure: one file, nothing of the package touched."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import fedsim
from fedsim.errors import ConfigError
from fedsim.plots import write_figures
from fedsim.plots.own_figures import OWN_FIGURES
from fedsim.records.own_columns import OWN_COLUMNS, forget_column

OPTIONS = {
    "train.engine": "none",
    "fleet.clients": 8,
    "server.rounds": 3,
    "prune.warmup_rounds": 1,
    "prune.end_round": 2,
}


@pytest.fixture(autouse=True)
def forget_mine():
    yield
    for place in list(OWN_COLUMNS):
        forget_column(*place)
    OWN_FIGURES.clear()


def bits_per_joule(arrivals, learned):
    return 8.0 * arrivals.bytes_up / arrivals.energy_joules


def draw(figure, groups):
    frame = pd.concat([run.client_rounds.assign(row=group.label) for group in groups for run in group.runs.values()])
    axes = figure.subplots()
    for label, own in frame.groupby("row"):
        axes.plot(own.groupby("round")["upload_bits_per_joule"].mean(), label=label)
    axes.set_xlabel("round")
    axes.set_ylabel("upload bits per joule")
    axes.legend()
    return frame[["row", "round", "client", "upload_bits_per_joule"]]


def test_a_column_is_recorded_read_and_drawn(tmp_path):
    before = fedsim.run("quickstart", method="fedlora", out=tmp_path / "before", quiet=True, **OPTIONS)
    fedsim.register_column(
        "client_rounds", "upload_bits_per_joule", bits_per_joule, unit="bit/J", meaning="bits sent per joule spent"
    )
    fedsim.register_column("rounds", "clients_late", lambda a, _: int((a.outcome == 1).sum()), dtype="int64",
                           unit="clients", meaning="clients that came too late")  # fmt: skip
    fedsim.register_figure("bits_per_joule", draw)
    run = fedsim.run("quickstart", method="fedlora", out=tmp_path / "run", quiet=True, **OPTIONS)
    rows = run.client_rounds
    np.testing.assert_allclose(rows["upload_bits_per_joule"], 8 * rows["bytes_up"] / rows["energy_j"])
    assert run.rounds["clients_late"].tolist() == [0, 0, 0]
    field = pq.read_schema(tmp_path / "run" / "client_rounds.parquet").field("upload_bits_per_joule")
    assert field.metadata == {b"unit": b"bit/J", b"meaning": b"bits sent per joule spent"}
    written = {path.name for path in write_figures([run], tmp_path / "figures")}
    assert {"bits_per_joule.png", "bits_per_joule.pdf", "bits_per_joule.csv"} <= written
    # A run from before it was registered reads as null.
    assert fedsim.load(before.path).client_rounds["upload_bits_per_joule"].isna().all()


def test_what_cannot_be_a_column_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has a column 'reward' already"):
        fedsim.register_column("client_rounds", "reward", bits_per_joule, unit="", meaning="mine")
    with pytest.raises(ConfigError, match="table 'events' is not allowed"):
        fedsim.register_column("events", "mine", bits_per_joule, unit="", meaning="mine")
    fedsim.register_column("client_rounds", "short", lambda a, _: [1.0], unit="", meaning="one value for all")
    with pytest.raises(ConfigError, match="'short' gave 1 values for 8 flights"):
        fedsim.run(
            {"method": "fedlora", "cost": {"model": "roberta-base"}}, out=tmp_path / "run", quiet=True, **OPTIONS
        )
    with pytest.raises(ConfigError, match="exists already"):
        fedsim.register_figure("timeline", draw)
