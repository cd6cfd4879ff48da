"""One run, from a configuration to a finished directory; and again from its last checkpoint."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.contracts.flights import Arrivals, Learned
from fedsim.cost.bands import joint_samples
from fedsim.cost.device import DeviceProfile
from fedsim.errors import RunError
from fedsim.methods.catalogue import method_named
from fedsim.places import user_path
from fedsim.records.checkpoint import CheckpointPace, has_checkpoint, load_checkpoint, save_checkpoint
from fedsim.records.folder import CHECKPOINT, CONFIG, MANIFEST, PARTS, RunDirectory, check_usable
from fedsim.records.integrity import digests_of
from fedsim.records.manifest import SCHEMA_VERSION, Manifest, installed_version
from fedsim.records.reader import Run, load
from fedsim.records.writer import RecordWriter, round_row
from fedsim.resources import resource_folder
from fedsim.runner.build import Experiment, build
from fedsim.runner.config import build_config, config_hash, config_yaml, find_config, read_tree
from fedsim.runner.identity import check_same, identity
from fedsim.runner.progress import Progress
from fedsim.runner.trackers import check_trackers, open_trackers
from fedsim.settings import Config
from fedsim.sim.server import SimState, finished, simulate, state_after
from fedsim.sim.trace import TraceBlock

_CLOCK = "clock."
"""Prefix of the simulated clock's arrays in a checkpoint: the flights under way."""

_PACKAGES = ("numpy", "pandas", "peft", "pyarrow", "scipy", "simpy", "tokenizers", "torch", "transformers")


def run(
    config: str | Path | Mapping[str, Any] | Config,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    quiet: bool = False,
    profile_draw: int | None = None,
    **overrides: Any,
) -> Run:
    """Run an experiment and return its results.

    Args:
        config: a YAML file, the name of a preset, a nested mapping, or a ready `Config`.
        out: run directory; by default ``runs/<configuration>-<method>-seed<seed>``.
        resume: go on from the last checkpoint, or begin where there is none (a finished run is returned as it is).
        force: overwrite what is in `out`.
        quiet: no progress lines.
        profile_draw: number of a draw of the device profiles from their error bands; None takes the values themselves.
        overrides: configuration keys with dots written as two underscores (``train__local_steps=10``), or as given
            (``**{"train.local_steps": 10}``).
    Raises:
        FedsimError: one sentence naming the field, the value and what is allowed.
    """
    checked, stem = _resolve(config, {key.replace("__", "."): value for key, value in overrides.items()})
    path = user_path(out) if out is not None else _default_directory(stem, checked)
    # A run killed before its manifest was written has nothing to resume: it begins.
    if resume and not force and (path / MANIFEST).exists():
        with RunDirectory.open_for_resume(path) as directory:
            checked = _same_config(directory, checked)
            check_same(f"run '{path}'", directory.manifest.get("identity"), identity(checked))
            if directory.manifest["status"] == "finished":
                directory.remove_folder(PARTS)  # left by a kill after the manifest was written
                return load(path)
            _same_schema(directory)
            _same_draw(directory, profile_draw)
            _play(directory, checked, quiet, profile_draw)
        return load(path)
    if isinstance(config, (str, Path)) and find_config(config).resolve() == (path / CONFIG).resolve():
        raise RunError(
            f"'{path / CONFIG}' is the configuration to be run, and the run would write its own there: give another "
            "folder (--out)"
        )
    check_usable(path, force)
    # What is wrong with the configuration must show before anything in the directory is touched.
    experiment, progress = _prepare(checked, quiet, profile_draw, done=0)
    with RunDirectory.create(path, force=force) as directory:
        directory.write_text("config.yaml", config_yaml(checked))
        directory.write_manifest(_first_manifest(checked, experiment, profile_draw))
        _simulate(directory, experiment, progress, SimState(), _Spent())
    return load(path)


def default_directory(config: str | Path | Mapping[str, Any] | Config, overrides: Mapping[str, Any]) -> Path:
    """Where `run` writes when no directory is given."""
    checked, stem = _resolve(config, overrides)
    return _default_directory(stem, checked)


def _default_directory(stem: str, config: Config) -> Path:
    return Path("runs") / f"{stem}-{config.method}-seed{config.seed}"


