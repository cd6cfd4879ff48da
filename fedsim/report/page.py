"""From folders of finished runs to one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedsim.errors import RunError
from fedsim.experiment.choose import choose_runs
from fedsim.experiment.compare import Comparison, compare
from fedsim.experiment.results import Run, find_runs
from fedsim.experiment.reward_terms import missing_losses
from fedsim.experiment.rundir import atomic_write_text, writing
from fedsim.report import sections
from fedsim.report.html import bullets, escaped, page, paragraph
from fedsim.report.material import Material, gather
from fedsim.sweeps.notes import sweep_notes

REPORT = "report.html"
"""Name of the page where none is given."""
_FOLDERS_NAMED = 3


def write_report(
    folders: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    target_accuracy: float | None = None,
    baseline: str | None = None,
    where: Sequence[str] = (),
) -> Path:
    """Write the page on all finished runs at or below one folder, or several.

    Args:
        out: the file; default: ``report.html`` in the folder, or here for several. One that is there is replaced, whole
            or not at all.
        target_accuracy, baseline: as of `compare`.
        where: settings of the runs to take, as of `choose_runs`.
    Returns:
        The file written.
    Raises:
        RunError: no run, none finished, runs that do not belong together, or a file that cannot be written.
        ConfigError: a target or a baseline that is not allowed.
    """
    given = [Path(folders)] if isinstance(folders, (str, Path)) else [Path(folder) for folder in folders]
    path = Path(out) if out is not None else given[0] / REPORT if len(given) == 1 else Path(REPORT)
    if path.is_dir():
        raise RunError(f"--out: '{path}' is a folder; give the name of a file, such as {path / REPORT}")
    runs = choose_runs(find_runs(given), where)
    title = ", ".join([_named(given), *where])
    text = report_html(runs, title, target_accuracy, baseline, sweep_notes(given))
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
    material = gather(runs, comparison)
    made = [
        sections.summary(material),
        sections.diagnosis(material),
        sections.idle(material),
        sections.rounds(material),
        sections.policy(material),
        sections.resources(material),
        sections.structure(material),
        sections.provenance(material),
    ]
    return page(f"fedsim: {title}", _lead(comparison, material), [one for one in made if one is not None])


def _named(folders: Sequence[Path]) -> str:
    names = list(dict.fromkeys(map(str, folders)))
    more = f" and {len(names) - _FOLDERS_NAMED} more" if len(names) > _FOLDERS_NAMED else ""
    return ", ".join(names[:_FOLDERS_NAMED]) + more


def _lead(comparison: Comparison, material: Material) -> str:
    runs = len(material.runs)
    many = len(material.groups)
    lead = paragraph(
        f"{runs} finished run{'' if runs == 1 else 's'} of {many} method{'' if many == 1 else 's'} or configurations. "
        "Times are simulated ones, from the cost model, unless host time is named; fedsim devices tells which numbers "
        "of a device are sourced, extrapolated or assumed."
    )
    labels = [*(["surrogate: no accuracy here was measured"] if comparison.is_surrogate else []), *comparison.labels]
    if any(missing_losses(run) for run in material.runs):
        labels.append("timing only: the bandits' rewards held no losses")
    tags = "".join(f"<li{_strong(label)}>{escaped(label)}</li>" for label in labels)
    lead += f'<ul class="labels" aria-label="How far to trust the numbers">{tags}</ul>'
    lead += paragraph(comparison.clock, "note")
    if comparison.warnings:
        lead += f'<div class="warning">{bullets(list(comparison.warnings))}</div>'
    return lead


def _strong(label: str) -> str:
    return ' class="strong"' if label.startswith(("surrogate", "timing only")) else ""
