"""The parts of a page. Each is a function of the same material, and None where the runs have nothing for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedsim.errors import FedsimError
from fedsim.experiment.belonging import Group
from fedsim.experiment.comparison_text import reached_text
from fedsim.experiment.diagnosis import SIGNATURES, Finding, diagnose
from fedsim.experiment.regret import Regret, regret
from fedsim.experiment.structures import kept_structures
from fedsim.plots import figures, frames, summary_frames
from fedsim.plots import regret as regret_plots
from fedsim.plots import summary as summary_plots
from fedsim.report import tables
from fedsim.report.drawings import Sketchbook
from fedsim.report.html import Section, bullets, csv_link, details, paragraph
from fedsim.report.material import Material

PANELS = 12
"""Most methods drawn side by side, panel by panel; all are in the tables."""
JUDGED_ROWS = 16_000
"""Client rounds whose regret is computed, all methods together: about 2 s. The first method is judged in any case."""
TOP_CLIENTS = 5
_FACTS = (
    "versions",
    "git",
    "model",
    "data",
    "fleet",
    "clock",
    "engine",
    "precision",
    "torch_device",
    "host",
    "sources",
)


def summary(material: Material) -> Section:
    """The table of methods, and their speedups."""
    comparison, book = material.comparison, Sketchbook()
    target = comparison.target_accuracy
    body = ""
    if target is None:
        body += paragraph("No accuracy was evaluated: speedups are of total simulated time.", "note")
    else:
        said = "the highest that every run reaches" if comparison.target_is_default else "as asked"
        body += paragraph(f"Target accuracy {target:.4g}: {said}; its time is that of the first crossing.", "note")
        body += "".join(paragraph(line, "warning") for line in reached_text(comparison))
    body += tables.summary_table(comparison) + paragraph(
        "Speedups and points are paired by seed; 95% bootstrap intervals over seeds. Fewer than three pairs have no "
        "interval. Unpruned methods stand first: they are references, not rivals of the pruned.",
        "note",
    )
    body += f"<p>Numbers: {csv_link('comparison', comparison.rows)}</p>"
    if len(material.groups) > 1:
        of = "total simulated time" if target is None else f"time to accuracy {target:.4g}"
        frame = summary_frames.speedups(comparison)
        summary_plots.draw_speedups(frame, of, comparison.baseline, comparison.clock, material.mark, book)
        body += book.html("speedup", "Speedups by method", "Speedup over the baseline.")
    return Section("summary", "Summary", body)


def diagnosis(material: Material) -> Section:
    """Failure signatures in every run, each with its evidence."""
    found: list[tuple[str, Finding]] = []
    not_judged: dict[tuple[str, str], list[str]] = {}
    judged = 0
    for group in material.groups:
        for place, ((seed, draw), run) in enumerate(group.runs.items()):
            # The adapter is read of the first run of each method only; other detectors look at all runs.
            verdict = diagnose(run, material.states[group.label] if place == 0 else {})
            name = f"{group.label}, seed {seed}" + ("" if draw < 0 else f", draw {draw}")
            found += [(name, finding) for finding in verdict.findings]
            judged += len(verdict.findings) + len(verdict.silent)
            for signature, reason in verdict.not_judged.items():
                not_judged.setdefault((signature, reason), []).append(name)
    body = paragraph(
        f"Looked for in the records of every run: {', '.join(SIGNATURES.values())}. Thresholds are ours.", "note"
    )
    if not found and judged:
        body += f'<p class="calm">Nothing found in {judged} judgements.</p>'
    elif not found:
        body += paragraph("None of the runs holds records to judge by.")
    for name, finding in found:
        head = f"{SIGNATURES[finding.signature].capitalize()} ({name}): {finding.summary}."
        body += f'<div class="finding">{paragraph(head)}{bullets(finding.evidence)}</div>'
    if not_judged:
        lines = [
            f"{SIGNATURES[signature]}: {reason} ({_named(names)})" for (signature, reason), names in not_judged.items()
        ]
        body += details(f"Not judged ({len(lines)})", bullets(lines))
    return Section("diagnosis", "Diagnosis", body)


def accuracy(material: Material) -> Section | None:
    """Accuracy over simulated time."""
    runs = [run for group in material.groups for run in group.runs.values()]
    if not frames.has_accuracy(runs):
        return None
    book, shown = Sketchbook(), material.groups[:PANELS]
    figures.draw_accuracy(shown, material.comparison.clock, material.mark, book)
    body = book.html("accuracy_over_time", "Accuracy over simulated time", "Test accuracy, panel mean.")
    if all(run.is_language_model for run in runs):
        figures.draw_perplexity(shown, material.comparison.clock, material.mark, book)
        body += book.html(
            "perplexity_over_time", "Perplexity over simulated time", "Of the responses; lower is better."
        )
    return Section("accuracy", "Accuracy over time", body + _cut_note(material.groups))


def idle(material: Material) -> Section | None:
    """Idle share by device class."""
    if not material.detailed:
        return None
    book = Sketchbook()
    figures.draw_idle(material.detailed[:PANELS], material.classes, material.comparison.clock, material.mark, book)
    body = book.html(
        "idle_by_class", "Idle share by device class", "Share of a round in which devices of a class wait."
    )
    return Section("idle", "Idle by class", body + _cut_note(material.detailed))


def rounds(material: Material) -> Section | None:
    """Which devices made rounds slow, and two rounds of each method in detail."""
    if not material.detailed:
        return None
    book, shown = Sketchbook(), material.detailed[:PANELS]
    text, mark = material.comparison.clock, material.mark
    paths = summary_frames.critical_paths(material.detailed)
    counts = summary_frames.critical_counts(paths)
    summary_plots.draw_critical(counts, material.classes, text, mark, book)
    typical, slowest = frames.typical_and_slowest(shown)
    figures.draw_timeline(frames.timeline_of(shown, typical), text, mark, book, "typical_round")
    figures.draw_timeline(frames.timeline_of(shown, slowest), text, mark, book, "slowest_round")
    body = book.html("critical_path", "Critical path", "Which class finished last in a round, and what held it up.")
    body += tables.critical_table(paths, TOP_CLIENTS)
    body += "<h3>A typical round</h3>"
    body += book.html("typical_round", "A typical round, client by client", "The round nearest the median duration.")
    body += "<h3>The slowest round</h3>"
    body += book.html("slowest_round", "The slowest round, client by client", "The longest round of each run.")
    return Section("rounds", "Rounds and critical path", body + _cut_note(material.detailed))


def policy(material: Material) -> Section | None:
    """What was chosen for each class over time, and the regret of the controllers."""
    if not material.detailed:
        return None
    book, shown = Sketchbook(), material.detailed[:PANELS]
    text, mark = material.comparison.clock, material.mark
    figures.draw_choices(shown, material.classes, text, mark, book)
    body = book.html("choices_by_class", "Arms over time by class", "Pruning ratio asked and LoRA rank, by class.")
    body += _cut_note(material.detailed)
    controlled = [group for group in material.detailed if _policy(group) != "uniform"]
    body += "<h3>Regret</h3>"
    if not controlled:
        return Section("policy", "Arms and regret", body + paragraph("No run has a controller that chooses arms."))
    rows = np.cumsum([len(next(iter(group.runs.values())).client_rounds) for group in controlled])
    judged = controlled[: max(1, int((rows <= JUDGED_ROWS).sum()))]
    left_out = controlled[len(judged) :]
    known, failed = _regrets(judged)
    if known:
        judged = [group for group in judged if next(iter(group.runs.values())).path in known]
        first = [Group(group.label, group.method, dict([next(iter(group.runs.items()))])) for group in judged]
        regret_plots.draw_cumulative_regret(first, known, text, mark, book)
        body += book.html("cumulative_regret", "Regret over rounds", "First seed of each method with a controller.")
        body += tables.regret_table(regret_plots.summary(first, known))
    if left_out:
        names = ", ".join(group.label for group in left_out)
        body += paragraph(
            f"Left out, as each takes a second or more here: {names}; write_regret_figures of fedsim.plots draws them.",
            "note",
        )
    return Section("policy", "Arms and regret", body + bullets(failed))


def resources(material: Material) -> Section:
    """Traffic, energy and memory."""
    book = Sketchbook()
    frame = summary_frames.resources(material.groups[:PANELS])
    summary_plots.draw_resources(frame, material.classes, material.comparison.clock, material.mark, book)
    body = book.html("resources", "Traffic, energy and memory by method", "By device class.")
    return Section("resources", "Traffic, energy and memory", body + _cut_note(material.groups))


def structure(material: Material) -> Section | None:
    """What each layer keeps."""
    kept = {}
    for group in material.groups[:PANELS]:
        table = kept_structures(next(iter(group.runs.values())), material.states[group.label])
        if len(table):
            kept[group.label] = table
    if not kept:
        return None
    book, frame = Sketchbook(), summary_frames.structures(kept)
    summary_plots.draw_structures(frame, material.comparison.clock, material.mark, book)
    body = book.html("structure", "Kept heads and channels by layer", "Of the learner's model, after the final cut.")
    body += details("Numbers by layer", tables.structure_table(frame))
    return Section("structure", "Pruned structure", body + _cut_note(material.groups))


def provenance(material: Material) -> Section:
    """Runs, versions, data, and the resolved configuration."""
    runs = [run for group in material.groups for run in group.runs.values()]
    differing, shared = tables.config_tables(material.groups)
    body = tables.runs_table(material.groups)
    body += tables.facts_table([run.manifest for run in runs], _FACTS)
    body += "<h3>Resolved configuration</h3>" + differing + details("Keys that all runs share", shared)
    return Section("provenance", "Provenance and configuration", body)


def _policy(group: Group) -> str:
    run = next(iter(group.runs.values()))
    return str((run.config.get("control") or {}).get("policy"))


def _regrets(groups: Sequence[Group]) -> tuple[dict[Path, Regret], list[str]]:
    """Regret of each group's first run, and why there is none of others."""
    known: dict[Path, Regret] = {}
    failed = []
    for group in groups:
        run = next(iter(group.runs.values()))
        try:
            known[run.path] = regret(run)
        except FedsimError as error:
            failed.append(f"{group.label}: {error}")
    return known, failed


def _cut_note(groups: Sequence[Group]) -> str:
    if len(groups) <= PANELS:
        return ""
    return paragraph(f"Figures show the first {PANELS} of {len(groups)} methods; the tables hold all.", "note")


def _named(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} runs"
