"""A finished run on another clock: other devices, modes or links, or draws of the devices from their bands.

What was learned stays as it is recorded; when it happened is computed anew from each job's work. That is true only
where neither the order of merges nor who took part hangs on the clock, and where no policy looked at it: `why_not` says
what stands in the way. Jitter, power modes and links follow the run's own seed, so that the run's own fleet gives back
its recorded times to the bit, which is checked first.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pyarrow as pa
import yaml

from fedsim.contracts.common import FloatArray, IntArray, Outcome
from fedsim.contracts.control import Ask, Work
from fedsim.control.client_selection import SELECTIONS
from fedsim.cost.device import DeviceProfile
from fedsim.cost.shapes import load_shape
from fedsim.errors import ConfigError, RunError
from fedsim.fleet.fleet import Fleet, load_fleet
from fedsim.fleet.fleet_file import fleet_path
from fedsim.methods.catalogue import method_named
from fedsim.records.columns import schema_of
from fedsim.records.folder import RunDirectory, check_usable
from fedsim.records.manifest import SCHEMA_VERSION
from fedsim.records.reader import Run
from fedsim.records.writer import write_joined
from fedsim.runner.build import priced
from fedsim.runner.config import build_config, config_hash, config_yaml
from fedsim.runner.run import perturbation
from fedsim.settings import Config

TIME_BLIND = frozenset({"uniform", "random"})
"""Policies whose choices no clock can move. A user's own is taken to look at it."""
_SAME = 1e-9


@dataclass(frozen=True, eq=False)
class Jobs:
    """Every flight of a run, in the order of merges, then clients; arrays of shape (F,).

    Attributes:
        index: the merge, which is the version too under the synchronous protocol.
        firsts: place of each merge's first flight, shape (merges,).
        ok: whether the update arrived.
    """

    index: IntArray
    firsts: IntArray
    clients: IntArray
    flight: IntArray
    work: Work
    ok: np.ndarray


@dataclass(frozen=True, eq=False)
class Times:
    """Seconds and joules of each flight, shape (F,), and of each merge, shape (merges,).

    Attributes:
        device, mode: names, where they were asked for.
    """

    download_s: FloatArray
    compute_s: FloatArray
    upload_s: FloatArray
    duration_s: FloatArray
    energy_j: FloatArray
    device: np.ndarray
    mode: np.ndarray

    @property
    def end_s(self) -> FloatArray:
        """The clock at each merge."""
        return np.cumsum(self.duration_s)


def why_not(config: Config) -> str | None:
    """What of a run hangs on the clock, in words; None where nothing does."""
    server = config.server
    if server.mode != "sync":
        return f"server.mode is {server.mode}: the order of merges hangs on the clock"
    for key in ("deadline_s", "time_budget_s"):
        if getattr(server, key) is not None:
            return f"server.{key} is {getattr(server, key):g}: who takes part, or how long, hangs on the clock"
    if SELECTIONS.named(server.selection).needs_history:
        return f"server.selection is {server.selection}: who takes part hangs on how long others took"
    if server.over_selection:
        return f"server.over_selection is {server.over_selection:g}: whose updates count hangs on the clock"
    if config.prune.selection == "global":
        return "prune.selection is global: what each layer kept is not recorded, so that no job can be priced again"
    return None


def blind(config: Config) -> bool:
    """Whether the policy's choices are the same on any clock."""
    return config.control.policy in TIME_BLIND


