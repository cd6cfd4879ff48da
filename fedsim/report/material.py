"""What a page is made from: the comparison, its groups, and what is left of their models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsim.contracts.common import State
from fedsim.plots import frames
from fedsim.plots.choice import shown_first
from fedsim.plots.figures import mark_of
from fedsim.plots.style import Look, styles
from fedsim.records.reader import Run
from fedsim.study.belonging import Group, finished_only, group_runs
from fedsim.study.compare import Comparison
from fedsim.study.structures import final_state


@dataclass(frozen=True, eq=False)
class Material:
    """What the sections are made from.

    Attributes:
        groups: runs of one method and configuration each, in the comparison's order.
        detailed: those of them that recorded their clients.
        classes: device classes, slowest first; empty where no run recorded its clients.
        looks: how each row is drawn, by label, the same in all figures; those drawn differ in colour.
        states: the last checkpoint of each group's first run, by label.
        mark: watermark of the figures; None for measured numbers.
    """

    comparison: Comparison
    groups: Sequence[Group]
    detailed: Sequence[Group]
    classes: Sequence[str]
    looks: dict[str, Look]
    states: dict[str, State]
    mark: str | None

    @property
    def runs(self) -> list[Run]:
        """All finished runs, method by method."""
        return [run for group in self.groups for run in group.runs.values()]

    @property
    def drawn(self) -> list[Group]:
        """Those of `groups` that figures show: all, or as many as can be told apart, the baseline among them."""
        return shown_first(self.groups, self.comparison.baseline)

    def drawn_of(self, groups: Sequence[Group]) -> list[Group]:
        """Those of some groups that figures show: the same rows in every figure, and others where these have none."""
        labels = {group.label for group in self.drawn}
        both = [group for group in groups if group.label in labels]
        return both or shown_first(groups, self.comparison.baseline)


def gather(runs: Sequence[Run], comparison: Comparison) -> Material:
    """The material on the runs of a comparison."""
    done, _ = finished_only(runs)
    order = {label: place for place, label in enumerate(comparison.rows["method"])}
    groups = sorted(group_runs(done)[0], key=lambda group: order[group.label])
    detailed = [
        group
        for group in frames.with_client_rounds(groups)
        if all(run.has("client_rounds") and len(run.client_rounds) for run in group.runs.values())
    ]
    classes = frames.class_order(frames.first_client_rounds(detailed)) if detailed else []
    states = {group.label: final_state(first_run(group)) for group in groups}
    first = [group.label for group in shown_first(groups, comparison.baseline)]
    looks = styles([*first, *(group.label for group in groups)])
    return Material(comparison, groups, detailed, classes, looks, states, mark_of(done))


def first_run(group: Group) -> Run:
    """The run of a group's first seed."""
    return next(iter(group.runs.values()))
