"""The parts of a page. Each is a function of the same material, and None where the runs have nothing for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedsim.errors import FedsimError
from fedsim.plots import controllers as regret_plots
from fedsim.plots import figures, frames, summary_frames
from fedsim.plots import summary as summary_plots
from fedsim.plots.choice import bare_text, first_rule, left_out_text, policy_facts_of
from fedsim.records.reader import Run
from fedsim.report import page_tables as tables
from fedsim.report.drawings import Sketchbook
from fedsim.report.html import Section, bullets, csv_link, details, paragraph, side_by_side
from fedsim.report.losses import lost_box
from fedsim.report.material import Material, first_run
from fedsim.study.belonging import Group
from fedsim.study.comparison import reached_text, target_text
from fedsim.study.diagnosis import SIGNATURES, Finding, diagnose
from fedsim.study.regret import Regret, regret
from fedsim.study.reward_terms import missing_losses
from fedsim.study.structures import kept_structures

JUDGED_ROWS = 96_000
"""Client rounds whose regret is computed, all runs together: about 4 s. The first method is judged in any case."""
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
    """The table of methods, their speedups, and accuracy over simulated time."""
    comparison = material.comparison
    body = "".join(
        paragraph(line, "warning" if line.startswith("PROVISIONAL") else "note") for line in target_text(comparison)
    )
    body += "".join(paragraph(line, "warning") for line in reached_text(comparison))
    body += tables.summary_table(comparison) + paragraph(
        "Speedups and points are paired by seed; 95% bootstrap intervals over seeds. Fewer than three pairs have no "
        "interval, and of fewer than six it is little more than their range. Unpruned methods stand first: they are "
        f"references, not rivals of the pruned. {bare_text(material.groups)}",
        "note",
    )
    body += f"<p>Numbers: {csv_link('comparison', comparison.rows)}</p>"
    return Section("summary", "Summary", body + _summary_figures(material))


def _summary_figures(material: Material) -> str:
    comparison, shown = material.comparison, material.drawn
    text = _under(material, material.groups)
    accuracy = frames.has_accuracy(material.runs)
    perplexity = accuracy and all(run.is_language_model for run in material.runs)
    speedup = len(material.groups) > 1
    # Two of a kind stand side by side; a third, or one alone, fills the page.
    first, others = Sketchbook(wide=not accuracy or perplexity), Sketchbook(wide=not speedup and not perplexity)
    if speedup:
        frame, title = summary_frames.speedups(comparison), comparison.speedup_title()
        summary_plots.draw_speedups(frame, title, comparison.baseline, comparison.clock, material.mark, first)
    if accuracy:
        figures.draw_accuracy(shown, text, material.mark, others, material.looks)
    if perplexity:
        figures.draw_perplexity(shown, text, material.mark, others, material.looks)
    learned = "Fitted by the surrogate, not measured" if material.mark else "Measured on the test set"
    one = first.html("speedup", "Speedup by method", "Ratio of simulated times.")
    two = others.html("accuracy_over_time", "Accuracy over simulated time", f"{learned}; times are simulated.")
    three = others.html("perplexity_over_time", "Perplexity over simulated time", f"{learned}; lower is better.")
    return one + side_by_side(two, three) if perplexity else side_by_side(one, two)


def diagnosis(material: Material) -> Section:
    """Updates that were lost, and failure signatures in every run, each with its evidence."""
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
        f"Looked for in the records of every run: lost updates, {', '.join(SIGNATURES.values())}. Thresholds are ours.",
        "note",
    )
    lost = lost_box(material.groups)
    body += lost
    if not found and judged:
        body += f'<p class="calm">Nothing {"else " if lost else ""}found in {judged} judgements.</p>'
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


def idle(material: Material) -> Section | None:
    """Idle share by device class, and which class and which clients made rounds slow."""
    if not material.detailed:
        return None
    book, shown, mark = Sketchbook(), material.drawn_of(material.detailed), material.mark
    figures.draw_idle(shown, material.classes, _under(material, material.detailed), mark, book, material.looks)
    paths = summary_frames.critical_paths(material.detailed)
    counts = summary_frames.critical_counts(paths)
    summary_plots.draw_critical(counts, material.classes, material.comparison.clock, mark, book)
    body = side_by_side(
        book.html(
            "idle_by_class", "Idle share by device class", "Simulated: the share of a round in which a class waits."
        ),
        book.html(
            "critical_path", "Critical path", "Simulated: which class finished last in a round, and what held it up."
        ),
    )
    body += tables.critical_table(paths, TOP_CLIENTS)
    return Section("idle", "Idle time and critical path", body)


def rounds(material: Material) -> Section | None:
    """Two rounds of each method, client by client."""
    if not material.detailed:
        return None
    book, shown = Sketchbook(wide=True), material.drawn_of(material.detailed)
    text, mark = _under(material, material.detailed), material.mark
    typical, slowest = frames.typical_and_slowest(shown)
    figures.draw_timeline(frames.timeline_of(shown, typical), text, mark, book, "typical_round")
    figures.draw_timeline(frames.timeline_of(shown, slowest), text, mark, book, "slowest_round")
    body = book.html("typical_round", "A typical round", "Simulated: the round nearest the median duration of the run.")
    body += book.html("slowest_round", "The slowest round", "Simulated: the longest round of the run.")
    return Section("rounds", "Rounds, client by client", body)


def policy(material: Material) -> Section | None:
    """What was chosen for each class over time, what taught the bandit, and the regret of the controllers."""
    if not material.detailed:
        return None
    book = Sketchbook(wide=True)
    shown, text = material.drawn_of(material.detailed), _under(material, material.detailed)
    figures.draw_choices(shown, material.classes, text, material.mark, book)
    body = book.html("choices_by_class", "Arms over time by class", "Recorded: pruning ratio asked and LoRA rank.")
    lacking = [(group.label, missing_losses(first_run(group))) for group in material.groups]
    lines = [f"{label}: {lacks}" for label, lacks in lacking if lacks is not None]
    if lines:
        body += (
            '<div class="warning"><p>Timing only: the rewards that these bandits learned from held no losses, since '
            f"nothing was trained. They judged arms by time; with training they may choose others.</p>{bullets(lines)}"
            "</div>"
        )
    return Section("policy", "Arms, reward and regret", body + _regret(material))


def _regret(material: Material) -> str:
    controlled = [group for group in material.detailed if policy_facts_of(group).chooses]
    if not controlled:
        return "<h3>Regret</h3>" + paragraph("No run has a controller that chooses arms.")
    judged, left_out = _judged(controlled)
    known, failed = _regrets(judged)
    body = ""
    if known:
        book = Sketchbook(wide=True)
        own = [group for group in controlled if any(run.path in known for run in group.runs.values())]
        shown, text = material.drawn_of(own), _under(material, own)
        regret_plots.draw_cumulative_regret(shown, known, text, material.mark, book, material.looks)
        said = "Reconstructed: the recorded arms, played again beside the oracle's."
        body += book.html("cumulative_regret", "Regret over rounds", said)
        frame = regret_plots.summary(own, known)
        body += tables.regret_table(regret_plots.means(frame), {group.label: len(group.runs) for group in own})
        body += f"<p>Regret of every run: {csv_link('regret', frame)}</p>"
    if left_out:
        body += paragraph(
            f"Left out, as all would take long here: {', '.join(left_out)}; write_regret_figures of fedsim.plots draws "
            "them.",
            "note",
        )
    return body + bullets(failed)


def _judged(groups: Sequence[Group]) -> tuple[list[tuple[str, Run]], list[str]]:
    """Runs whose regret is computed, by label, and what is left out: seed by seed, so that methods stay paired.

    Of the first seed as many methods as `JUDGED_ROWS` allows, at least one; a further seed of all methods or of none.
    """
    judged: list[tuple[str, Run]] = []
    left_out: list[str] = []
    rows = 0
    for place in range(max(len(group.runs) for group in groups)):
        wave = [(group.label, list(group.runs.values())[place]) for group in groups if len(group.runs) > place]
        if place == 0:
            for label, run in wave:
                rows += len(run.client_rounds)
                if rows <= JUDGED_ROWS or not judged:
                    judged.append((label, run))
                else:
                    left_out.append(label)
            continue
        rows += sum(len(run.client_rounds) for _, run in wave)
        if left_out or rows > JUDGED_ROWS:
            break
        judged += wave
    return judged, left_out


def resources(material: Material) -> Section:
    """Traffic, energy and memory."""
    book = Sketchbook(wide=True)
    frame, text = summary_frames.resources(material.drawn), _under(material, material.groups)
    summary_plots.draw_resources(frame, material.classes, text, material.mark, book)
    body = book.html("resources", "By method and device class", "Simulated or counted by the cost model.")
    return Section("resources", "Traffic, energy and memory", body)


def structure(material: Material) -> Section | None:
    """What each layer keeps."""
    kept = {}
    for group in material.groups:
        table = kept_structures(first_run(group), material.states[group.label])
        if len(table):
            kept[group.label] = table
    if not kept:
        return None
    book, frame = Sketchbook(wide=True), summary_frames.structures(kept)
    known = [group for group in material.groups if group.label in kept]
    shown = frame[frame["method"].isin([group.label for group in material.drawn_of(known)])]
    summary_plots.draw_structures(shown, _under(material, known), material.mark, book, material.looks)
    body = book.html(
        "structure", "Kept heads and channels by layer", "Counted in the learner's model, after the final cut."
    )
    body += details("Numbers by layer", tables.structure_table(frame))
    return Section("structure", "Pruned structure", body)


def provenance(material: Material) -> Section:
    """Runs, versions, data, and the resolved configuration."""
    runs = material.runs
    differing, shared = tables.config_tables(material.groups)
    body = tables.runs_table(material.groups)
    body += tables.facts_table([run.manifest for run in runs], _FACTS)
    body += "<h3>Resolved configuration</h3>" + differing + details("Keys that all runs share", shared)
    return Section("provenance", "Provenance and configuration", body)


def _regrets(judged: Sequence[tuple[str, Run]]) -> tuple[dict[Path, Regret], list[str]]:
    """Regret of each run, and why there is none of others."""
    known: dict[Path, Regret] = {}
    failed: dict[str, None] = {}
    for label, run in judged:
        try:
            known[run.path] = regret(run)
        except FedsimError as error:
            failed[f"{label}, seed {run.seed}: {error}"] = None
    return known, list(failed)


def _under(material: Material, groups: Sequence[Group]) -> str:
    """What stands under a figure of some of the groups: the rows that it leaves out, and the clock."""
    rule = f"figures here draw {first_rule(material.groups, material.comparison.baseline)}"
    return left_out_text(groups, material.drawn_of(groups), rule) + material.comparison.clock


def _named(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} runs"
