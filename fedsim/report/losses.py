"""What a page says of updates that were lost: work that devices did and the global model never saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fedsim.errors import RunError
from fedsim.records.lost import LostUpdates, lost_updates
from fedsim.records.reader import Run
from fedsim.report.html import bullets, paragraph
from fedsim.study.belonging import Group


def lost_box(groups: Sequence[Group]) -> str:
    """A box with a line for each row of which updates were lost; nothing where none was."""
    lines = [line for group in groups if (line := _line(group)) is not None]
    if not lines:
        return ""
    head = paragraph("Updates lost: clients were sent to work, and the global model never saw what they learned.")
    return f'<div class="finding">{head}{bullets(lines)}</div>'


def _line(group: Group) -> str | None:
    """One row, all its runs together; None where nothing was lost."""
    counts = [_counted(run) for run in group.runs.values()]
    sent, lost = sum(one.sent for one in counts), sum(one.lost for one in counts)
    if not lost:
        return None
    by_outcome: Counter[str] = Counter()
    for one in counts:
        by_outcome.update(one.by_outcome)
    # Runs without client records say how many, and not how.
    unknown = lost - sum(by_outcome.values())
    outcomes = [f"{name} {by_outcome[name]}" for name in sorted(by_outcome)]
    outcomes += [f"not recorded how {unknown}"] * bool(unknown)
    share = f"{lost / sent:.1%}" if lost >= sent / 1000 else "<0.1%"
    text = f"{group.label}: {lost} of {sent} updates ({share}; {', '.join(outcomes)})"
    if len(counts) > 1:
        text += f", in {sum(one.lost > 0 for one in counts)} of {len(counts)} runs"
    whole = sum(one.lost == one.sent > 0 for one in counts)
    if whole:
        text += ". Nothing was learned" + ("" if whole == len(counts) else f" in {whole} of them")
        text += ": not one update arrived"
    return f"{text}."


def _counted(run: Run) -> LostUpdates:
    """From the clients' records; where there are none, from those of the rounds, which do not say how."""
    try:
        counted = lost_updates(run)
    except RunError:
        counted = None  # another part of the page needs them more, and says so
    if counted is None:
        counted = LostUpdates(int(run.rounds["participants"].sum()), int(run.rounds["dropped"].sum()), {})
    return counted
