"""From a finished run to a model on disk: a client's structure or the consensus, with the run's global LoRA.

A client's model is what the run tests on its panel: the global LoRA restricted to the client's structure. The consensus
is what ``accuracy_consensus`` tests: one structure cut to the fleet-mean ratio by the averaged importance.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.contracts.common import State
from fedsim.errors import FedsimError, ModelError, RunError, unknown
from fedsim.files import writing
from fedsim.places import user_path
from fedsim.records.checkpoint import load_checkpoint
from fedsim.records.folder import CHECKPOINT
from fedsim.records.reader import Run, load
from fedsim.runner.config import build_config
from fedsim.settings import Config

if TYPE_CHECKING:
    from fedsim.learn.learner import LoraLearner
    from fedsim.structure import Structure

FORMATS = ("dense", "sliced")


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        path: the folder.
        whose: such as "client 3" or "consensus".
        prune_ratio: achieved, removed / all prunable weights.
        model_bytes: size of ``model.safetensors``.
        base_bytes: what it would be with nothing pruned and the LoRA apart.
        adapter_bytes: size of the adapter's weights; 0 where they are merged.
        notes: what the user must know, one sentence each.
    """

    path: Path
    whose: str
    format: str
    prune_ratio: float
    lora_rank: int
    model_bytes: int
    base_bytes: int
    adapter_bytes: int
    notes: tuple[str, ...]

    def as_text(self) -> str:
        """A few lines for the terminal."""
        lora = f"LoRA of rank {self.lora_rank} " + (
            f"beside it ({self.adapter_bytes / 1e6:.1f} MB)" if self.adapter_bytes else "merged"
        )
        lines = [
            f"{self.whose}, {self.format}: pruning ratio {self.prune_ratio:.3f}, {self.model_bytes / 1e6:.1f} MB "
            f"({self.base_bytes / 1e6:.1f} MB unpruned), {lora}",
            *(f"note: {note}" for note in self.notes),
            f"written to {self.path}; how to load it: {self.path / 'README.md'}",
        ]
        return "\n".join(lines)


def export_run(
    run: str | Path | Run,
    out: str | Path,
    *,
    device: int | None = None,
    consensus: bool = False,
    format: str = "dense",
    merge: bool = False,
) -> ExportResult:
    """Write a model of a finished run as a folder that plain transformers and peft load.

    Args:
        run: run directory.
        out: folder to be made; it must not exist, or be empty.
        device: client number, from 0. Either this or `consensus`.
        format: ``dense`` (original shapes, zeros where pruned) or ``sliced`` (small shapes, fedsim's model classes).
        merge: add the LoRA to the weights; else it lies in ``adapter/``.
    Raises:
        RunError: unfinished run, run without training, no such client, `out` in use, another base model than the
            run's, or a folder that cannot be written.
        ModelError: the base model is no longer at hand.
    """
    run, config = check_export(run, out, device, consensus, format)
    out = user_path(out)
    state = _last_state(run)

    from fedsim.learn.export.card import ExportFacts
    from fedsim.learn.export.exported import write_export
    from fedsim.learn.export.restored import restore_learner
    from fedsim.learn.model.adapter import folded  # heavy: only what gets so far pays for it

    names = _label_names(run, config)
    learned = {name.removeprefix("learner."): array for name, array in state.items() if name.startswith("learner.")}
    try:
        learner, backbone = restore_learner(config, len(names), learned)
    except ModelError as error:
        raise ModelError(f"run '{run.path}' cannot be exported without its base model: {error}") from error
    except (KeyError, ValueError, RuntimeError) as error:
        raise RunError(
            f"the checkpoint of run '{run.path}' does not fit its configuration, or another version of fedsim wrote it "
            f"(at {error})"
        ) from error
    _check_model(run, learner.weights_sha256)

    scale = config.model.lora_alpha_over_rank
    adapter = folded(learner.adapter, scale)
    structure, notes = _structure(run, learner, config, state, device)
    shape = backbone.shape
    facts = ExportFacts(
        whose="consensus" if device is None else _client_text(run, device),
        format="sliced" if format == "sliced" else "dense",
        merged=merge,
        architecture=shape.architecture,
        pooling=config.model.pooling,
        label_names=names,
        max_length=config.train.max_length,
        lora_rank=adapter.rank,
        lora_scale=scale,
        prune_ratio=structure.ratio(shape),
        kept_heads=tuple(structure.heads_kept.tolist()),
        kept_channels=tuple(structure.channels_kept.tolist()),
        notes=notes,
        run=_provenance(run, config),
    )
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    settings = config.model.model_copy(update={"name": str(out)})
    with writing(out):
        try:
            write_export(temporary, backbone, adapter, structure, settings, facts)
            os.replace(temporary, out)
        except BaseException:
            with suppress(OSError):
                shutil.rmtree(temporary)
            raise
    adapter_file = out / "adapter" / "adapter_model.safetensors"
    return ExportResult(
        path=out,
        whose=facts.whose,
        format=format,
        prune_ratio=facts.prune_ratio,
        lora_rank=facts.lora_rank,
        model_bytes=(out / "model.safetensors").stat().st_size,
        base_bytes=sum(tensor.numel() * 4 for tensor in backbone.encoder.state_dict().values()),
        adapter_bytes=adapter_file.stat().st_size if adapter_file.exists() else 0,
        notes=notes,
    )


