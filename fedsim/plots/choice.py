"""Which rows a figure shows where it has no room for all, and what it says of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedsim.control.policies import POLICIES, PolicyEntry, policy_facts
from fedsim.study.belonging import Group
from fedsim.study.regret import Regret

MOST = 12
"""Rows in one figure: as many as `fedsim.plots.style.styles` tells apart by colour."""
_NAMED = 3
_ONLY_SO_MANY = f"more than {MOST} cannot be told apart"


def policy_of(group: Group) -> str:
    """``control.policy`` of its runs."""
    return str((next(iter(group.runs.values())).config.get("control") or {}).get("policy"))


def policy_facts_of(group: Group) -> PolicyEntry:
    """What is known of that policy."""
    return policy_facts(policy_of(group))


def shown_first(groups: Sequence[Group], baseline: str, most: int = MOST) -> list[Group]:
    """The first `most` of the groups; where `baseline` (a label) is a later one, it takes the last place."""
    first = list(groups[:most])
    late = [group for group in groups[most:] if group.label == baseline]
    return [*first[: most - 1], *late] if late else first


def shown_by_regret(groups: Sequence[Group], known: Mapping[Path, Regret], most: int = MOST) -> list[Group]:
    """At most so many groups, in the order given: oracle and uniform, the most regret, and then those of least.

    Args:
        known: regret of at least one run of every group, by the run's path.
    """
    if len(groups) <= most:
        return list(groups)
    total_s = {
        group.label: float(np.mean([known[run.path].total_s for run in group.runs.values() if run.path in known]))
        for group in groups
    }
    by_regret = sorted(groups, key=lambda group: total_s[group.label])
    references = [group for group in by_regret if policy_facts_of(group).is_reference]
    # The least and the most come first: a sweep may hold more references than there is room for.
    ranked = [by_regret[0], by_regret[-1], *references, *by_regret]
    kept = list(dict.fromkeys(group.label for group in ranked))[:most]
    return [group for group in groups if group.label in kept]


def first_rule(groups: Sequence[Group], baseline: str, most: int = MOST) -> str:
    """What `shown_first` takes, in words."""
    if baseline in {group.label for group in groups[most:]}:
        return f"the first {most - 1} of the summary and the baseline, since {_ONLY_SO_MANY}"
    return f"the first {most} of the summary, since {_ONLY_SO_MANY}"


def regret_rule() -> str:
    """What `shown_by_regret` takes, in words."""
    references = " and ".join(entry.name for entry in POLICIES.values() if entry.is_reference)
    return f"the ones of least and most regret, {references}, and then those of least, since {_ONLY_SO_MANY}"


def left_out_text(groups: Sequence[Group], shown: Sequence[Group], rule: str) -> str:
    """What a figure says of the rows that it leaves out, by `rule`; ends in a space, empty for none."""
    there = {group.label for group in shown}
    absent = [group.label for group in groups if group.label not in there]
    if not absent:
        return ""
    more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
    names = f"{'; '.join(absent[:_NAMED])}{more}"
    return f"Shows {len(shown)} of {len(groups)} rows: {rule}. Left out here: {names}. "


def bare_text(groups: Sequence[Group]) -> str:
    """What a method's name without settings means where others of its rows name theirs; empty where there is none."""
    count = Counter(group.method for group in groups)
    bare = [group for group in groups if group.label == group.method and count[group.method] > 1]
    said = [f"{one.label} alone: with the settings that most of its rows share ({_policy_text(one)})." for one in bare]
    return " ".join(said)


def _policy_text(group: Group) -> str:
    return f"control.policy={policy_of(group)}"
