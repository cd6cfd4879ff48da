"""What the commands of the documentation write into a checkout is ignored: else the runs after it are marked dirty."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fedsim

ROOT = Path(fedsim.__file__).parent.parent


@pytest.fixture(scope="module")
def documents():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    return "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "experiments/README.md"))


def is_ignored(path: str) -> bool:
    return subprocess.run(["git", "-C", str(ROOT), "check-ignore", "-q", path], check=False).returncode == 0


def test_outputs_of_documented_commands_are_ignored(documents):
    outs = set(re.findall(r"^fedsim .*--out (\S+)", documents, flags=re.MULTILINE))
    assert {"figures", "report.html", "models/client3", "surrogate.json"} <= outs
    for out in outs:
        assert is_ignored(out if "." in out else f"{out}/file"), out


def test_what_belongs_to_the_project_is_not(documents):
    for path in (
        "docs/figures/timeline.png",
        "experiments/scale/figures/a.png",
        "docs/page.html",
        "fedsim/models/a.py",
    ):
        assert not is_ignored(path), path
