"""``fedsim check``: is a finished run what it says, from its records alone?

Files against their digests, and what holds for every run whatever its server: the seconds of a flight add up from its
dispatch to the end of its merge, staleness is merge less version, sums over flights are those of the round, the trace
gives its hash again. What older records do not hold is said and not checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fedsim.contracts.common import OUTCOME_LABELS
from fedsim.errors import RunError
from fedsim.records.folder import PARTS
from fedsim.records.integrity import fault_of
from fedsim.records.reader import Run, load
from fedsim.sim.trace import START_HASH, Event

_SECONDS = ["wait_s", "download_s", "compute_s", "upload_s", "idle_s"]
_AMOUNTS = ["bytes_down", "bytes_up", "energy_j"]
_TERMS = ["reward", "reward_loss", "reward_progress", "reward_importance", "reward_time"]
_CLOSE = 1e-9
"""Relative tolerance of sums: their order is not recorded."""


@dataclass(frozen=True)
class Verdict:
    """One thing looked at.

    Attributes:
        what: in a few words.
        faults: what is wrong, one sentence each; none where it holds.
        left_out: why it could not be looked at, if so.
    """

    what: str
    faults: tuple[str, ...] = ()
    left_out: str | None = None


@dataclass(frozen=True)
class RunCheck:
    """All verdicts on a run."""

    path: Path
    verdicts: tuple[Verdict, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not any(verdict.faults for verdict in self.verdicts)

    def as_text(self) -> str:
        """A line per thing looked at, its faults below it, and a line that says it all."""
        lines = []
        for verdict in self.verdicts:
            state = f"left out: {verdict.left_out}" if verdict.left_out else "WRONG" if verdict.faults else "ok"
            lines += [f"{verdict.what}: {state}", *(f"  {fault}" for fault in verdict.faults)]
        wrong = sum(bool(verdict.faults) for verdict in self.verdicts)
        total = f"{wrong} of {len(self.verdicts)} checks failed" if wrong else "nothing wrong"
        return "\n".join([*lines, f"{total}: {self.path}"])


def check_run(path: str | Path) -> RunCheck:
    """Look at a finished run.

    Raises:
        RunError: no run is there, it is unfinished, or its manifest cannot be read.
    """
    run = load(path)
    if not run.finished:
        raise RunError(f"run '{run.path}' is unfinished: go on with --resume, which checks what it finds")
    verdicts = [_files(run)]
    for what, look in _LOOKS:
        try:
            verdicts.append(Verdict(what, tuple(look(run))))
        except _NotHeld as reason:
            verdicts.append(Verdict(what, left_out=str(reason)))
        except RunError as error:
            verdicts.append(Verdict(what, (str(error),)))
    return RunCheck(run.path, tuple(verdicts))


class _NotHeld(Exception):  # noqa: N818 - no error: it carries the reason
    """The records do not hold what is needed."""


def _files(run: Run) -> Verdict:
    recorded = run.stated.files
    if not recorded:
        return Verdict("files", left_out=f"the run has no digests, {run.stated.origin}")
    faults = {name: fault_of(run.path / name, digest) for name, digest in recorded.items()}
    said = [f"'{name}': {fault}" for name, fault in faults.items() if fault]
    if (run.path / PARTS).exists():
        said.append(f"'{PARTS}' is still there: a run that was resumed to its end removes it")
    return Verdict(f"files ({len(recorded)} digests)", tuple(said))


def _manifest(run: Run) -> Iterator[str]:
    """What the manifest says of the end, against the last round."""
    rounds, stated = run.rounds, run.stated
    if stated.rounds is not None and stated.rounds != len(rounds):
        yield f"the manifest says {stated.rounds} rounds, rounds.parquet has {len(rounds)}"
    if stated.simulated_s is not None and len(rounds) and stated.simulated_s != rounds["end_s"].iloc[-1]:
        yield f"the manifest says {stated.simulated_s} simulated s, the last round ends at {rounds['end_s'].iloc[-1]}"


def _rounds(run: Run) -> Iterator[str]:
    """Rounds follow one another."""
    rounds = run.rounds
    start, end = rounds["start_s"].to_numpy(), rounds["end_s"].to_numpy()
    number = np.arange(len(rounds))
    yield from _where(rounds["round"].to_numpy() == number, number, "does not stand in its place")
    yield from _where(end >= start, number, "ends before it starts")
    yield from _where(np.append(True, start[1:] >= start[:-1]), number, "starts before the one before it")
    yield from _where(np.append(True, end[1:] >= end[:-1]), number, "ends before the one before it")
    near = np.isclose(rounds["duration_s"].to_numpy(), end - start, rtol=_CLOSE, atol=_CLOSE)
    yield from _where(near, number, "has a duration that is not end - start")


def _flights(run: Run) -> Iterator[str]:
    """Each flight: its seconds, order, amounts and outcome."""
    rows, end = _rows(run), run.rounds["end_s"].to_numpy()
    number = rows["round"].to_numpy()
    who = (rows["client"].astype(str) + " in round " + rows["round"].astype(str)).to_numpy()
    seconds = rows[_SECONDS].to_numpy()
    yield from _where((seconds >= -_CLOSE).all(axis=1), who, "has negative or missing seconds", "client")
    amounts = rows[_AMOUNTS].to_numpy()
    yield from _where(
        (np.isfinite(amounts) & (amounts >= 0)).all(axis=1), who, "has negative or missing bytes or energy", "client"
    )
    ok = (rows["outcome"] == "ok").to_numpy()
    yield from _where(rows["outcome"].isin(OUTCOME_LABELS), who, "has an unknown outcome", "client")
    terms = rows[_TERMS].astype(float).to_numpy()
    yield from _where(
        (np.isnan(terms) | ((terms >= 0) & (terms <= 1))).all(axis=1),
        who,
        "has a reward or a term outside [0, 1]",
        "client",
    )
    yield from _where(~np.isnan(terms[:, 0]) == ok, who, "has a reward without an update, or none with one", "client")
    ratio = rows[["prune_ratio", "prune_ratio_target"]].to_numpy()
    yield from _where(~((ratio < 0) | (ratio >= 1)).any(axis=1), who, "has a ratio outside [0, 1)", "client")
    yield from _where((rows["lora_rank"] >= 1).to_numpy(), who, "has a rank below 1", "client")
    start = rows["dispatch_s"].astype(float).to_numpy()
    if np.isnan(start).all():
        start = run.rounds["start_s"].to_numpy()[number]  # of a version that knew synchronous rounds alone
    over_s = start + seconds.sum(axis=1) - end[number]
    near = over_s <= _CLOSE * (1 + end[number])
    if (run.config.get("server") or {}).get("mode", "sync") == "sync":
        near &= over_s >= -_CLOSE * (1 + end[number])  # other servers let a client go before the merge
    yield from _where(near, who, "has seconds that do not lead from its dispatch to the end of its merge", "client")


def _versions(run: Run) -> Iterator[str]:
    """Which flight, of which version, merged how late."""
    rows, end = _rows(run), run.rounds["end_s"].to_numpy()
    if rows[["flight", "version", "staleness"]].isna().all(axis=None):
        raise _NotHeld(f"the records have no flights, {run.stated.origin}")
    who = (rows["client"].astype(str) + " in round " + rows["round"].astype(str)).to_numpy()
    version, stale = rows["version"].to_numpy(), rows["staleness"].to_numpy()
    yield from _where(stale == rows["round"].to_numpy() - version, who, "has a staleness that is not merge - version")
    yield from _where(stale >= 0, who, "was merged before its version was made", "client")
    made_s = np.append(0.0, end)[np.clip(version, 0, len(end)).astype(np.int64)]
    yield from _where(
        rows["dispatch_s"].to_numpy() >= made_s - _CLOSE * (1 + made_s),
        who,
        "left before its version was made",
        "client",
    )
    by_client = rows.groupby("client")["flight"]
    flights = by_client.agg(["min", "nunique", "count", "max"])
    whole = (flights["min"] == 0) & (flights["nunique"] == flights["count"]) & (flights["max"] == flights["count"] - 1)
    yield from _where(whole.to_numpy(), flights.index.to_numpy(), "has flights twice or missing", "client")


def _sums(run: Run) -> Iterator[str]:
    """Sums and means over the flights of a round are those of the round."""
    rows, rounds = _rows(run), run.rounds.set_index("round")
    number, groups = rounds.index.to_numpy(), rows.groupby("round")
    yield from _where(_over(groups.size(), rounds) == rounds["participants"], number, "has other participants")
    lost = _over((rows["outcome"] != "ok").groupby(rows["round"]).sum(), rounds)
    yield from _where(lost == rounds["dropped"], number, "has other lost updates")
    for name in _AMOUNTS:
        yield from _same(_over(groups[name].sum(), rounds), rounds[name], f"has another {name} than its flights")
    for mean, name in (("prune_ratio_mean", "prune_ratio"), ("lora_rank_mean", "lora_rank")):
        yield from _same(groups[name].mean().reindex(number), rounds[mean], f"has another {mean} than its flights")
    idle = _over(groups["idle_s"].sum(), rounds) / _over(
        rows[_SECONDS].sum(axis=1).groupby(rows["round"]).sum(), rounds
    )
    yield from _same(idle, rounds["idle_fraction"], "has another idle_fraction than its flights")


def _trace(run: Run) -> Iterator[str]:
    """The events give the trace's hash again."""
    if run.stated.trace_hash is None:
        raise _NotHeld("the manifest has no trace_hash")
    if not run.has("events"):
        raise _NotHeld("the run has no events (records.events: false)")
    events = run.events
    code = events["event"].map({event.name.lower(): int(event) for event in Event}).astype(float)
    if code.isna().any():
        yield f"an event has an unknown name: {events['event'][code.isna()].iloc[0]!r:.80}"
        return
    columns = (
        events["time_s"].to_numpy(np.float64),
        events["round"].to_numpy(np.int64),
        events["client"].to_numpy(np.int64),
        code.to_numpy(np.int64),
        events["value"].to_numpy(np.float64),
    )
    edges = np.flatnonzero(np.diff(columns[1], prepend=-1))
    found = START_HASH
    for first, after in zip(edges, np.append(edges[1:], len(events)), strict=True):
        digest = hashlib.sha256(bytes.fromhex(found))
        for column in columns:
            digest.update(np.ascontiguousarray(column[first:after]).data)
        found = digest.hexdigest()
    if found != run.stated.trace_hash:
        yield f"the events hash to {found[:12]}, the manifest says {run.stated.trace_hash[:12]}"


