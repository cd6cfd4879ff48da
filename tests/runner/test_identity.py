"""A run knows what it was made of: other content under the same names is refused."""

from __future__ import annotations

import json
import shutil

import pytest

import fedsim
from fedsim.cli import main
from fedsim.errors import ModelError, RunError
from fedsim.model_folder import check_model_folder
from fedsim.records.folder import MANIFEST
from fedsim.records.reader import find_runs
from fedsim.resources import asset_folder, resource_folder
from fedsim.runner.identity import check_same, code_digest, identity
from fedsim.settings import Config
from fedsim.study.choose import whole_runs

TIMING = {"train.engine": "none", "server.rounds": 3, "server.checkpoint_every": 1, "method": "fedlora", "quiet": True}


def own_fleet(folder, mbps=20, busy=12):
    fleet = folder / "f.yaml"
    fleet.write_text(
        f"name: f\nclients: 4\ndevices: [{{profile: mine.yaml}}]\n"
        f"links: {{l: {{down_mbps: {mbps}, up_mbps: {mbps}}}}}\n"
    )
    text = (
        (resource_folder("device_profiles") / "jetson-tx2.yaml").read_text().replace("name: jetson-tx2", "name: mine")
    )
    (folder / "mine.yaml").write_text(text + f"# {busy}\n")
    return str(fleet)


def stopped(path):
    """Make a finished run look like one that was killed after its last checkpoint."""
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, "status": "running"}))


@pytest.mark.parametrize(("change", "named"), [({"mbps": 2}, "fleet file"), ({"busy": 14}, "device profile")])
@pytest.mark.parametrize("finished", [True, False])
def test_a_fleet_edited_before_resume_is_refused(tmp_path, change, named, finished):
    out = tmp_path / "r"
    fleet = own_fleet(tmp_path)
    run = fedsim.run("quickstart", out=out, **{**TIMING, "fleet.name": fleet, "fleet.clients": 4})
    kept = run.manifest["fleet_files"]
    assert kept["f.yaml"] == (tmp_path / "f.yaml").read_text()
    assert "mine" in kept["mine.yaml"]
    if not finished:
        stopped(out)
    own_fleet(tmp_path, **change)
    with pytest.raises(RunError, match=f"another {named}"):
        fedsim.run("quickstart", out=out, resume=True, **{**TIMING, "fleet.name": fleet, "fleet.clients": 4})
    if not finished:
        return
    own_fleet(tmp_path)
    fedsim.run("quickstart", out=out, resume=True, **{**TIMING, "fleet.name": fleet, "fleet.clients": 4})


def test_a_sweep_does_not_grow_and_runs_do_not_compare_over_an_edited_fleet(tmp_path, capsys):
    fleet = own_fleet(tmp_path)
    overrides = {key: value for key, value in TIMING.items() if key != "quiet"} | {
        "fleet.name": fleet,
        "fleet.clients": 4,
    }
    fedsim.sweep("quickstart", seeds="0", out=tmp_path / "s", overrides=overrides, workers=1, quiet=True)
    own_fleet(tmp_path, mbps=2)
    with pytest.raises(RunError, match="of this sweep was started with another fleet file"):
        fedsim.sweep("quickstart", seeds="0-1", out=tmp_path / "s", overrides=overrides, workers=1, quiet=True)
    fedsim.run("quickstart", out=tmp_path / "other", seed=1, **{**TIMING, "fleet.name": fleet, "fleet.clients": 4})
    assert main(["compare", str(tmp_path / "s"), str(tmp_path / "other")]) == 2
    assert "different content of fleet file 'f.yaml'" in capsys.readouterr().err


def test_what_is_in_an_identity(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(asset_folder("tiny"), model)
    data = tmp_path / "a.tsv"
    data.write_text("text\tlabel\n")
    config = Config.model_validate({"model": {"name": str(model)}, "data": {"path": str(data)}})
    before = identity(config)
    assert before["code of fedsim"] == code_digest()
    for file in (model / "config.json", model / "tokenizer.json", data):
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        now = identity(config)
        (changed,) = [what for what in now if now[what] != before[what]]
        assert file.name in changed
        with pytest.raises(RunError, match="run 'x' was started with another"):
            check_same("run 'x'", before, now)
        file.write_bytes(content)
    check_same("run 'x'", before, identity(config))
    check_same("run 'x'", None, before)
    check_same("run 'x'", before, {**before, "imported module 'mine.py'": "1"})
    with pytest.raises(RunError, match="imported module"):
        check_same("run 'x'", {"imported module 'm.py'": "1"}, {"imported module 'm.py'": "2"})


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "pytorch_model.bin"])
def test_a_file_that_git_lfs_did_not_fetch(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(ModelError, match=f"{name} is a git-lfs pointer"):
        check_model_folder("m", tmp_path)


def test_an_adapter_in_the_place_of_a_model_or_beside_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="no weights of a model"):
        check_model_folder("m", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="beside the weights"):
        check_model_folder("m", tmp_path)


@pytest.mark.parametrize("how", ["manifest", "table"])
def test_one_damaged_run_does_not_stop_a_comparison_of_others(tmp_path, capsys, how):
    for seed in range(3):
        fedsim.run("quickstart", out=tmp_path / f"r{seed}", seed=seed, **{**TIMING, "fleet.clients": 4})
    (tmp_path / "r1" / (MANIFEST if how == "manifest" else "rounds.parquet")).write_bytes(b"{")
    assert main(["compare", *(str(tmp_path / f"r{seed}") for seed in range(3))]) == 0
    assert "r1' is left out" in capsys.readouterr().out
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    assert "r1&#x27; is left out" in (tmp_path / "page.html").read_text()
    assert main(["compare", str(tmp_path / "r1")]) == 2
    damaged = []
    assert len(whole_runs(find_runs([tmp_path], damaged), damaged)) == 2
    assert len(damaged) == 1
