"""Made-up runs, written through the real writer: TX2, NX, AGX in proportion 30:40:10, four methods, cubic pruning."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from fedsim.contracts.common import Labels, Outcome
from fedsim.contracts.control import Rewards, Work
from fedsim.contracts.flights import Arrivals, Flights, Learned
from fedsim.records.checkpoint import save_checkpoint
from fedsim.records.folder import RunDirectory
from fedsim.records.integrity import digest_of
from fedsim.records.manifest import SCHEMA_VERSION
from fedsim.records.writer import RecordWriter
from fedsim.settings import Config

CLASSES = ("jetson-tx2", "jetson-xavier-nx", "jetson-agx-xavier")
RATES = np.array([0.345, 0.43, 0.705])
DEFAULTS = {
    "fedlora": {},
    "fedspine_uniform": {},
    "fedspine": {"target_scope": "fleet_mean"},
    "fedspine_balanced": {"target_scope": "fleet_mean"},
}


@dataclass(frozen=True)
class Block:
    """A trace of two records: the round opens and closes."""

    start_s: float
    end_s: float
    round_index: int

    def columns(self) -> dict[str, np.ndarray]:
        return {
            "time_s": np.array([self.start_s, self.end_s]),
            "round": np.array([self.round_index, self.round_index]),
            "client": np.array([-1, -1]),
            "event": np.array(["round_open", "round_close"]),
            "value": np.array([np.nan, 1.0]),
        }


def config_of(method: str, seed: int, rounds: int = 30, **records: bool) -> Config:
    return Config.model_validate(
        {"seed": seed, "method": method, "records": records, "server": {"rounds": rounds}, "prune": DEFAULTS[method]}
    )


def manifest_of(config: Config, clients: int, **changes: object) -> dict[str, object]:
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "running",
        "method": config.method,
        "seed": config.seed,
        "config_hash": "0" * 64,
        "labels": ["reconstruction"],
        "versions": {"fedsim": "0.1.0"},
        "model": {"name": "tiny", "sha256": "1" * 64},
        "data": {"name": "synthetic", "sha256": "2" * 64, "train": 4000, "test": 400},
        "fleet": {"name": "fedspine-80", "clients": clients},
        "clock": {"model": "roberta-base", "batch_size": 8, "seq_len": 128, "precision": "fp32", "label": "clock"},
        **changes,
    }


def one_round(
    config: Config, round_index: int, start_s: float, clients: int = 80, fail: bool = True
) -> tuple[Arrivals, Learned, Block]:
    """One round as a pure function of its arguments, so that a resumed run makes the same rows again."""
    method, rounds = config.method, config.server.rounds
    generator = np.random.default_rng([config.seed, round_index, sorted(DEFAULTS).index(method)])
    kind = np.repeat([0, 1, 2], [clients * 3 // 8, clients - clients * 3 // 8 - clients // 8, clients // 8])
    ids = np.arange(clients)

    def ratios(at: int) -> np.ndarray:
        warm, end = rounds // 4, max(rounds // 4 + 1, 3 * rounds // 4)
        schedule = 0.5 * (1 - (1 - np.clip((at - warm) / (end - warm), 0, 1)) ** 3)
        lean = np.array([0.12, 0.0, -0.36]) if method == "fedspine_balanced" else np.zeros(3)
        noise = 0.05 * np.sin(ids * 7.0 + at) if method == "fedspine" else 0.0
        return (
            np.zeros(clients) if method == "fedlora" else np.clip(schedule + schedule * 2 * lean[kind] + noise, 0, 0.8)
        )

    ratio, before = ratios(round_index + 1), ratios(round_index)
    rank = np.full(clients, 8)
    if method == "fedspine":
        rank = generator.choice([2, 4, 8, 16], clients)
    elif method == "fedspine_balanced":
        rank = np.array([4, 8, 16])[kind]
    bytes_way = 0.66e6 * rank * (1 - 0.5 * ratio)
    work = Work(
        flops=14e12 * (1 - 0.85 * before),
        memory_bytes=np.full(clients, 1e11),
        launches=np.full(clients, 1e5),
        peak_memory_bytes=1.5e9 * (1 - 0.4 * before),
        download_bytes=bytes_way,
        upload_bytes=bytes_way,
    )
    count = np.full(clients, round_index)
    flights = Flights(
        flight=count,
        clients=ids,
        version=count,
        dispatch_s=np.full(clients, start_s),
        ratio_before=before,
        ratio_asked=ratio,
        rank=rank,
        steps=np.full(clients, config.train.local_steps),
        work=work,
        ticket=np.zeros(clients, dtype=np.int64),
    )

    compute_s = work.flops / (RATES[kind] * 1e12) * np.exp(0.02 * generator.standard_normal(clients))
    link_bits = generator.uniform(15e6, 25e6, clients)
    download_start = np.full(clients, start_s) + 0.02 * (ids % 5)
    download_end = download_start + bytes_way * 8 / link_bits
    compute_end = download_end + compute_s
    upload_end = compute_end + bytes_way * 8 / link_bits
    dropped = generator.random(clients) < (0.02 if fail else 0.0)
    # A dropped client stops half way through its computation.
    compute_end = np.where(dropped, download_end + compute_s / 2, compute_end)
    upload_end = np.where(dropped, compute_end, upload_end)
    outcome = np.where(dropped, Outcome.DROPPED, Outcome.OK)
    end_s = float(upload_end.max())
    arrivals = Arrivals(
        merge_index=round_index,
        start_s=start_s,
        end_s=end_s,
        flights=flights,
        device=Labels(kind, np.array(CLASSES)),
        mode=Labels(np.zeros(clients, dtype=np.int64), np.array(["MAXN"])),
        download_start_s=download_start,
        download_end_s=download_end,
        compute_end_s=compute_end,
        upload_end_s=upload_end,
        released_s=np.full(clients, end_s),
        bytes_down=bytes_way,
        bytes_up=np.where(dropped, 0.0, bytes_way),
        energy_joules=12.0 * compute_s + 3.0 * (end_s - start_s),
        outcome=outcome,
    )
    tested = round_index % 3 == 2 or round_index == rounds - 1
    progress = (round_index + 1) / rounds
    accuracy = (
        0.5 + 0.42 * (1 - np.exp(-4 * progress)) - 0.05 * float(ratio.mean()) + 0.006 * generator.standard_normal()
    )
    gone = np.where(dropped, np.nan, 1.0)
    learned = Learned(
        ratio=np.where(dropped, before, ratio),
        loss_before=0.7 * gone,
        loss_after=0.5 * gone,
        lora_importance=np.nan * gone,
        rewards=replace(Rewards.none(clients), reward=np.clip(generator.normal(0.5, 0.1, clients), 0, 1) * gone),
        outcome=outcome,
        accuracy=float(accuracy) if tested else None,
        loss=0.4 if tested else None,
        accuracy_consensus=float(accuracy) - 0.01 if tested else None,
    )
    return arrivals, learned, Block(start_s, end_s, round_index)


def play(
    path: Path,
    config: Config,
    first: int = 0,
    now_s: float = 0.0,
    clients: int = 80,
    stop_before: int | None = None,
    with_accuracy: bool = True,
) -> tuple[float, dict[str, dict[str, object]]]:
    """Append rounds with a checkpoint after each; returns the simulated time reached, and the digests of its tables."""
    writer = RecordWriter(path, config.records, first)
    for index in range(first, config.server.rounds if stop_before is None else stop_before):
        arrivals, learned, block = one_round(config, index, now_s, clients)
        if not with_accuracy:
            learned = Learned(**{**vars(learned), "accuracy": None, "loss": None, "accuracy_consensus": None})
        now_s = arrivals.end_s
        writer.append_round(arrivals, learned, block, host_s=0.25)
        writer.close_part(index + 1)
        save_checkpoint(path / "checkpoint", index + 1, {"now": np.array(now_s)}, {"now_s": now_s})
    files = writer.finish() if stop_before is None else {}
    return now_s, {name: digest.model_dump() for name, digest in files.items()}


def write_run(
    path: Path,
    method: str = "fedspine",
    seed: int = 0,
    rounds: int = 30,
    clients: int = 80,
    stop_before: int | None = None,
    with_accuracy: bool = True,
    manifest: dict[str, object] | None = None,
    config: Config | None = None,
    **records: bool,
) -> Path:
    """A whole run directory; `stop_before` leaves it unfinished, `manifest` changes fields of its manifest."""
    config = config or config_of(method, seed, rounds, **records)
    fields = manifest_of(config, clients, **(manifest or {}))
    with RunDirectory.create(path, force=False) as directory:
        directory.write_text("config.yaml", yaml.safe_dump(config.model_dump(mode="json")))
        directory.write_manifest(fields)
        simulated_s, files = play(path, config, clients=clients, stop_before=stop_before, with_accuracy=with_accuracy)
        if stop_before is None:
            directory.write_manifest({**fields, "status": "finished", "simulated_s": simulated_s, "files": files})
    return path


def rewrite(path: Path, table: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Put another table in the place of a finished run's, with its digest."""
    file = path / f"{table}.parquet"
    change(pd.read_parquet(file)).to_parquet(file, index=False)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"] = {**manifest.get("files", {}), file.name: digest_of(file).model_dump()}
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
