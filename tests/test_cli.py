"""The command line: a user's own methods in every command, refusals that say their cure and come first."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import pytest

import fedsim
from fedsim.cli import main
from fedsim.control.policies import POLICIES
from fedsim.errors import FedsimError
from fedsim.methods.catalogue import METHODS

SMALL = {
    "method": "fedlora",
    "model": {"lora_rank": 4, "lora_rank_max": 8},
    "fleet": {"clients": 4},
    "server": {"rounds": 3},
    "train": {"engine": "none", "local_steps": 4},
    "prune": {"warmup_rounds": 1, "end_round": 3, "max_step": 0.5},
}
TRAINED = {
    **SMALL,
    "data": {"name": "synthetic", "max_samples": 80},
    "train": {"local_steps": 2, "batch_size": 4, "max_length": 16},
    "evaluate": {"every_rounds": 2, "panel": 1, "max_samples": 20},
}
OWN = """
import fedsim
from fedsim.control.policies import POLICIES
from fedsim.errors import FedsimError

fedsim.register_policy("my_policy", POLICIES["uniform"].make, one_rank=True)
settings = {"control.policy": "my_policy"}
fedsim.register_method("mine", fedsim.Method("mine", "one line", (), prunes=True, defaults=settings))
"""
HINT = "; one of your own needs --import FILE.py"


@pytest.fixture(autouse=True)
def forget():
    """Gives a function that takes the user's own parts away, as a new process would; called at the end too."""
    registries = [(registry, dict(registry)) for registry in (METHODS, POLICIES)]

    def forget_own():
        for registry, before in registries:
            registry.clear()
            registry.update(before)
        sys.modules.pop("fedsim_user_own", None)

    yield forget_own
    forget_own()


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


@pytest.fixture
def config(tmp_path):
    (tmp_path / "small.yaml").write_text(json.dumps(SMALL))
    return str(tmp_path / "small.yaml")


def test_runs_of_a_method_of_one_s_own_are_run_and_read_by_every_command(tmp_path, own, forget, capsys):
    config, run = tmp_path / "trained.yaml", str(tmp_path / "run")
    config.write_text(json.dumps({**TRAINED, "server": {"rounds": 12}}))
    assert main(["run", str(config), "method=mine", "--out", run, "--quiet", "--import", own]) == 0
    commands = [
        ["run", str(config), "method=mine", "--out", run, "--resume"],
        ["compare", run, "--out", str(tmp_path / "figures")],
        ["report", run, "--out", str(tmp_path / "report.html")],
        ["fit-surrogate", run, "--out", str(tmp_path / "surrogate.json")],
        ["export", run, "--consensus", "--out", str(tmp_path / "model")],
    ]
    for command in commands:
        forget()
        capsys.readouterr()
        if command[0] != "compare":  # it needs no method of the catalogue
            assert main(command) == 2, command
            assert capsys.readouterr().err.endswith(f"{HINT}\n"), command
        assert main([*command, "--import", own]) == 0, command
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "setting", ["method=mine", "control.policy=my_policy", "prune.criterion=my_criterion train.engine=auto"]
)
def test_unknown_parts_say_that_one_s_own_must_be_imported(tmp_path, config, setting, capsys):
    words = ["method=fedspine_uniform", "data.name=synthetic", "data.max_samples=80", *setting.split()]
    assert main(["run", config, *words, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.endswith(f"{HINT}\n")


def test_other_refusals_do_not(tmp_path, config, own, capsys):
    run = str(tmp_path / "run")
    assert main(["run", config, "--out", run]) == 0
    refused = [
        ["run", config, "method=yours", "--import", own],  # it was given, and brings no such method
        ["run", config, "fleet.name=mine"],
        ["compare", run, "--baseline", "mine"],
        ["devices", "mine"],
    ]
    for command in refused:
        capsys.readouterr()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "mine" in error or "yours" in error
        assert "--import" not in error, command


def test_a_file_that_cannot_be_imported_is_named(tmp_path, config, capsys):
    (tmp_path / "own.py").write_text("1 / 0")
    assert main(["run", config, "--import", str(tmp_path / "own.py")]) == 2
    assert "own.py' cannot be imported (ZeroDivisionError: division by zero)" in capsys.readouterr().err


def test_quiet_runs_say_nothing_until_their_summary(tmp_path, config, capsys):
    assert main(["run", config, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("fedlora seed 0, 3 rounds")


def test_compare_refuses_before_it_prints(tmp_path, config, capsys):
    run = str(tmp_path / "run")
    assert main(["run", config, "--out", run, "--quiet"]) == 0
    capsys.readouterr()
    assert main(["compare", run, "--round", "99", "--out", str(tmp_path / "figures")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "--round: value 99 is not allowed" in printed.err
    assert not (tmp_path / "figures").exists()


def test_export_refuses_before_it_loads_torch(tmp_path):
    run = fedsim.run(TRAINED, out=tmp_path / "run", quiet=True)
    code = "import sys; from fedsim.cli import main; code = main(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    for whose, out, words in (("9", "new", "--device: value 9 is not allowed"), ("0", "run", "exists already")):
        command = ["export", str(run.path), "--device", whose, "--out", str(tmp_path / out)]
        told = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
        assert told.stdout.split() == ["2", "False"]
        assert words in told.stderr
        assert "loading" not in told.stderr


def test_a_study_without_its_data_says_how_to_give_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cure = "; give data.path=... and data.test_path=... here, or correct the configuration\n"
    study = "sst2-minilm/small-fleet"
    assert main(["sweep", "criterion/sweep", "--seeds", "0", "--out", "out"]) == 2
    told = capsys.readouterr().err
    assert "data.path 'train.tsv': no such file" in told
    assert told.endswith(cure)
    (tmp_path / "mine.tsv").write_text("a good one\t1\na bad one\t0\n")
    assert main(["sweep", study, "--grid", "method=fedlora,fedspine", "data.path=mine.tsv"]) == 2
    told = capsys.readouterr().err
    assert "data.test_path 'dev.tsv': no such file" in told
    assert told.endswith(cure)
    assert main(["sweep", study, "--grid", "method=fedlora,fedspine", "data.path=other.tsv"]) == 2
    told = capsys.readouterr().err  # the user's own word: there is nothing to add
    assert "data.path 'other.tsv': no such file" in told
    assert "give data.path" not in told


@pytest.mark.parametrize("key", ["method", "fleet.name", "train.torch_device", "aggregate.rule", "data.path"])
def test_an_endless_value_is_not_echoed_whole(key, capsys, tmp_path):
    assert main(["run", "quickstart", f"{key}={'x' * 3000}", "--out", str(tmp_path / "r")]) == 2
    assert "x" * 1000 not in capsys.readouterr().err


VALUES = [
    "2147483648",
    "1e308",
    "-1",
    "1" + "0" * 400,
    ".nan",
    "-.inf",
    "[1]",
    "{a: 1}",
    "2001-01-01",
    "'\\0'",
    "~nobody/x",
]


@pytest.mark.parametrize("value", VALUES)
def test_no_value_of_any_key_ends_in_a_traceback(value, capsys, tmp_path, monkeypatch):
    """Every key is given nonsense; what is allowed nevertheless is only built, not run."""
    from fedsim.runner.config import build_config, dotted, parse_overrides
    from fedsim.settings import Config

    for key in dotted(Config().model_dump()):
        with contextlib.suppress(FedsimError):  # and nothing else
            build_config({"train": {"engine": "none"}}, parse_overrides([f"{key}={value}"]))
