"""``fedsim calibrate``: this host, or somebody's log, as a device profile."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from fedsim.cost.device import parse_profile
from fedsim.cost.fit_device import DeviceFit, fit_device, profile_content
from fedsim.cost.measurements import Measurement, read_measurements
from fedsim.cost.setting import StepSetting, Tuning
from fedsim.cost.shapes import load_shape
from fedsim.errors import ConfigError
from fedsim.files import atomic_write_text

SHAPE = replace(load_shape("bert-base"), name="bert-base, 4 layers", layers=4, vocab=2048, positions=0)
"""Of BERT's widths, so that products are as large as they will be, and shallow, so that it takes minutes."""


@dataclass(frozen=True)
class Point:
    """One step to time: pruning ratio, LoRA rank, batch, length."""

    ratio: float
    rank: int
    batch: int
    seq_len: int
    tuning: Tuning = "lora"


POINTS = (
    Point(0.0, 8, 8, 64),
    Point(0.5, 8, 8, 64),
    Point(0.75, 8, 8, 64),
    Point(0.0, 2, 1, 16),
    Point(0.5, 16, 2, 32),
    Point(0.0, 8, 2, 256),
    Point(0.5, 32, 4, 256),
    Point(0.0, 16, 16, 32),
    Point(0.25, 4, 4, 128),
    Point(0.0, 8, 4, 64, "full"),
    Point(0.0, 8, 8, 64, "inference"),
    Point(0.5, 8, 8, 64, "inference"),
    Point(0.0, 8, 1, 32, "inference"),
)
"""Pruned, small and long steps among them: what a fit of one ladder at one batch could not tell apart."""
UNSEEN = (
    Point(0.0, 4, 4, 64),
    Point(0.25, 8, 8, 64),
    Point(0.6, 8, 8, 64),
    Point(0.4, 16, 4, 128),
    Point(0.0, 32, 2, 128),
    Point(0.8, 8, 16, 64),
    Point(0.0, 8, 1, 64),
    Point(0.5, 4, 1, 128),
    Point(0.3, 2, 6, 96),
    Point(0.0, 8, 12, 48),
    Point(0.5, 8, 2, 192),
    Point(0.7, 24, 3, 256),
)
"""What ``--check`` measures afterwards."""
TURNS = 2


@dataclass(frozen=True)
class Calibration:
    """A written profile and how it came out.

    Attributes:
        unseen: (predicted, measured) seconds of `UNSEEN`; empty where they were not measured.
    """

    path: Path
    fit: DeviceFit
    steps: int
    unseen: tuple[tuple[float, float], ...] = ()

    def as_text(self) -> str:
        """Two or three lines."""
        fit = self.fit
        lines = [
            f"{self.path}: {self.steps} steps, mean error {100 * np.abs(fit.residual).mean():.1f}%, each left out of "
            f"its own fit {100 * np.abs(fit.left_out).mean():.1f}%",
            f"{fit.flops_per_s / 1e9:.1f} GFLOP/s, {fit.memory_bytes_per_s / 1e9:.2f} GB/s, "
            f"{fit.seconds_per_launch * 1e6:.1f} us a launch",
        ]
        if self.unseen:
            from scipy import stats

            predicted, measured = np.array(self.unseen).T
            errors = np.abs(predicted / measured - 1.0)
            rank = float(stats.spearmanr(predicted, measured).statistic)
            lines.append(
                f"{len(self.unseen)} unseen steps: MAPE {100 * errors.mean():.1f}%, worst {100 * errors.max():.1f}%, "
                f"Spearman {rank:.3f}"
            )
        return "\n".join(lines)


def calibrate_log(log: Path, out: Path) -> Calibration:
    """Fit the step times of a log, and write the profile. Raises DataError for a log that is none or too short."""
    name = _name(out)
    rows = read_measurements(log, name, strict=False)
    fit = fit_device(rows)
    steps = [row for row in rows if row.quantity == "step_time" and not row.relative_to and row.counted]
    content = profile_content(
        name,
        f"Fitted to {len(steps)} measured steps of {log.name}.",
        fit,
        source=f"least squares over {len(steps)} steps of {log.name}",
        memory_bytes=8 * 2**30,
        memory_source="not in a log: 8 GiB taken, put in the device's own",
        cpu_ghz=1.0,
        steps=steps,
    )
    content["memory_capacity"]["status"] = "assumed"
    return _written(content, out, fit, len(steps))


