"""A run killed with SIGKILL goes on from its checkpoint and ends with the files of an uninterrupted one."""

import signal
import subprocess
import sys
from pathlib import Path

import made_up
import pytest
from made_up import config_of, play, write_run

from fedsim.records import writer as records
from fedsim.records.checkpoint import has_checkpoint, load_checkpoint
from fedsim.records.folder import RunDirectory

ROUNDS = 40
CHILD = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import made_up
save = made_up.save_checkpoint
def told(*arguments):
    print(arguments[1], flush=True)  # before the checkpoint: the kill may meet any step of it, or of the next part
    return save(*arguments)
made_up.save_checkpoint = told
made_up.write_run(Path(sys.argv[1]), rounds=40, clients=16)
"""


@pytest.mark.parametrize("kill_at", [1, 17])
def test_kill_and_resume(tmp_path, kill_at):
    path = tmp_path / "killed"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), str(Path(made_up.__file__).parent)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    while child.stdout.readline().strip() != str(kill_at):
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()

    checkpoint = path / "checkpoint"
    with RunDirectory.open_for_resume(path) as directory:
        next_round, _, meta = load_checkpoint(checkpoint) if has_checkpoint(checkpoint) else (0, {}, {"now_s": 0.0})
        assert kill_at - 1 <= next_round < ROUNDS
        play(path, config_of("fedspine", 0, ROUNDS), next_round, meta["now_s"], 16)
        directory.write_manifest({**directory.manifest, "status": "finished"})
    whole = write_run(tmp_path / "whole", rounds=ROUNDS, clients=16)
    for table in records.TABLES:
        assert (path / f"{table}.parquet").read_bytes() == (whole / f"{table}.parquet").read_bytes(), table
    assert not (path / "parts").exists()
