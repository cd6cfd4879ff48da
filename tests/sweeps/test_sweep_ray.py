"""Sweeps on Ray: a cluster of two nodes gives the records of one computer; what does not answer is said in seconds."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

import fedsim
from fedsim.cli import main
from fedsim.errors import RunError
from fedsim.methods.catalogue import METHODS as METHOD_REGISTRY
from fedsim.sweeps import ray_cluster
from fedsim.sweeps.cell_jobs import Job, Setup
from fedsim.sweeps.cells import plan_sweep
from fedsim.sweeps.ledger import open_ledger, read_ledger

PLUGIN = str(Path(__file__).with_name("sweep_plugin.py"))
SMALL = {
    "model": {"lora_rank": 4, "lora_rank_max": 8},
    "fleet": {"clients": 6},
    "server": {"rounds": 5, "clients_per_round": 4, "checkpoint_every": 1},
    "train": {"engine": "none", "local_steps": 4},
    "prune": {"warmup_rounds": 1, "end_round": 4, "max_step": 0.5},
}
GRID = {"method": ["fedspine", "made_to_be_killed", "fedlora", "made_to_crash"]}


@pytest.fixture(autouse=True)
def registry_as_it_was():
    """The plugin's methods are gone afterwards: other tests look at every method there is."""
    before = dict(METHOD_REGISTRY)
    yield
    METHOD_REGISTRY.clear()
    METHOD_REGISTRY.update(before)
    sys.modules.pop("fedsim_user_sweep_plugin", None)


def ray_or_skip():
    """Only for tests that start one: the others need none."""
    return pytest.importorskip("ray", reason="the optional package ray is not installed")


def assert_same_runs(some, others):
    assert [run.path.name for run in some] == [run.path.name for run in others]
    for one, other in zip(some, others, strict=True):
        assert one.manifest["trace_hash"] == other.manifest["trace_hash"]
        mine, theirs = one.rounds.drop(columns="host_s"), other.rounds.drop(columns="host_s")
        pd.testing.assert_frame_equal(mine, theirs, check_exact=True)
        pd.testing.assert_frame_equal(one.client_rounds, other.client_rounds, check_exact=True)
        pd.testing.assert_frame_equal(one.events, other.events, check_exact=True)


@pytest.fixture
def two_nodes(monkeypatch):
    """Address of a cluster of two nodes with one core each, on this computer."""
    ray_or_skip()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # a test must not write a token into the home directory
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


def test_two_nodes_give_the_records_of_one_computer(two_nodes, tmp_path, capsys):
    config = tmp_path / "small.yaml"
    config.write_text(json.dumps(SMALL))
    command = ["sweep", str(config), "--grid", f"method={','.join(GRID['method'])}", "--seeds", "0-1"]
    command += ["--import", PLUGIN]
    assert main([*command, "--out", str(tmp_path / "local"), "--workers", "2"]) == 1
    assert main([*command, "--out", str(tmp_path / "ray"), "--ray", two_nodes]) == 1
    assert_same_runs(fedsim.load_sweep(tmp_path / "ray"), fedsim.load_sweep(tmp_path / "local"))
    here, there = (read_ledger(tmp_path / name)["cells"] for name in ("local", "ray"))
    assert [cell["state"] for cell in there] == [cell["state"] for cell in here]
    assert [cell["error"] for cell in there] == [cell["error"] for cell in here]
    traces = [sorted(path.parent.name for path in (tmp_path / name).glob("*/error.txt")) for name in ("local", "ray")]
    assert traces[0] == traces[1] == sorted(cell["directory"] for cell in here if cell["method"] == "made_to_crash")
    assert sum(cell["state"] == "failed" for cell in there) == 4
    assert len({cell["worker"] for cell in there}) == 2  # both nodes took part
    # The same folder goes on without Ray: nothing is left to do but what failed.
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "ray")]) == 1
    assert "8 cells (4 finished, 4 failed)" in capsys.readouterr().out


