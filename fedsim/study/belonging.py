"""Whether runs may stand in one table: what must agree, what is worth a warning, and which are repeats of which.

Times are comparable only on the same fleet and the same clock, accuracies only on the same data: others are refused.
Other differences are told, and left to the reader. Unfinished runs are told and left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedsim.control.policies import policy_facts
from fedsim.errors import RunError
from fedsim.methods.catalogue import METHODS
from fedsim.records.reader import Run, is_sweep_folder
from fedsim.runner.config import dotted, value_text
from fedsim.settings import Config

RECONSTRUCTION = "reconstruction"

_WITHOUT_EFFECT = ("seed", "records.", "server.checkpoint_every", "train.threads", "train.torch_device")
"""Keys that never make two runs differ in kind."""

_SHARED_SECTIONS = ("model.", "data.", "fleet.", "server.", "train.", "evaluate.")
"""Sections that methods are expected to share; the others belong to a method."""

_CHOSEN_BY_AUTO = ("train.engine", "train.precision")
"""Keys of which ``auto`` comes to one of the other values; the manifest says to which, by the key's last name."""

_KEYS_IN_FULL = 3
"""So many differing keys are named in every label."""

Repeat = tuple[int, int]
"""Root seed, and number of the draw of the device profiles (-1: the profiles themselves): what pairs runs."""


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in their seed (or draw of the profiles) only."""

    label: str
    method: str
    runs: Mapping[Repeat, Run]


def clock_text(runs: Sequence[Run]) -> str:
    """One sentence on the workload that the simulated clock carries, the fleet, and how far to trust the numbers."""
    clock, fleet = runs[0].manifest.get("clock") or {}, runs[0].manifest.get("fleet") or {}
    return (
        f"Clock: {clock.get('model', '?')}, batch {clock.get('batch_size', '?')} x {clock.get('seq_len', '?')} tokens, "
        f"{clock.get('precision', '?')}; fleet {fleet.get('name', '?')}, {fleet.get('clients', '?')} clients; "
        f"{'; '.join(labels(runs))}."
    )


def labels(runs: Iterable[Run]) -> tuple[str, ...]:
    """How far the numbers may be trusted: `reconstruction` (fleet and clock always are), then the runs' own labels."""
    return tuple(
        dict.fromkeys([RECONSTRUCTION, *(str(one) for run in runs for one in run.manifest.get("labels") or ())])
    )


def repeat_of(run: Run) -> Repeat:
    """What a run shares with the runs of other methods that it is paired with."""
    draw = run.manifest.get("profile_draw")
    return run.seed, -1 if draw is None else int(draw)