def _resolve(config: str | Path | Mapping[str, Any] | Config, overrides: Mapping[str, Any]) -> tuple[Config, str]:
    if isinstance(config, Config):
        return build_config(config.model_dump(), overrides), "run"
    if isinstance(config, Mapping):
        return build_config(config, overrides), "run"
    path = find_config(config)
    return build_config(read_tree(path), overrides), path.stem


def _same_config(directory: RunDirectory, asked: Config) -> Config:
    """The configuration of the run to be resumed; anything else asked for is refused."""
    kept = build_config(load(directory.path).config)
    if config_hash(kept) != config_hash(asked):
        ours, theirs = asked.model_dump(mode="json"), kept.model_dump(mode="json")
        changed = sorted(key for key in ours if ours[key] != theirs[key])
        raise RunError(
            f"run '{directory.path}' was started with another configuration (it differs in: {', '.join(changed)}); "
            "resume it with the same one, or start afresh with --force"
        )
    return asked  # equal but for trackers, which may change between two processes of a run


def _same_schema(directory: RunDirectory) -> None:
    """Refuse to go on with records of other columns than the run began with."""
    kept = Manifest.of(directory.manifest, directory.path / MANIFEST)
    if kept.schema_version != SCHEMA_VERSION:
        raise RunError(
            f"run '{directory.path}' is unfinished and was {kept.origin}: go on with the version that began it, or "
            "start afresh with --force"
        )


def _same_draw(directory: RunDirectory, asked: int | None) -> None:
    """Refuse to go on with other device profiles than the run began with."""
    kept = directory.manifest.get("profile_draw")
    if kept != asked:
        began, wanted = ("the profiles themselves" if draw is None else f"draw {draw}" for draw in (kept, asked))
        raise RunError(
            f"run '{directory.path}' was started with other device profiles ({began}, not {wanted}); resume it with "
            "the same --profile-error, or start afresh with --force"
        )


def _same_inputs(directory: RunDirectory, experiment: Experiment) -> None:
    """Refuse to go on where the data or the model's weights are no longer those that the run began with."""
    for what in ("data", "model"):
        kept, now = directory.manifest.get(what), experiment.facts[what]
        if isinstance(kept, dict) and isinstance(now, dict) and kept.get("sha256") != now.get("sha256"):
            raise RunError(
                f"run '{directory.path}' was started with another {what} (sha256 {kept.get('sha256')}, now "
                f"{now.get('sha256')}): restore it, or start afresh with --force"
            )


def _prepare(config: Config, quiet: bool, profile_draw: int | None, done: int) -> tuple[Experiment, Progress]:
    check_trackers(config.records)
    mark = " [surrogate]" if config.train.engine == "surrogate" else ""
    progress = Progress(f"{config.method} seed {config.seed}{mark}", config.server.rounds, done, quiet)
    return build(config, progress.say, perturbation(profile_draw)), progress


def _play(directory: RunDirectory, config: Config, quiet: bool, profile_draw: int | None) -> None:
    """Go on from the last checkpoint; from the beginning where the run was stopped before its first one."""
    checkpoints = directory.path / CHECKPOINT
    if not has_checkpoint(checkpoints):
        experiment, progress = _prepare(config, quiet, profile_draw, done=0)
        directory.write_manifest(_first_manifest(config, experiment, profile_draw))
        _simulate(directory, experiment, progress, SimState(), _Spent())
        return
    next_round, state, meta = load_checkpoint(checkpoints)
    experiment, progress = _prepare(config, quiet, profile_draw, done=next_round)
    _same_inputs(directory, experiment)
    experiment.federation.restore(state)
    under_way = {name.removeprefix(_CLOCK): value for name, value in state.items() if name.startswith(_CLOCK)}
    start = SimState(next_round, float(meta["now_s"]), str(meta["trace_hash"]), bool(meta["target_met"]))
    spent = _Spent(float(meta["host_s"]), float(meta.get("controller_host_s", 0.0)))
    _simulate(directory, experiment, progress, start, spent, under_way)


@dataclass(frozen=True)
class _Spent:
    """Host seconds of a run, and of these the controller's."""

    host_s: float = 0.0
    controller_s: float = 0.0