def jobs_of(run: Run, config: Config) -> Jobs:
    """Every flight of a run with its work.

    Raises:
        RunError: no client records.
    """
    rows = run.client_rounds
    if rows.empty or "flight" not in rows:
        raise RunError(f"run '{run.path}' has no records of its clients (records.client_rounds): no job can be priced")
    rows = rows.sort_values(["round", "client"], kind="stable")
    index = rows["round"].to_numpy(dtype=np.int64)
    ask_at = _asks(config, _outputs(config, rows))
    columns = {name: np.zeros(len(rows)) for name in Work.__dataclass_fields__}
    merges, merge_of = np.unique(index, return_inverse=True)
    asks = [ask_at(int(one)) for one in merges]
    for ask in dict.fromkeys(asks):  # one for all merges whose jobs cost alike
        places = np.array([one is ask for one in asks])[merge_of]
        own = rows[places]
        work = ask.work(
            own["ratio_before"].to_numpy(), own["prune_ratio_target"].to_numpy(), own["lora_rank"].to_numpy()
        )
        for name, column in columns.items():
            column[places] = np.broadcast_to(getattr(work, name), (len(own),))
    # What was really sent may differ from what the arm says (stacked adapters of others); it is recorded.
    columns["download_bytes"] = rows["bytes_down"].to_numpy()
    ok = (rows["outcome"] != Outcome.OUT_OF_MEMORY.label).to_numpy()
    columns["upload_bytes"] = np.where(ok, rows["bytes_up"].to_numpy(), columns["upload_bytes"])
    firsts = np.flatnonzero(np.diff(index, prepend=-1))
    return Jobs(
        index, firsts, rows["client"].to_numpy(np.int64), rows["flight"].to_numpy(np.int64), Work(**columns), ok
    )


def _asks(config: Config, outputs: int) -> Callable[[int], Ask]:
    """What jobs demand that were sent off with a version."""
    method = method_named(config.method)
    shape = load_shape(config.model.name, outputs)
    clock_shape = load_shape(config.cost.model, outputs) if config.cost.model else shape
    ask_of = priced(config, method, shape, clock_shape)
    return lambda version: ask_of(method.local_program(version, config))


def _outputs(config: Config, rows: pd.DataFrame) -> int:
    """Outputs of the classifier, which no record names: by the bytes that an update of known arms took; 0: no head."""
    if config.data.task == "causal_lm":
        return 0
    sent = rows[rows["outcome"] == Outcome.OK.label].iloc[:1]
    if sent.empty or config.train.engine in ("none", "surrogate"):
        return 2
    arms = [sent[name].to_numpy() for name in ("ratio_before", "prune_ratio_target", "lora_rank")]
    version = int(sent["round"].iloc[0])
    two, three = (float(_asks(config, labels)(version).work(*arms).upload_bytes[0]) for labels in (2, 3))
    return 2 + round((float(sent["bytes_up"].iloc[0]) - two) / (three - two))


def times_on(jobs: Jobs, fleet: Fleet, *, fits_as_recorded: bool = False) -> Times:
    """The jobs on a fleet.

    Args:
        fits_as_recorded: take what fitted in the run to fit here.
    Raises:
        RunError: a job fits no more, or fits now: who takes part hangs on the fleet.
    """
    rows = np.empty(len(jobs.index), dtype=np.int64)
    for first, last in zip(jobs.firsts, [*jobs.firsts[1:], len(rows)], strict=True):
        rows[first:last] = fleet.mode_rows(int(jobs.index[first]), jobs.clients[first:last])
    rates = fleet.rates_at(rows)
    fits = jobs.ok if fits_as_recorded else jobs.work.peak_memory_bytes <= rates.usable_memory_bytes
    if (fits != jobs.ok).any():
        place = int(np.argmax(fits != jobs.ok))
        now = "fits" if fits[place] else "does not fit"
        raise RunError(
            f"{int((fits != jobs.ok).sum())} jobs fit on other devices than in the run (the first: client "
            f"{jobs.clients[place]} in round {jobs.index[place]}, whose job now {now}): who takes part hangs on it"
        )
    download = fleet.download_seconds(jobs.flight, jobs.clients, jobs.work.download_bytes)
    compute = np.where(fits, fleet.compute_seconds(jobs.flight, jobs.clients, jobs.work, rates), 0.0)
    upload = np.where(fits, fleet.upload_seconds(jobs.flight, jobs.clients, jobs.work.upload_bytes), 0.0)
    duration = np.maximum.reduceat(download + compute + upload, jobs.firsts)
    whole = np.repeat(duration, np.diff([*jobs.firsts, len(rows)]))
    energy = (
        rates.busy_power_watts * compute
        + rates.radio_power_watts * (download + upload)
        + rates.idle_power_watts * (whole - compute)
    )
    device, mode = fleet.devices(jobs.clients).texts, fleet.modes_at(rows).texts
    return Times(download, compute, upload, duration, energy, device, mode)


