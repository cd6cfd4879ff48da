"""From folders of finished runs to one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedsim.file_set import check_replaceable
from fedsim.files import atomic_write_text, writing
from fedsim.places import user_path
from fedsim.records.folder import MANIFEST
from fedsim.records.reader import Run, find_runs
from fedsim.report import sections
from fedsim.report.html import MARK, bullets, details, escaped, page, paragraph
from fedsim.report.material import Material, gather
from fedsim.study.choose import choose_runs, whole_runs
from fedsim.study.compare import Comparison, compare
from fedsim.study.reward_terms import missing_losses
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
    given = [user_path(folder) for folder in ([folders] if isinstance(folders, (str, Path)) else folders)]
    path = user_path(out) if out is not None else given[0] / REPORT if len(given) == 1 else Path(REPORT)
    check_replaceable(path, (".html", ".htm"), MARK.encode(), "report")
    damaged: list[str] = []
    runs = whole_runs(choose_runs(find_runs(given, damaged), where), damaged)
    tops = _tops(given)
    title = ", ".join([str(given[0]) if len(given) == 1 else _counted(runs, tops), *where])
    text = report_html(
        runs, title, target_accuracy, baseline, [*sweep_notes(given), *damaged], tops if len(tops) > 1 else ()
    )
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
    folders: Sequence[Path] = (),
) -> str:
    """The page as text. Equal runs give equal pages: nothing in it depends on when or where it was made.

    Args:
        folders: where the runs lie, for the reader, where the title does not name it.
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
    lead = _folders_text(folders) + _lead(comparison, material)
    return page(f"fedsim: {title}", lead, [one for one in made if one is not None])


def _tops(given: Sequence[Path]) -> list[Path]:
    """The folders that were given, and of each run that was given the folder that it lies in; each once."""
    below = [path for path in given if not path.is_file()]  # "SWEEP/*" names a sweep's ledger, too
    return list(dict.fromkeys(path.parent if (path / MANIFEST).is_file() else path for path in below))


def _counted(runs: Sequence[Run], tops: Sequence[Path]) -> str:
    """A title of one line, however many folders there are: their names follow below it."""
    where = str(tops[0]) if len(tops) == 1 else f"{len(tops)} folders"
    return f"{len(runs)} run{'' if len(runs) == 1 else 's'} in {where}"


def _folders_text(folders: Sequence[Path]) -> str:
    if not folders:
        return ""
    if len(folders) > _FOLDERS_NAMED:
        return details(f"{len(folders)} folders", bullets(list(map(str, folders))))
    return paragraph(f"Folders: {', '.join(map(str, folders))}", "note")


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