def check_export(
    run: str | Path | Run, out: str | Path, device: int | None, consensus: bool, format: str
) -> tuple[Run, Config]:
    """The run and its configuration, after raising what `export_run` would of them, before anything heavy loads."""
    run = run if isinstance(run, Run) else load(run)
    _check_asked(device, consensus, format)
    _check_run(run, device)
    _check_out(user_path(out))
    return run, build_config(run.config)


def _check_asked(device: int | None, consensus: bool, format: str) -> None:
    if (device is not None) == consensus:
        both = "both are given" if consensus else "neither is given"
        raise RunError(f"an export is of one client (--device CLIENT) or of the consensus (--consensus): {both}")
    if format not in FORMATS:
        raise RunError(f"--format: {unknown('value', format, FORMATS)}")


def _check_run(run: Run, device: int | None) -> None:
    engine = run.manifest.get("engine")
    if engine in ("none", "surrogate"):
        what = "a timing-only run" if engine == "none" else "a surrogate run"
        raise RunError(f"run '{run.path}' is {what}: nothing was trained, so there is no model to export")
    if not run.finished:
        raise RunError(f"run '{run.path}' is unfinished: go on with fedsim run ... --resume, then export it")
    clients = int((run.manifest.get("fleet") or {}).get("clients", 0))
    if device is not None and not 0 <= device < clients:
        raise RunError(f"--device: value {device} is not allowed (run '{run.path}' has clients 0 to {clients - 1})")


def _label_names(run: Run, config: Config) -> tuple[str, ...]:
    """Classes in the order of the logits; none for a language model."""
    if config.data.task == "causal_lm":
        return ()
    names = (run.manifest.get("data") or {}).get("label_names")
    if not names:
        raise RunError(f"run '{run.path}' does not name its classes (data.label_names in manifest.json)")
    return tuple(str(name) for name in names)


def _check_out(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(f"--out: '{out}' exists already; give a folder that is new or empty")


def _last_state(run: Run) -> State:
    """The checkpoint at the end of the run."""
    next_round, state, _ = load_checkpoint(run.path / CHECKPOINT)
    if next_round != run.manifest.get("rounds"):
        raise RunError(
            f"run '{run.path}' ended after {run.manifest.get('rounds')} rounds, but its newest checkpoint is of round "
            f"{next_round}: the one of its end is needed"
        )
    return state


def _check_model(run: Run, sha256: str) -> None:
    model = run.manifest.get("model") or {}
    if model.get("sha256") != sha256:
        raise RunError(
            f"run '{run.path}' was trained on other weights of model '{model.get('name')}' (sha256 "
            f"{model.get('sha256')}, now {sha256}): restore them to export it"
        )


def _structure(
    run: Run, learner: LoraLearner, config: Config, state: State, device: int | None
) -> tuple[Structure, tuple[str, ...]]:
    """The groups to keep, and what must be said of them."""
    if device is None:
        ratio = float(np.mean(state["federation.asked"]))
        return learner.consensus(ratio), ()
    structure = learner.structure(device)
    rounds = _rounds_of(run, device)
    if rounds != 0:
        return structure, ()
    if structure.head_mask.all() and structure.channel_mask.all():
        return structure, (f"Client {device} never took part in this run: its structure is full, nothing is pruned.",)
    return structure, (
        f"Client {device} never took part in this run: its structure is that of the final cut, by the fleet's scores.",
    )


def _rounds_of(run: Run, device: int) -> int | None:
    """Rounds in which a client's update arrived; None where clients are not recorded."""
    if not run.has("client_rounds"):
        return None
    rows = run.client_rounds
    return int(((rows["client"] == device) & (rows["outcome"] == "ok")).sum())


def _client_text(run: Run, device: int) -> str:
    """Such as "client 3 (jetson-tx2)"."""
    with suppress(FedsimError):
        rows = run.client_rounds
        kinds = rows.loc[rows["client"] == device, "device"]
        if len(kinds):
            return f"client {device} ({kinds.iloc[0]})"
    return f"client {device}"


def _provenance(run: Run, config: Config) -> dict[str, Any]:
    manifest = run.manifest
    model, data = manifest.get("model") or {}, manifest.get("data") or {}
    return {
        "method": run.method,
        "seed": run.seed,
        "rounds": manifest.get("rounds"),
        "simulated_s": manifest.get("simulated_s"),
        "config_hash": manifest.get("config_hash"),
        "trace_hash": manifest.get("trace_hash"),
        "model": model.get("name"),
        "model_sha256": model.get("sha256"),
        "data": data.get("name"),
        "data_sha256": data.get("sha256"),
        "precision": manifest.get("precision"),
        "fleet": (manifest.get("fleet") or {}).get("name"),
        "clock": (manifest.get("clock") or {}).get("label"),
        "labels": list(manifest.get("labels") or ()),
        "sources": list(manifest.get("sources") or ()),
        "fedsim": (manifest.get("versions") or {}).get("fedsim"),
        "final_prune_ratio": manifest.get("final_prune_ratio"),
        "lora_rank_max": config.model.lora_rank_max,
    }