def fleet_of(
    config: Config, perturb: Callable[[DeviceProfile], DeviceProfile] | None = None, clients: int | None = None
) -> Fleet:
    """The fleet of a configuration, with as many clients as a run had."""
    settings = config.fleet if clients is None else config.fleet.model_copy(update={"clients": clients})
    return load_fleet(settings, config.cost.precision, config.seed, perturb)


def checked_jobs(run: Run) -> tuple[Config, Jobs, Fleet]:
    """A run's configuration, jobs and own fleet.

    Raises:
        RunError: the run is not finished, hangs on the clock, or its records are not those of its configuration.
    """
    if not run.finished:
        raise RunError(f"run '{run.path}' is not finished: go on with it first (fedsim run --resume)")
    config = build_config(run.config)
    reason = why_not(config)
    if reason is not None:
        raise RunError(f"run '{run.path}' cannot be timed anew: {reason}")
    jobs = jobs_of(run, config)
    fleet = fleet_of(config, perturbation(run.manifest.get("profile_draw")))
    if int(jobs.clients.max()) >= fleet.clients:
        raise RunError(f"run '{run.path}' has more clients than its fleet '{config.fleet.name}' (a changed file)")
    again = times_on(jobs, fleet)
    recorded = run.rounds["duration_s"].to_numpy()
    if len(recorded) != len(again.duration_s) or not np.allclose(again.duration_s, recorded, rtol=_SAME, atol=0):
        raise RunError(
            f"run '{run.path}' is not reproduced by its own configuration (another version of fedsim, or a fleet or "
            "profile file that has changed): its jobs cannot be priced again"
        )
    return config, jobs, fleet


def retimed(
    run: Run, fleet_name: str | None, mode: str | None, links: str | None, folder: Path
) -> tuple[Config, Jobs, Times]:
    """A finished run on another fleet, or the same one with other modes or the links of another.

    Args:
        fleet_name: fleet or its file; None: the run's own.
        mode: power mode of every device, ``fastest`` or ``uniform``; None: as the fleet file says.
        links: fleet whose links are taken; None: the fleet's own.
        folder: where a changed fleet file is written.
    Raises:
        RunError: it hangs on the clock, with the reason.
    """
    config, jobs, own = checked_jobs(run)
    if not blind(config):
        raise RunError(
            f"run '{run.path}' cannot be timed anew: control.policy is {config.control.policy}, whose choices hang on "
            "the clock; run it again with the other fleet"
        )
    update: dict[str, object] = {"clients": own.clients}
    if fleet_name is not None:
        update["name"] = fleet_name
    config = config.model_copy(update={"fleet": config.fleet.model_copy(update=update)})
    if mode is not None:
        config = with_mode(config, mode, folder)
    fleet = fleet_of(config)
    if links is not None:
        other = config.model_copy(update={"fleet": config.fleet.model_copy(update={"name": links})})
        fleet = replace(fleet, links=fleet_of(other).links)
    return config, jobs, times_on(jobs, fleet)


def with_mode(config: Config, mode: str, folder: Path) -> Config:
    """The configuration on its fleet with every device in one power mode (or ``fastest``, ``uniform``).

    The changed fleet file is written to `folder`. Raises RunError for a fleet of profiles that lie beside its file.
    """
    content = yaml.safe_load(fleet_path(config.fleet.name).read_text(encoding="utf-8"))
    for device in content["devices"]:
        if str(device["profile"]).endswith((".yaml", ".yml")):
            raise RunError(
                f"--mode: fleet '{config.fleet.name}' has a profile of its own ({device['profile']}); copy the fleet "
                "file beside it, change the modes there, and give it with --fleet"
            )
        device["mode"] = mode
    path = folder / f"{Path(config.fleet.name).stem}-{re.sub('[^A-Za-z0-9]+', '-', mode)}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return config.model_copy(update={"fleet": config.fleet.model_copy(update={"name": str(path)})})


