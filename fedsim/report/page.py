"""From a folder of finished runs to one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsim.errors import RunError
from fedsim.experiment.belonging import Group, finished_only, group_runs
from fedsim.experiment.compare import Comparison, compare
from fedsim.experiment.results import Run, find_runs
from fedsim.experiment.rundir import atomic_write_text, writing
from fedsim.experiment.structures import final_state
from fedsim.plots import frames
from fedsim.plots.figures import mark_of
from fedsim.report import sections
from fedsim.report.html import bullets, escaped, page, paragraph
from fedsim.specs import State
from fedsim.sweeps.notes import sweep_notes

REPORT = "report.html"
"""Name of the page where none is given."""


@dataclass(frozen=True, eq=False)
class Material:
    """What the sections are made from.

    Attributes:
        groups: runs of one method and configuration each, in the comparison's order.
        detailed: those of them that recorded their clients.
        classes: device classes, slowest first; empty where no run recorded its clients.
        states: the last checkpoint of each group's first run, by label.
        mark: watermark of the figures; None for measured numbers.
    """

    comparison: Comparison
    groups: Sequence[Group]
    detailed: Sequence[Group]
    classes: Sequence[str]
    states: dict[str, State]
    mark: str | None


def write_report(
    folder: str | Path,
    out: str | Path | None = None,
    target_accuracy: float | None = None,
    baseline: str | None = None,
) -> Path:
    """Write the page on all finished runs at or below `folder`.

    Args:
        out: the file; default: ``report.html`` in `folder`. One that is there is replaced, whole or not at all.
        target_accuracy, baseline: as of `compare`.
    Returns:
        The file written.
    Raises:
        RunError: no run, none finished, runs that do not belong together, or a file that cannot be written.
        ConfigError: a target or a baseline that is not allowed.
    """
    folder = Path(folder)
    path = folder / REPORT if out is None else Path(out)
    if path.is_dir():
        raise RunError(f"--out: '{path}' is a folder; give the name of a file, such as {path / REPORT}")
    text = report_html(find_runs([folder]), str(folder), target_accuracy, baseline, sweep_notes([folder]))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text)
    return path


def report_html(
    runs: Sequence[Run],
    title: str,
    target_accuracy: float | None = None,
    baseline: str | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The page as text. Equal runs give equal pages: nothing in it depends on when or where it was made.

    Raises:
        RunError, ConfigError: as of `compare`.
    """
    comparison = compare(runs, target_accuracy, baseline, notes)
    material = _material(runs, comparison)
    made = [
        sections.summary(material),
        sections.diagnosis(material),
        sections.accuracy(material),
        sections.idle(material),
        sections.rounds(material),
        sections.policy(material),
        sections.resources(material),
        sections.structure(material),
        sections.provenance(material),
    ]
    return page(f"fedsim: {title}", _lead(comparison, material), [one for one in made if one is not None])


def _material(runs: Sequence[Run], comparison: Comparison) -> Material:
    done, _ = finished_only(runs)
    order = {label: place for place, label in enumerate(comparison.rows["method"])}
    groups = sorted(group_runs(done)[0], key=lambda group: order[group.label])
    detailed = [
        group
        for group in frames.with_client_rounds(groups)
        if all(run.has("client_rounds") and len(run.client_rounds) for run in group.runs.values())
    ]
    classes = frames.class_order(frames.first_client_rounds(detailed)) if detailed else []
    states = {group.label: final_state(next(iter(group.runs.values()))) for group in groups}
    return Material(comparison, groups, detailed, classes, states, mark_of(done))


def _lead(comparison: Comparison, material: Material) -> str:
    runs = sum(len(group.runs) for group in material.groups)
    many = len(material.groups)
    lead = paragraph(
        f"{runs} finished run{'' if runs == 1 else 's'} of {many} method{'' if many == 1 else 's'} or configurations. "
        "Times are simulated ones, from the cost model, unless host time is named."
    )
    labels = [*(["surrogate: no accuracy here was measured"] if comparison.is_surrogate else []), *comparison.labels]
    tags = "".join(f"<li{_strong(label)}>{escaped(label)}</li>" for label in labels)
    lead += f'<ul class="labels" aria-label="How far to trust the numbers">{tags}</ul>'
    lead += paragraph(comparison.clock, "note")
    if comparison.warnings:
        lead += f'<div class="warning">{bullets(list(comparison.warnings))}</div>'
    return lead


def _strong(label: str) -> str:
    return ' class="strong"' if label.startswith(("surrogate", "timing only")) else ""