def test_a_node_that_does_not_see_the_folder_sends_the_run_back(tmp_path, monkeypatch):
    plan = plan_sweep(SMALL, grid={"method": ["fedlora"]})
    ledger = open_ledger(tmp_path / "out", plan)
    cell = plan.cells[0]
    path = ledger.path / cell.directory
    job = Job(0, cell.config.model_dump(mode="json"), str(path))
    setup = Setup(trains=False, imports=(), sys_path=tuple(sys.path))
    monkeypatch.chdir(tmp_path)
    far = ray_cluster.CellActor(setup, str(tmp_path / "another"), ledger.identity, str(tmp_path))
    near = ray_cluster.CellActor(setup, str(ledger.path), ledger.identity, str(tmp_path))
    try:
        done, packed = far.run(job, None)
        assert done.error is None
        assert packed is not None
        assert not path.exists()
        ray_cluster.unpack(packed, path)
        returned = fedsim.load(path)
        assert returned.finished
        assert len(returned.rounds) == 5
        # An unfinished run travels there with its checkpoint, and goes on: a finished one comes back as it was.
        again, packed_again = far.run(job, ray_cluster.pack(path))
        assert again.error is None
        ray_cluster.unpack(packed_again, tmp_path / "again")
        assert (tmp_path / "again" / "manifest.json").read_bytes() == (path / "manifest.json").read_bytes()
        seen, nothing = near.run(job, None)  # sees the folder: the finished run is kept, nothing travels
        assert seen.error is None
        assert nothing is None
    finally:
        far._drop_host()
        near._drop_host()
        ledger.close()


def start_on(address, tmp_path):
    return fedsim.sweep(SMALL, grid={"method": ["fedlora", "fedspine"]}, out=tmp_path / "out", ray=address, quiet=True)


def test_an_address_that_does_not_answer_is_said_in_seconds(tmp_path):
    ray_or_skip()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{free.getsockname()[1]}"  # bound, not listening: refuses
        began_s = time.monotonic()
        with pytest.raises(RunError, match=f"nothing answers at '{closed}'"):
            start_on(closed, tmp_path)
    assert time.monotonic() - began_s < 10
    assert not (tmp_path / "out").exists()


def test_what_answers_but_is_no_ray_is_given_up(tmp_path, monkeypatch):
    ray_or_skip()
    monkeypatch.setattr(ray_cluster, "_PROBE_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(RunError, match="no Ray cluster that can be joined"):
            start_on(address, tmp_path)


@pytest.mark.parametrize("address", ["somewhere", "host:", "host:port", "ray://"])
def test_what_is_no_address_is_refused(tmp_path, address):
    ray_or_skip()
    with pytest.raises(RunError, match=f"address '{address}' is not allowed"):
        start_on(address, tmp_path)


def test_without_ray_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match=r"not installed: pip install 'fedspine-sim\[ray\]'"):
        start_on("local", tmp_path)


LISTENING = """
import os
from contextlib import suppress
from pathlib import Path
from fedsim.sweeps.ray_cluster import LOCAL, _connect

ray = _connect(LOCAL)
session = ray._private.worker._global_node.get_session_dir_path().encode()
inodes = set()
for process in Path("/proc").glob("[0-9]*"):
    with suppress(OSError):
        if session in (process / "cmdline").read_bytes():
            inodes |= {os.readlink(entry) for entry in (process / "fd").iterdir()}
for name in ("tcp", "tcp6"):
    for row in map(str.split, Path(f"/proc/net/{name}").read_text().splitlines()[1:]):
        if row[3] == "0A" and f"socket:[{row[9]}]" in inodes:
            print(row[1].partition(":")[0])
ray.shutdown()
"""
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
"""127.0.0.1, the same as an IPv6 address, and ::1, as the kernel writes them."""


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no list of sockets on this system")
def test_a_cluster_of_ours_listens_on_loopback_alone():
    done = subprocess.run([sys.executable, "-c", LISTENING], capture_output=True, text=True, check=True, timeout=120)
    opened = done.stdout.split()
    assert len(opened) >= 3
    assert set(opened) <= LOOPBACK