def rounds_with(run: Run, jobs: Jobs, times: Times) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``rounds`` and ``client_rounds`` of a run with other times."""
    end_s = times.end_s
    start_s = end_s - times.duration_s
    rounds = run.rounds.copy()
    whole = np.repeat(times.duration_s, np.diff([*jobs.firsts, len(jobs.index)]))
    idle = whole - times.download_s - times.compute_s - times.upload_s
    counts = np.diff([*jobs.firsts, len(jobs.index)])
    rounds["start_s"], rounds["end_s"], rounds["duration_s"] = start_s, end_s, times.duration_s
    rounds["idle_fraction"] = np.add.reduceat(idle, jobs.firsts) / (counts * times.duration_s)
    rounds["energy_j"] = np.add.reduceat(times.energy_j, jobs.firsts)
    clients = run.client_rounds.sort_values(["round", "client"], kind="stable").reset_index(drop=True)
    clients["device"], clients["mode"] = times.device, times.mode
    clients["dispatch_s"] = np.repeat(start_s, counts)
    clients["download_s"], clients["compute_s"], clients["upload_s"] = times.download_s, times.compute_s, times.upload_s
    clients["idle_s"], clients["energy_j"] = idle, times.energy_j
    return rounds, clients


def retime_run(
    run: Run, out: Path, fleet_name: str | None = None, mode: str | None = None, links: str | None = None
) -> Path:
    """Write a finished run on another clock as a run directory of its own; its manifest says so.

    Raises:
        ConfigError: nothing to change was given.
        RunError: the run hangs on the clock, with the reason; `out` is not empty.
    """
    if fleet_name is None and mode is None and links is None:
        raise ConfigError("nothing is to change: give --fleet, --mode or --links")
    check_usable(out, force=False)
    with TemporaryDirectory() as scratch:
        config, jobs, times = retimed(run, fleet_name, mode, links, Path(scratch))
        files = {path.name: path.read_text(encoding="utf-8") for path in Path(scratch).iterdir()}
    for name in files:
        config = config.model_copy(update={"fleet": config.fleet.model_copy(update={"name": str(out / name)})})
    rounds, clients = rounds_with(run, jobs, times)
    changed = {"fleet": fleet_name, "mode": mode, "links": links}
    said = ", ".join(f"{key} {value}" for key, value in changed.items() if value is not None)
    manifest = {key: value for key, value in run.manifest.items() if key != "trace_hash"}
    fleet = dict(manifest.get("fleet", {})) | {"name": config.fleet.name}
    manifest |= {
        "labels": [
            *run.manifest.get("labels", []),
            f"timed anew from a finished run ({said}): nothing was trained here",
        ],
        "retimed_from": {"run": run.path.name, "trace_hash": run.manifest.get("trace_hash"), **changed},
        "schema_version": SCHEMA_VERSION,
        "simulated_s": float(times.end_s[-1]),
        "config_hash": config_hash(config),
        "fleet": fleet,
    }
    with RunDirectory.create(out, force=False) as directory:
        for name, text in files.items():
            directory.write_text(name, text)
        directory.write_text("config.yaml", config_yaml(config))
        directory.write_manifest(manifest | {"status": "running"})
        digests = {}
        for name, frame in (("rounds", rounds), ("client_rounds", clients)):
            table = pa.Table.from_pandas(frame, schema=schema_of(name), preserve_index=False)
            digests[f"{name}.parquet"] = write_joined(out, name, table).model_dump()
        directory.write_manifest(manifest | {"files": digests})
    return out
