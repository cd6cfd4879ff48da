"""Following a run in TensorBoard or Weights & Biases: off by default, and never able to change or stop a run.

Each round's row of ``rounds.parquet`` goes to the trackers that ``records.trackers`` names, into the run directory:
``tensorboard/`` and ``wandb/``. W&B stays offline unless ``records.wandb_mode`` is ``online``; what it would gather of
the host (git state, packages, hardware) is switched off. A missing package is an error before the run starts; whatever
goes wrong afterwards (a full disk, no network) is one warning, and that tracker is off for the rest of the run.

A resumed run goes on in TensorBoard's folder, where the rounds that are played again replace the old ones; W&B cannot
go on offline, and gets another run of the same group.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from fedsim.errors import ConfigError
from fedsim.settings import RecordSettings

Values = Mapping[str, float | int | None]
Warn = Callable[[str], None]

FOLDERS = ("tensorboard", "wandb")
"""What trackers write in a run directory."""

_SUMMARY = ("rounds", "simulated_s", "host_s", "trace_hash", "final_prune_ratio", "final_whole_model_sparsity")
_WANDB_PRIVATE = {
    "silent": True,
    "console": "off",
    "disable_git": True,
    "disable_code": True,
    "disable_job_creation": True,
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "init_timeout": 30.0,
    "login_timeout": 30.0,
}


class Tracker(Protocol):
    """What follows a run. Any exception is taken as the tracker's end, not the run's."""

    def start(self, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Once, before the first round (of this process)."""

    def round(self, values: Values) -> None:
        """After each round: its row of ``rounds.parquet``; None where there is no value."""

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Once, at the end: the finished manifest, or None where the run was stopped."""


TrackerMaker = Callable[[Path, RecordSettings, int], Tracker]
"""``make(run directory, settings, first round)``; touches nothing before `Tracker.start`."""


class TensorBoardTracker:
    """Scalars by round, written at once (no thread): ``tensorboard --logdir RUN/tensorboard``."""

    def __init__(self, directory: Path, records: RecordSettings, first_round: int) -> None:
        self._folder, self._first_round = directory / "tensorboard", first_round
        self._file: Any = None
        self._records: Any = None

    def start(self, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Open a new event file; configuration and provenance are texts in it."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns():020d}.fedsim"  # TensorBoard reads files in the order of names
        self._file = (self._folder / name).open("wb", buffering=0)
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        if self._first_round:
            # Rounds after the checkpoint are played again: TensorBoard drops what an earlier file says of them.
            self._write(Event(step=self._first_round, session_log=SessionLog(status=SessionLog.START)))
        self._text("config", config)
        self._text("manifest", manifest)

    def round(self, values: Values) -> None:
        """One event with all values of the round."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
            if value is not None and name != "round"
        ]
        self._write(Event(step=int(values["round"] or 0), summary=Summary(value=scalars)))

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Close the file."""
        if self._file is None or self._file.closed:
            return
        try:
            if summary is not None:
                self._text("summary", {key: summary[key] for key in _SUMMARY if key in summary})
        finally:
            self._file.close()

    def _text(self, tag: str, value: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        shown = "\n".join(f"    {line}" for line in json.dumps(value, indent=2, sort_keys=True).splitlines())
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=[shown.encode()])
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        item = Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
        self._write(Event(step=self._first_round, summary=Summary(value=[item])))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


class WandbTracker:
    """One W&B run: ``wandb sync RUN/wandb/offline-run-*`` sends an offline one later."""

    def __init__(self, directory: Path, records: RecordSettings, first_round: int) -> None:
        self._directory, self._mode, self._first_round = directory, records.wandb_mode, first_round
        self._run: Any = None

    def start(self, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Open the run; what the installed version can keep to itself, it does."""
        import wandb

        known = getattr(wandb.Settings, "model_fields", {})
        settings = {name: value for name, value in _WANDB_PRIVATE.items() if name in known}
        self._run = wandb.init(
            project="fedsim",
            name=self._directory.name,
            group=f"{self._directory.name}-{str(manifest.get('config_hash'))[:8]}",
            dir=str(self._directory),
            mode=self._mode,
            config={**config, "manifest": dict(manifest)},
            settings=wandb.Settings(**settings),
        )

    def round(self, values: Values) -> None:
        """The values that there are; the step is the round."""
        self._run.log({name: value for name, value in values.items() if value is not None}, step=values["round"])

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Close the run; one that was stopped is marked as failed, so that nobody takes it for finished."""
        if self._run is None:
            return
        if summary is not None:
            self._run.summary.update({key: summary[key] for key in _SUMMARY if key in summary})
        self._run.finish(exit_code=1 if summary is None else 0)


TRACKERS: dict[str, TrackerMaker] = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker}
"""By the names that ``records.trackers`` takes, which are also those of the packages they need."""


def check_trackers(records: RecordSettings) -> None:
    """Refuse a tracker whose package is not there.

    Raises:
        ConfigError: the package is not installed; the sentence says how to.
    """
    for name in records.trackers:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without an origin it is a mere folder of that name
            raise ConfigError(
                f"records.trackers: value '{name}' needs the optional package {name}, which is not installed "
                f"(pip install 'fedspine-sim[{name}]')"
            )


class GuardedTrackers:
    """All trackers of a run as one; what a tracker raises becomes one warning, and the tracker is off."""

    def __init__(self, trackers: Mapping[str, Tracker], warn: Warn) -> None:
        self._trackers, self._warn = dict(trackers), warn

    def __enter__(self) -> GuardedTrackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A run that ends otherwise than by `finish` was stopped."""
        self.finish(None)

    def __bool__(self) -> bool:
        """Whether any tracker is still on."""
        return bool(self._trackers)

    def start(self, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """See `Tracker.start`."""
        self._each(lambda tracker: tracker.start(config, manifest))

    def round(self, values: Values) -> None:
        """See `Tracker.round`."""
        self._each(lambda tracker: tracker.round(values))

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """See `Tracker.finish`; nothing follows."""
        self._each(lambda tracker: tracker.finish(summary))
        self._trackers.clear()

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:
                del self._trackers[name]
                what = (str(error).strip().splitlines() or [type(error).__name__])[0]
                self._warn(f"warning: tracker '{name}' failed ({what}); it is off from here on, the run goes on")


def open_trackers(directory: Path, records: RecordSettings, first_round: int, warn: Warn) -> GuardedTrackers:
    """The trackers of a run, not yet started.

    Args:
        first_round: that this process plays, 0 for a new run.
        warn: told once of each tracker that fails.
    """
    names: Sequence[str] = list(dict.fromkeys(records.trackers))
    return GuardedTrackers({name: TRACKERS[name](directory, records, first_round) for name in names}, warn)
