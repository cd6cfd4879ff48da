"""The README is true where that can be checked: tables made from the code, commands that parse, files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fedsim
from fedsim.cli import _parser
from fedsim.methods.catalogue import METHODS
from fedsim.records.columns import glossary_markdown
from fedsim.runner.key_table import settings_markdown

ROOT = Path(fedsim.__file__).parent.parent
README = ROOT / "README.md"


@pytest.fixture(scope="module")
def text():
    if not README.is_file():
        pytest.skip("installed without its source: there is no README beside the package")
    return README.read_text(encoding="utf-8")


def test_tables_are_those_of_the_code(text):
    assert settings_markdown() in text
    assert glossary_markdown() in text


def test_every_method_is_named(text):
    assert all(f"`{name}`" in text for name in METHODS)


def test_commands_parse(text):
    names = "run|sweep|compare|report|devices|estimate|validate|calibrate|retime|fit-surrogate|export|bench"
    commands = re.findall(rf"^fedsim ((?:{names})[^\n#]*)", text, flags=re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        _parser().parse_args(command.split())


def test_pictures_and_folders_exist(text):
    for path in re.findall(r"\]\(([^)h][^)]*)\)", text):
        assert (ROOT / path).is_file(), path
