"""The rule of dependency, held by reading every import statement of the package."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fedsim

PACKAGE = Path(fedsim.__file__).parent
# A module may import from its own level only within its own part, and from any lower level.
LEVELS = {
    "errors": 0,
    "rng": 0,
    "resources": 0,
    "structure": 0,
    "settings": 0,
    "text": 0,
    "contracts": 1,
    "places": 1,
    "yaml_text": 1,
    "files": 2,
    "locks": 3,
    "parser": 2,
    "registry": 1,
    "state": 2,
    "families": 2,
    "cost": 3,
    "control": 3,
    "data": 3,
    "fleet": 4,
    "learn": 5,
    "sim": 5,
    "methods": 6,
    "federation": 7,
    "records": 7,
    "runner": 8,
    "study": 9,
    "plots": 10,
    "sweeps": 10,
    "bench": 10,
    "report": 11,
    "cli": 12,
    "__main__": 13,
}
OWNERS = {
    "simpy": {"sim"},
    "torch": {"learn"},
    "transformers": {"learn"},
    "peft": {"learn"},
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name not in ("device_profiles", "experiments"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[str]:
    """Absolute names of all modules that a file imports anywhere, but for those under ``if TYPE_CHECKING``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            names.append(node.module or "")
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards_and_heavy_libraries_stay_in_their_part(path):
    part = part_of(path)
    if part == "__init__":
        assert set(imports_of(path)) <= {"__future__", "importlib", "typing"}
        return
    for name in imports_of(path):
        top, *rest = name.split(".")
        if top == "fedsim" and rest:
            assert rest[0] == part or LEVELS[rest[0]] < LEVELS[part], f"{path.name} imports {name}"
        assert part in OWNERS.get(top, {part}), f"{path.name} imports {top}, which belongs to {OWNERS.get(top)}"


def test_every_module_is_small():
    too_long = {
        str(path.relative_to(PACKAGE)): lines
        for path in MODULES
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 450
    }
    assert not too_long


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_and_help_load_nothing_heavy():
    code = (
        "import sys, fedsim, contextlib, io\n"
        "from fedsim.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    main(['--help'])\n"
        "print(sorted({'torch', 'transformers', 'peft', 'numpy', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules)))"
    )
    assert run_python(code).strip() == "[]"


def test_help_is_quick():
    """Under 0.4 s; the best of five, as other processes may be at work."""
    best_s = min(_timed([sys.executable, "-m", "fedsim.cli", "--help"]) for _ in range(5))
    assert best_s < 0.4


def _timed(command: list[str]) -> float:
    began_s = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - began_s


def test_timing_only_parts_load_no_torch():
    """A run that trains nothing must not pay for torch."""
    code = "import sys, fedsim.runner.run; print('torch' in sys.modules)"
    assert run_python(code).strip() == "False"
