"""The study folders: every sweep file plans at both scales, can be built at the tiny one, and is listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.resources import resource_folder
from fedsim.sweeps.cells import plan_sweep
from fedsim.sweeps.checks import check_cells

FOLDER = resource_folder("experiments")
SWEEPS = sorted(
    path
    for path in FOLDER.rglob("*.yaml")
    if path.name != "tiny.yaml" and any(key in path.read_text() for key in ("\ngrid:", "\ncases:"))
)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_study_plans_at_both_scales_and_can_be_built_at_the_tiny_one(path: Path):
    assert plan_sweep(path).cells
    tiny = plan_sweep(path, tiny=True)
    assert len(tiny.cells) > 1
    assert {cell.config.seed for cell in tiny.cells} == {0}
    # A tiny run is small whatever its study is.
    assert all((cell.config.fleet.clients or 80) <= 80 and cell.config.server.rounds <= 30 for cell in tiny.cells)
    check_cells(tiny, here=True)


def test_every_study_is_listed_and_has_a_line_on_what_it_asks():
    folders = {path.parent for path in FOLDER.rglob("*.yaml")} - {FOLDER}
    listed = (FOLDER / "README.md").read_text()
    for folder in folders:
        assert f"]({folder.name})" in listed, folder.name
        assert (folder / "README.md").read_text().startswith("# "), folder.name
