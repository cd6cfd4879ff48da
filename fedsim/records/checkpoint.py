"""Checkpoints: named arrays and a little JSON, complete or absent.

``<directory>/round-000012/`` holds ``state.safetensors`` and ``meta.json`` (with the SHA-256 of both). They are written
in a temporary folder, forced to disk, and the folder is renamed: killed at any moment, the previous one still loads.
No pickle.

How often: `CheckpointPace`. The host's clock may decide there, as it decides only what lies on disk: a run ends with
the same results wherever its checkpoints are.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedsim.errors import RunError
from fedsim.files import TEMPORARY_SUFFIX, force, json_text, parse_json, sync_folder, writing

KEPT = 2
"""How many checkpoints stay: the newest, and one to go back to should it be damaged."""

AUTO_SHARE = 20.0
"""With ``auto``, the time between two checkpoints is at least this many times what the last one took."""

STATE = "state.safetensors"
META = "meta.json"
_NAME = re.compile(r"round-(\d{6,})")


class CheckpointPace:
    """Says when a checkpoint is due; the end of a run always has one.

    Args:
        every: ``server.checkpoint_every``: rounds between checkpoints, or ``auto``: one after the first round, then
            whenever the host time since the last is at least `AUTO_SHARE` times what that one took.
    """

    def __init__(self, every: int | Literal["auto"]) -> None:
        self._every = every
        self._due_s = -math.inf

    def due(self, next_round: int, now_s: float) -> bool:
        """Whether one is to be written now, before round `next_round`; `now_s` is the host's clock."""
        return now_s >= self._due_s if self._every == "auto" else next_round % self._every == 0

    def wrote(self, began_s: float, ended_s: float) -> None:
        """One was written, from `began_s` to `ended_s` on the host's clock."""
        self._due_s = ended_s + AUTO_SHARE * (ended_s - began_s)


def save_checkpoint(directory: Path, next_round: int, state: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Path:
    """Write ``directory/round-<next_round>`` and remove all but the newest two.

    Args:
        directory: the run's ``checkpoint`` folder (made if needed).
        next_round: the first round that is not in the checkpoint, >= 0.
        state: arrays of booleans, integers or floats, of any shape (0-d and empty ones too).
        meta: whatever else the run needs, JSON values only.
    Returns:
        The checkpoint's folder.
    Raises:
        RunError: full disk, or a folder that cannot be written.
        TypeError: an array of objects or strings.
    """
    # Little-endian and contiguous, as the format wants; `reshape` because making a 0-d array contiguous gives (1,).
    arrays = {}
    for name, value in state.items():
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"checkpoint array '{name}' has dtype {array.dtype}: only booleans, integers and floats")
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        arrays[name] = np.ascontiguousarray(little).reshape(array.shape)
    content = save(arrays)
    text = json_text(
        {
            "next_round": next_round,
            "state_sha256": hashlib.sha256(content).hexdigest(),
            "meta": dict(meta),
            "meta_sha256": _meta_sha256(meta),
        }
    )
    target = directory / f"round-{next_round:06d}"
    temporary = directory / f".{target.name}{TEMPORARY_SUFFIX}"
    with writing(target, len(content)):
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(f".*{TEMPORARY_SUFFIX}"):
            shutil.rmtree(leftover)
        try:
            temporary.mkdir()
            _write_synced(temporary / STATE, content)
            _write_synced(temporary / META, text.encode("utf-8"))
            sync_folder(temporary)
            _move_in_place(temporary, target)
        except OSError:
            # A full disk keeps the space it had: the half-written folder goes, the older checkpoints stay.
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(directory)
        for _, old in _complete_names(directory)[:-KEPT]:
            shutil.rmtree(old)
    return target


def has_checkpoint(directory: Path) -> bool:
    """Whether there is any checkpoint to load (a run killed before its first one has none: start at round 0)."""
    return bool(_complete_names(directory))


def saved_rounds(directory: Path) -> int | None:
    """Rounds in the newest checkpoint; None where there is none."""
    found = _complete_names(directory)
    return found[-1][0] if found else None


def load_checkpoint(directory: Path) -> tuple[int, dict[str, np.ndarray], dict[str, Any]]:
    """The newest checkpoint: ``(next_round, state, meta)``.

    Raises:
        RunError: there is none, or the newest is damaged (the message names the file and what to do).
    """
    found = _complete_names(directory)
    if not found:
        raise RunError(f"no checkpoint in '{directory}': start the run afresh with --force")
    next_round, folder = found[-1]
    remedy = (
        f"remove '{folder}' to go on from round {found[-2][0]}"
        if len(found) > 1
        else "there is no older one: start the run afresh with --force"
    )
    record = _read_meta(folder / META, next_round, remedy)
    content = _read(folder / STATE, remedy)
    if hashlib.sha256(content).hexdigest() != record["state_sha256"]:
        raise RunError(f"checkpoint file '{folder / STATE}' is damaged (its SHA-256 is not the recorded one): {remedy}")
    try:
        state = load(content)
    except SafetensorError as error:
        raise RunError(f"checkpoint file '{folder / STATE}' is damaged ({error}): {remedy}") from None
    return next_round, dict(state), record["meta"]


def _meta_sha256(meta: Mapping[str, Any]) -> str:
    """Of the values, whatever the spelling of the file."""
    return hashlib.sha256(json_text(dict(meta)).encode("utf-8")).hexdigest()


def _complete_names(directory: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders, oldest first. Temporary ones have other names."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), entry) for entry in directory.iterdir() if (match := _NAME.fullmatch(entry.name))]
    return sorted(found)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        force(stream.fileno())


def _move_in_place(temporary: Path, target: Path) -> None:
    """Rename; a checkpoint of the same round (replayed after going back) is moved aside first."""
    if target.exists():
        aside = target.with_name(f".{target.name}.old{TEMPORARY_SUFFIX}")
        os.replace(target, aside)
        os.replace(temporary, target)
        shutil.rmtree(aside)
    else:
        os.replace(temporary, target)


def _read(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise RunError(f"checkpoint file '{path}' is missing: {remedy}") from None
    except OSError as error:
        raise RunError(f"cannot read checkpoint file '{path}' ({error.strerror or error}): {remedy}") from error


def _read_meta(path: Path, next_round: int, remedy: str) -> dict[str, Any]:
    try:
        record = parse_json(_read(path, remedy))
    except ValueError:
        raise RunError(f"checkpoint file '{path}' is damaged (not valid JSON): {remedy}") from None
    whole = isinstance(record, dict) and isinstance(record.get("meta"), dict) and "state_sha256" in record
    if not whole or record.get("next_round") != next_round:
        raise RunError(f"checkpoint file '{path}' is damaged (round, hash or content missing): {remedy}")
    if record.get("meta_sha256", _meta_sha256(record["meta"])) != _meta_sha256(record["meta"]):
        raise RunError(f"checkpoint file '{path}' is damaged (its SHA-256 is not the recorded one): {remedy}")
    return record