def _simulate(
    directory: RunDirectory,
    experiment: Experiment,
    progress: Progress,
    start: SimState,
    earlier: _Spent,
    under_way: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Play the rounds; records, checkpoints and the manifest follow.

    Args:
        earlier: host seconds of earlier processes of this run.
        under_way: flights under way at `start`, from the checkpoint.
    """
    config, federation = experiment.config, experiment.federation
    writer = RecordWriter(directory.path, config.records, next_round=start.next_round)
    pace = CheckpointPace(config.server.checkpoint_every)
    trackers = open_trackers(directory.path, config.records, start.next_round, progress.warn)
    began_s = round_began_s = time.perf_counter()

    def spent() -> dict[str, float]:
        return {
            "host_s": earlier.host_s + time.perf_counter() - began_s,
            "controller_host_s": earlier.controller_s + experiment.controller.spent_s,
        }

    def on_merge(
        arrivals: Arrivals, learned: Learned, block: TraceBlock, under_way: Callable[[], dict[str, np.ndarray]]
    ) -> None:
        nonlocal round_began_s
        now_s = time.perf_counter()
        spent_round_s = now_s - round_began_s
        writer.append_round(arrivals, learned, block, host_s=spent_round_s)
        if trackers:
            trackers.round(round_row(arrivals, learned, spent_round_s).to_pylist()[0])
        round_began_s = now_s
        after = state_after(config.server, arrivals, learned, block)
        if finished(config.server, after) or pace.due(after.next_round, now_s):
            # Records first: a part beyond the newest checkpoint is dropped at resume, a missing one is lost.
            writer.close_part(after.next_round)
            meta = {
                "now_s": after.now_s,
                "trace_hash": after.trace_hash,
                "target_met": after.target_met,
                **spent(),
            }
            clock = {f"{_CLOCK}{name}": column for name, column in under_way().items()}
            save_checkpoint(directory.path / CHECKPOINT, after.next_round, {**federation.state(), **clock}, meta)
            pace.wrote(now_s, time.perf_counter())
        progress.round_done(arrivals, learned)

    trackers.start(config.model_dump(mode="json"), directory.manifest)
    with progress, trackers:
        end = simulate(
            experiment.fleet,
            federation,
            config.server,
            config.seed,
            on_merge,
            start,
            player=experiment.player,
            under_way=under_way,
        )
        # In this order: killed in between, the parts are still there and a resumed run joins them again.
        files = writer.join()
        federation.export(directory.path / "adapter")
        files |= digests_of(directory.path, (CHECKPOINT, "adapter"))
        sparsity, cohorts = federation.final_sparsity(), federation.cohorts()
        directory.write_manifest(
            {
                **directory.manifest,
                "status": "finished",
                "rounds": end.next_round,
                "trace_hash": end.trace_hash,
                "simulated_s": end.now_s,
                **spent(),
                **({} if cohorts is None else {"cohorts": cohorts.facts()}),
                "final_prune_ratio": {"mean": sparsity.mean, "low": sparsity.low, "high": sparsity.high},
                "final_whole_model_sparsity": sparsity.mean * experiment.prunable_fraction,
                "files": {name: digest.model_dump() for name, digest in files.items()},
            }
        )
        writer.remove_parts()
        trackers.finish(directory.manifest)


def _first_manifest(config: Config, experiment: Experiment, profile_draw: int | None) -> dict[str, object]:
    method = method_named(config.method)
    labels = [*method.labels, *experiment.labels]
    if profile_draw is not None:
        labels.append(f"device profiles drawn from their error bands (draw {profile_draw})")
    tree = {
        "schema_version": SCHEMA_VERSION,
        "status": "running",
        "method": config.method,
        "seed": config.seed,
        "labels": labels,
        "sources": list(method.sources),
        "config_hash": config_hash(config),
        "engine": config.train.engine,  # of a run that trains, the chosen one follows from the facts
        "versions": {
            "fedsim": installed_version(),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        "host": {"machine": platform.machine(), "system": platform.system()},
        "git": _git_state(),
        "profile_draw": profile_draw,
        **experiment.facts,
    }
    return Manifest.model_validate(tree).tree()


def _git_state() -> dict[str, object] | None:
    """Commit and dirtiness of the source checkout; None for an installed package."""
    folder = resource_folder("device_profiles").parent
    if not (folder / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout

    try:
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain").strip())}
    except (OSError, subprocess.CalledProcessError):
        return None


def perturbation(draw: int | None) -> Callable[[DeviceProfile], DeviceProfile] | None:
    """Each profile's joint sample of that number (`fedsim.cost.bands`), the same in every run; None for None."""
    if draw is None:
        return None
    return lambda profile: joint_samples(profile).drawn(draw)
