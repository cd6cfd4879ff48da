"""A sweep over a user's own methods: its cells run in processes that know what they import, and nothing else."""

import subprocess
import sys

import pytest

import fedsim
from fedsim.errors import RunError
from fedsim.runner.names import CATALOGUES

MINE = """
import fedsim

defaults = {"control.policy": "uniform"}
fedsim.register_method("mine", fedsim.Method("mine", "one line", (), prunes=False, defaults=defaults))
"""
SWEEP = """
settings = {"train.engine": "none", "fleet.clients": 4, "server.rounds": 2}
done = fedsim.sweep("quickstart", grid={"method": ["mine"]}, seeds=0, out="out", overrides=settings, quiet=True, **MORE)
print(done.summary())
"""


@pytest.fixture(autouse=True)
def forget():
    before = {key: dict(catalogue) for key, catalogue in CATALOGUES.items()}
    yield
    for key, catalogue in CATALOGUES.items():
        catalogue.clear()
        catalogue.update(before[key])


def run_script(folder, text):
    (folder / "script.py").write_text(text)
    command = [sys.executable, "script.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_a_method_that_only_the_script_knows_is_refused_before_anything_is_written(tmp_path):
    done = run_script(tmp_path, MINE + "MORE = {}" + SWEEP)
    last = done.stderr.splitlines()[-1]
    assert "method 'mine' is registered in the process that started the sweep" in last
    assert "imports=['FILE.py']" in last
    assert not (tmp_path / "out").exists()


def test_the_script_may_name_itself(tmp_path):
    guarded = SWEEP.replace("\n", "\n    ").rstrip()
    done = run_script(tmp_path, f"{MINE}\nMORE = {{'imports': [__file__]}}\nif __name__ == '__main__':{guarded}\n")
    assert done.returncode == 0, done.stderr
    assert "1 cells, 1 finished" in done.stdout


def test_a_script_that_sweeps_while_it_is_imported_is_refused(tmp_path):
    done = run_script(tmp_path, f"{MINE}\nMORE = {{'imports': [__file__]}}{SWEEP}")
    last = done.stderr.splitlines()[-1]
    assert "starts a sweep while it is imported: put that call under if __name__ == '__main__'" in last
    assert not (tmp_path / "out").exists()


def test_a_file_imported_already_is_not_imported_again(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    done = run_script(tmp_path, f"import fedsim\nimport mine\nMORE = {{'imports': ['mine.py']}}{SWEEP}")
    assert done.returncode == 0, done.stderr
    assert "1 cells, 1 finished" in done.stdout


def test_every_kind_of_name_is_looked_up(tmp_path):
    fedsim.register_selection("first", lambda candidates, count, context: candidates[:count])
    settings = {"method": "fedlora", "train.engine": "none", "fleet.clients": 4, "server.clients_per_round": 2}
    with pytest.raises(RunError, match=r"^server\.selection 'first' is registered in the process"):
        fedsim.sweep(
            "quickstart",
            grid={"server.selection": ["uniform", "first"]},
            out=tmp_path / "out",
            overrides=settings,
            quiet=True,
        )