def finished_only(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The finished runs, and a warning for each other one: what is left of it would change from day to day.

    Raises:
        RunError: no run, or none that is finished.
    """
    if not runs:
        raise RunError("nothing to compare: no run given")
    done = [run for run in runs if run.finished]
    open_ones = [f"'{run.path}'" for run in runs if not run.finished]
    if not done:
        folders = {Path(run.path).parent for run in runs}
        if all(is_sweep_folder(folder) for folder in folders):
            which = " and ".join(f"'{folder}'" for folder in sorted(folders))
            raise RunError(
                f"nothing to compare: sweep {which} has no finished cell (the same fedsim sweep command goes on)"
            )
        which = f"{open_ones[0]} is" if len(open_ones) == 1 else f"all {len(open_ones)} are"
        raise RunError(f"nothing to compare: {which} unfinished (go on with fedsim run --resume)")
    return done, [f"{path} is unfinished and is left out" for path in open_ones]


def check_together(runs: Sequence[Run]) -> list[str]:
    """Refuse runs that cannot be compared, and return warnings on the others.

    Runs of one seed must hold the same samples. Where the seed draws them (the built-in language, a held-out fifth, a
    choice of samples), runs of different seeds need only come from the same source.

    Raises:
        RunError: no run, runs of different data, fleets or clocks, or runs that trained beside surrogate or
            timing-only ones.
    """
    if not runs:
        raise RunError("nothing to compare: no run given")
    for run in runs[1:]:
        if run.is_surrogate != runs[0].is_surrogate:
            fitted, other = (run, runs[0]) if run.is_surrogate else (runs[0], run)
            raise RunError(
                f"run '{fitted.path}' is a surrogate run and '{other.path}' is not: fitted accuracies do not belong in "
                "one comparison with measured ones; compare them separately"
            )
        if run.is_timing_only != runs[0].is_timing_only:
            timed, trained = (run, runs[0]) if run.is_timing_only else (runs[0], run)
            raise RunError(
                f"run '{trained.path}' was trained and '{timed.path}' is timing only (train.engine: none): it has no "
                "accuracy to compare; compare them separately"
            )
    for what, of in (("data", _data), ("fleet", _fleet), ("clock (cost model)", _clock)):
        _refuse_different(runs, what, of)
    _refuse_different_splits(runs)
    _refuse_changed_fleets(runs)
    warnings = []
    for what in ("code of fedsim", "imported module"):
        if len({_part_of_identity(run, what) for run in runs} - {None}) > 1:
            warnings.append(f"the runs were made with different versions of the {what}")
    commits = sorted(
        {str((run.manifest.get("git") or {}).get("commit"))[:7] for run in runs if run.manifest.get("git")}
    )
    if len(commits) > 1:
        warnings.append(f"the runs were made by different commits of fedsim: {', '.join(commits)}")
    if len({(run.manifest.get("model") or {}).get("sha256") for run in runs}) > 1:
        warnings.append("the runs start from different model weights")
    if len({str((run.manifest.get("versions") or {}).get("fedsim")) for run in runs}) > 1:
        warnings.append("the runs were made by different versions of fedsim")
    warnings += _auto_differed(runs)
    return warnings


def _part_of_identity(run: Run, *beginnings: str) -> tuple[tuple[str, str], ...] | None:
    """The hashes in a run's identity of what begins with one of these words; None where it has none."""
    kept = run.manifest.get("identity")
    if not isinstance(kept, Mapping):
        return None
    return tuple(sorted((str(what), str(digest)) for what, digest in kept.items() if what.startswith(beginnings)))


def _refuse_changed_fleets(runs: Sequence[Run]) -> None:
    """Refuse runs whose fleet file or device profiles have one name and different content."""
    first: tuple[Run, dict[str, str]] | None = None
    for run in runs:
        parts = _part_of_identity(run, "fleet file", "device profile")
        if parts is None:
            continue
        if first is None:
            first = run, dict(parts)
            continue
        changed = sorted(what for what in {*first[1], *dict(parts)} if first[1].get(what) != dict(parts).get(what))
        if changed:
            raise RunError(
                f"runs '{first[0].path}' and '{run.path}' were timed with different content of "
                f"{', '.join(changed[:3])}: their times do not belong in one comparison"
            )


def _told_apart(rivals: Sequence[dict[str, str]]) -> list[str]:
    """What tells each configuration of a method from the others."""
    keys = sorted({key for settings in rivals for key in settings})
    # What the policy brings along (E-UCB's exploration) is the policy: naming that is enough.
    differing = [
        key
        for key in keys
        if len({own.get(key) for own in rivals}) > 1
        and len({own.get(key) for own in rivals if own.get(key) != _policys_own(own).get(key)}) > 1
    ]
    if len(differing) > _KEYS_IN_FULL:
        usual = {key: Counter(settings.get(key) for settings in rivals).most_common(1)[0][0] for key in differing}
        short = [
            _settings_text(own, [key for key in differing if own.get(key) not in (usual[key], mine.get(key))])
            for own, mine in zip(rivals, map(_policys_own, rivals), strict=True)
        ]
        if len(set(short)) == len(rivals):
            return short
    return [_settings_text(own, differing) for own in rivals]


def _policys_own(settings: Mapping[str, str]) -> dict[str, str]:
    """What the run's policy sets where nobody else does."""
    defaults = policy_facts(settings.get("control.policy", "")).defaults
    return {key: value_text(value) for key, value in defaults.items()}


def _settings_text(settings: Mapping[str, str], keys: Sequence[str]) -> str:
    return ", ".join(f"{key}={settings.get(key, 'not set')}" for key in keys)


def group_runs(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """Group repeats of one method and configuration, in the order of the runs, and return warnings.

    Where a method comes in several configurations, the label of each names the keys in which they differ; where these
    are more than `_KEYS_IN_FULL`, only those in which it differs from most of its like.
    """
    flat = _settings_of(runs)
    kinds: dict[tuple[str, tuple[tuple[str, str], ...]], list[int]] = {}
    for index, run in enumerate(runs):
        kinds.setdefault((run.method, tuple(sorted(flat[index].items()))), []).append(index)

    warnings, groups = [], []
    for (method, own), members in kinds.items():
        rivals = [dict(settings) for name, settings in kinds if name == method]
        suffix = _told_apart(rivals)[rivals.index(dict(own))]
        repeats: dict[Repeat, Run] = {}
        for index in members:
            kept = repeats.setdefault(repeat_of(runs[index]), runs[index])
            if kept is not runs[index]:
                warnings.append(f"'{runs[index].path}' repeats '{kept.path}' and is left out")
        groups.append(Group(f"{method} ({suffix})" if suffix else method, method, repeats))

    shared = sorted({key for settings in flat for key in settings if key.startswith(_SHARED_SECTIONS)})
    defaults = [_flat_defaults(run.method) for run in runs]
    differing = []
    for key in shared:
        # A method's own default (HETLoRA's rank self-pruning) is the method, not a difference between runs of it.
        values = [(settings.get(key), mine.get(key)) for settings, mine in zip(flat, defaults, strict=True)]
        if len({value for value, default in values if value != default or default is None}) > 1:
            differing.append(key)
    if differing:
        warnings.append(f"the runs differ in {', '.join(differing)}")
    if len({frozenset(group.runs) for group in groups}) > 1:
        warnings.append("not every method has the same seeds: a speedup uses the seeds that both have")
    return groups, warnings


def _flat_defaults(name: str) -> dict[str, str]:
    """What a method sets of its own, as `_flat` writes it; nothing for a user's method that is not registered here."""
    if name not in METHODS:
        return {}
    return {key: value_text(value) for key, value in METHODS[name].defaults.items()}


def _refuse_different(runs: Sequence[Run], what: str, of: Callable[[Run], dict[str, Any]]) -> None:
    """Refuse runs that are not of one kind, and say how they fall apart (a sweep over fleets, say)."""
    kinds: list[tuple[dict[str, Any], list[Run]]] = []
    for run in runs:
        own = of(run)
        for kind, members in kinds:
            if kind == own:
                members.append(run)
                break
        else:
            kinds.append((own, [run]))
    if len(kinds) == 1:
        return
    (first, ours), (second, others) = kinds[:2]
    parts = ", ".join(f"{len(members)} such as '{members[0].path}'" for _, members in kinds)
    raise RunError(
        f"runs '{ours[0].path}' and '{others[0].path}' do not belong in one comparison: their {what} differs "
        f"({_difference(first, second)}); compare them separately{_how(ours[0], others[0], what)}"
        + (f" (by {what}: {parts})" if len(runs) > 2 else "")
    )


def _how(one: Run, other: Run, what: str) -> str:
    """What to give on the command line for either kind; nothing where no setting tells them apart."""
    section = {"data": "data.", "fleet": "fleet.", "clock (cost model)": "cost."}[what]
    ours, theirs = (dotted(_with_defaults(run.config)) for run in (one, other))
    for key in ours:
        if key.startswith(section) and ours[key] != theirs.get(key):
            return f", with --where {key}={value_text(ours[key])} or --where {key}={value_text(theirs.get(key))}"
    return ""


def _refuse_different_splits(runs: Sequence[Run]) -> None:
    """Refuse runs of one seed that hold other samples."""
    first: dict[int, Run] = {}
    for run in runs:
        other = first.setdefault(run.seed, run)
        ours, theirs = ((one.manifest.get("data") or {}).get("sha256") for one in (other, run))
        if ours != theirs:
            raise RunError(
                f"runs '{other.path}' and '{run.path}' do not belong in one comparison: their data differs (sha256: "
                f"{ours} and {theirs}); compare them separately"
            )


def _data(run: Run) -> dict[str, Any]:
    """What runs of all seeds share. Equal content is equal data, wherever it lay."""
    data = run.manifest.get("data") or {}
    if data.get("sha256") and not _follows_seed(run):
        return {"sha256": data["sha256"]}
    return {key: data.get(key) for key in ("name", "label_names", "train", "test")}


def _follows_seed(run: Run) -> bool:
    """Whether the samples are drawn by the root seed: the built-in language, a held-out fifth, or a random choice."""
    settings, evaluate = run.config.get("data"), run.config.get("evaluate") or {}
    if run.is_surrogate or not isinstance(settings, Mapping):
        return False
    drawn = settings.get("test_path") is None or settings.get("max_samples") is not None
    return drawn or evaluate.get("max_samples") is not None


def _fleet(run: Run) -> dict[str, Any]:
    fleet = {key: value for key, value in (run.manifest.get("fleet") or {}).items() if key != "label"}
    return {**fleet, "mode_period": (run.config.get("fleet") or {}).get("mode_period")}


def _clock(run: Run) -> dict[str, Any]:
    clock = {key: value for key, value in (run.manifest.get("clock") or {}).items() if key != "label"}
    return {**clock, "backend": (run.config.get("cost") or {}).get("backend")}


def _difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    keys = sorted(key for key in {*first, *second} if first.get(key) != second.get(key))
    return ", ".join(f"{key}: {value_text(first.get(key))} and {value_text(second.get(key))}" for key in keys)


def _settings_of(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Each run's settings as `_flat` gives them; of what was asked in several words, what ran.

    Where one run asked ``train.engine: auto`` and another named an engine, the manifests say whether both trained with
    the same one. Where all asked for the same, they stay repeats, whatever `auto` came to on each host.
    """
    flat = [_flat(_with_defaults(run.config)) for run in runs]
    for key in _CHOSEN_BY_AUTO:
        if len({settings.get(key) for settings in flat}) > 1:
            for run, settings in zip(runs, flat, strict=True):
                ran = _ran(run, key)
                if ran is not None and key in settings:
                    settings[key] = ran
    for run, settings in zip(runs, flat, strict=True):
        clients = (run.manifest.get("fleet") or {}).get("clients")
        if clients is not None and "fleet.clients" in settings:
            settings["fleet.clients"] = str(clients)  # null is the fleet file's own number
    return flat


def _ran(run: Run, key: str) -> str | None:
    """What a run that trained came to; None where the manifest does not say."""
    value = run.manifest.get(key.removeprefix("train."))
    return None if value is None else str(value)


def _auto_differed(runs: Sequence[Run]) -> list[str]:
    """A warning for each setting of which all asked for the same and which came to something else on some hosts."""
    warnings = []
    for key in _CHOSEN_BY_AUTO:
        section, name = key.split(".")
        asked = {str((run.config.get(section) or {}).get(name)) for run in runs}
        ran = sorted({value for run in runs if (value := _ran(run, key)) is not None})
        if len(asked) == 1 and len(ran) > 1:
            warnings.append(f"{key}: {asked.pop()} came to {' in some runs and '.join(ran)} in others")
    return warnings


def _with_defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with keys that did not exist yet when it ran; as it is where it does not fit at all."""
    try:
        return Config.model_validate(config).model_dump(mode="json")
    except ValidationError:
        return config


def _flat(tree: Mapping[str, Any]) -> dict[str, str]:
    """Dotted keys and values as text, without those that have no effect on results."""
    return {key: value_text(value) for key, value in dotted(tree).items() if not key.startswith(_WITHOUT_EFFECT)}
