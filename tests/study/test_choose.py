"""Runs chosen by their settings."""

import pytest
from made_up import write_run

from fedsim.cli import main
from fedsim.errors import ConfigError, RunError
from fedsim.records.reader import Run
from fedsim.settings import Config
from fedsim.study.choose import choose_runs


def config(method, seed, **sections):
    return Config.model_validate({"method": method, "seed": seed, **sections})


def run(seed, **sections):
    return Run(path=f"run-{seed}", config=config("fedspine", seed, **sections).model_dump(mode="json"), manifest={})


FAST = run(0, fleet={"name": "fast"}, train={"learning_rate": 0.001, "local_steps": 5})
SLOW = run(1, fleet={"name": "slow"}, train={"learning_rate": 0.01, "local_steps": 10})
OTHER = run(2, fleet={"name": "slow"}, train={"learning_rate": 0.01, "local_steps": 20})


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ([], [FAST, SLOW, OTHER]),
        (["fleet.name=slow"], [SLOW, OTHER]),
        (["fleet.name=fast,slow"], [FAST, SLOW, OTHER]),
        (["fleet.name=slow", "train.local_steps=20"], [OTHER]),
        (["train.learning_rate=1e-3"], [FAST]),
        (["seed=0,2"], [FAST, OTHER]),
        (["method=fedspine"], [FAST, SLOW, OTHER]),
    ],
)
def test_runs_with_these_settings_are_taken_in_their_order(where, found):
    assert choose_runs([FAST, SLOW, OTHER], where) == found


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ConfigError, match=r"--where: value 'fleet.name' is not allowed \(KEY=VALUE"):
        choose_runs([FAST], ["fleet.name"])
    with pytest.raises(ConfigError, match=r"--where: unknown key 'fleet.nam'; did you mean 'fleet.name'"):
        choose_runs([FAST], ["fleet.nam=fast"])
    with pytest.raises(RunError, match=r"--where fleet.name=quick: no run has it; there are fast, slow"):
        choose_runs([FAST, SLOW], ["fleet.name=quick"])


def test_a_sweep_over_fleets_is_compared_fleet_by_fleet(tmp_path, capsys):
    """The refusal says how; the same words make it work, for the table and the page."""
    for fleet in ("one", "two"):
        for method in ("fedlora", "fedspine"):
            short = {"fleet": {"name": fleet}, "server": {"rounds": 6}}
            write_run(
                tmp_path / f"{fleet}-{method}",
                method,
                0,
                config=config(method, 0, **short),
                clients=4,
                manifest={"fleet": {"name": fleet, "clients": 4}},
            )
    assert main(["compare", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "compare them separately, with --where fleet.name=one or --where fleet.name=two" in said
    assert main(["compare", str(tmp_path), "--where", "fleet.name=two"]) == 0
    assert "fleet two" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path), "--where", "fleet.name=two", "--out", str(page)]) == 0
    assert "fleet.name=two" in page.read_text()