def calibrate_host(
    out: Path, torch_device: str, threads: int, check: bool = False, say: Callable[[str], None] = print
) -> Calibration:
    """Time steps on this host, fit them, and write the profile.

    Args:
        check: measure `UNSEEN` afterwards, and say how far off they are.
        say: told what is being done.
    """
    from fedsim.learn.bench.host_steps import device_memory_bytes, device_name, micro_rates

    if threads < 1:
        raise ConfigError(f"--threads: value {threads} is not allowed (at least 1)")
    name = _name(out)
    say("products, streams and launches, to start from")
    start = micro_rates(torch_device, threads)
    steps = _timed(POINTS, name, torch_device, threads, say)
    fit = fit_device(steps, start)
    memory = device_memory_bytes(torch_device)
    what = f"{device_name(torch_device)}, {threads} thread{'s' if threads > 1 else ''}"
    content = profile_content(
        name,
        f"This host's {what}: {len(steps)} steps of an encoder of BERT's widths, timed and fitted.",
        fit,
        source=f"least squares over {len(steps)} steps timed by fedsim calibrate",
        memory_bytes=float(memory or _host_memory_bytes()),
        memory_source="the system's own report",
        cpu_ghz=_cpu_ghz(),
        steps=steps,
    )
    done = _written(content, out, fit, len(steps))
    if not check:
        return done
    unseen = _timed(UNSEEN, name, torch_device, threads, say)
    pairs = zip(fit.seconds(unseen).tolist(), (row.value for row in unseen), strict=True)
    return Calibration(out, fit, len(steps), tuple(pairs))


def _timed(
    points: Sequence[Point], name: str, torch_device: str, threads: int, say: Callable[[str], None]
) -> list[Measurement]:
    from fedsim.learn.bench.host_steps import time_step

    settings = [StepSetting(point.batch, point.seq_len, tuning=point.tuning) for point in points]
    least = [float("inf")] * len(points)
    # Twice in turn, and the lesser: what a busy moment of the host adds to one step it does not add to both.
    for turn in range(TURNS):
        say(f"{len(points)} steps, turn {turn + 1} of {TURNS}")
        for at, (point, setting) in enumerate(zip(points, settings, strict=True)):
            least[at] = min(least[at], time_step(SHAPE, point.ratio, point.rank, setting, torch_device, threads))
    return [
        measured_step(f"{name}-{at}", name, setting, point.rank, point.ratio, seconds)
        for at, (point, setting, seconds) in enumerate(zip(points, settings, least, strict=True))
    ]


def measured_step(id: str, device: str, setting: StepSetting, rank: int, ratio: float, seconds: float) -> Measurement:
    """A timed step of `SHAPE` as a measurement."""
    return Measurement(
        id=id,
        where="this host",
        device=device,
        mode=None,
        quantity="step_time",
        value=seconds,
        model=SHAPE.name,
        shape=SHAPE,
        setting=setting,
        rank=rank,
        prune_ratio=ratio,
        relative_to=None,
        precision=setting.precision,
        bare=False,
        counted=True,
        source="timed here",
        conditions="",
        licence="",
    )


def _written(content: dict[str, object], out: Path, fit: DeviceFit, steps: int) -> Calibration:
    parse_profile(content, out.stem)  # a fit that no profile can hold is refused before anything is written
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out, yaml.safe_dump(content, sort_keys=False, width=120))
    return Calibration(out, fit, steps)


def _name(out: Path) -> str:
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out {out}: a profile is a .yaml file")
    return out.stem


def _cpu_ghz() -> float:
    """Clock of the processor as Linux reports it; 1 where it does not."""
    try:
        found = re.search(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        return 1.0
    return float(found[1]) / 1000 if found else 1.0


def _host_memory_bytes() -> int:
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
