"""The rule of dependency, held by reading every import statement of the package."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
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
    "file_set": 3,
    "model_folder": 3,
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
    """Absolute names of all modules that a file imports anywhere, under ``if TYPE_CHECKING`` too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = []
    for node in ast.walk(tree):
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
        # It gives names to type checkers alone: what it loads, it loads when it is asked (`test_import_and_help`).
        tree = ast.parse(path.read_text(encoding="utf-8"))
        loaded = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert set(loaded) <= {"__future__", "importlib", "typing"}
        return
    for name in imports_of(path):
        top, *rest = name.split(".")
        if top == "fedsim" and rest:
            assert rest[0] == part or LEVELS[rest[0]] < LEVELS[part], f"{path.name} imports {name}"
        assert part in OWNERS.get(top, {part}), f"{path.name} imports {top}, which belongs to {OWNERS.get(top)}"


def test_no_module_imports_itself_by_way_of_others():
    """No circle, not even one that only a type checker would see."""
    known = {name_of(path): path for path in MODULES if path.name != "__init__.py"}
    arrows = {}
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {
            f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        arrows[name] = (set(imports_of(path)) | named) & known.keys()
    done, path_now = set(), []

    def visit(name):
        assert name not in path_now, " -> ".join([*path_now[path_now.index(name) :], name])
        if name in done:
            return
        path_now.append(name)
        for other in arrows[name]:
            visit(other)
        path_now.pop()
        done.add(name)

    for name in sorted(known):
        visit(name)
    assert len(done) > 200


def name_of(path: Path) -> str:
    return ".".join(("fedsim", *path.relative_to(PACKAGE).with_suffix("").parts))


def test_every_module_and_every_class_is_small():
    too_long = {}
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > 400:
            too_long[name_of(path)] = lines
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and (lines := node.end_lineno - node.lineno + 1) > 200:
                too_long[f"{name_of(path)}.{node.name}"] = lines
    assert not too_long


def test_files_have_names_of_their_own():
    names = [path.name for path in MODULES if path.name not in ("__init__.py", "__main__.py")]
    assert not {name for name in names if names.count(name) > 1}


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
    """Under 0.2 s of processor time, the best of five: what other processes do is no matter."""
    best_s = min(_processor_seconds([sys.executable, "-m", "fedsim.cli", "--help"]) for _ in range(5))
    assert best_s < 0.2


def _processor_seconds(command: list[str]) -> float:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


def test_timing_only_parts_load_no_torch():
    """A run that trains nothing must not pay for torch."""
    code = "import sys, fedsim.runner.run; print('torch' in sys.modules)"
    assert run_python(code).strip() == "False"