def _rows(run: Run) -> pd.DataFrame:
    if not run.has("client_rounds"):
        raise _NotHeld("the run has no client_rounds (records.client_rounds: false)")
    return run.client_rounds


def _over(values: pd.Series, rounds: pd.DataFrame) -> pd.Series:
    """By round; 0 where a round has no flights."""
    return values.reindex(rounds.index, fill_value=0)


def _same(found: pd.Series, stated: pd.Series, fault: str) -> Iterator[str]:
    near = np.isclose(found.to_numpy(float), stated.to_numpy(float), rtol=_CLOSE, atol=_CLOSE, equal_nan=True)
    yield from _where(near, stated.index.to_numpy(), fault)


def _where(good: object, names: np.ndarray, fault: str, kind: str = "round") -> Iterator[str]:
    """One sentence on the first that is not good, with how many there are."""
    bad = np.flatnonzero(~np.asarray(good, dtype=bool))
    if len(bad):
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        yield f"{kind} {names[bad[0]]} {fault}{more}"


_LOOKS: tuple[tuple[str, Callable[[Run], Iterator[str]]], ...] = (
    ("manifest and rounds agree", _manifest),
    ("rounds in order", _rounds),
    ("flights: seconds, amounts, outcomes", _flights),
    ("flights: versions and staleness", _versions),
    ("sums over flights are those of the round", _sums),
    ("trace and its hash", _trace),
)
