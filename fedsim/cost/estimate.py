"""From what a job asks and what a device delivers to seconds and joules.

``T = F / (eta P) + B / (beta BW) + launches * a / f_cpu``, additive: on the published steps that fitted better than
the larger of the three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedsim.contracts.common import FloatArray
from fedsim.cost.device import DeviceProfile, Rates, load_profile, rates_of
from fedsim.cost.shapes import load_shape
from fedsim.cost.workload import (
    TRAINED_BYTES,
    Precision,
    StepSetting,
    Tuning,
    kept_sums,
    lora_weights,
    step_work,
    tuned_weights,
)
from fedsim.errors import ConfigError, ProfileError
from fedsim.structure import ModelShape, kept_counts, largest_ratio


class ComputeWork(Protocol):
    """What `compute_time` reads: of `fedsim.contracts.control.Work` and of `fedsim.cost.workload.StepWork`."""

    @property
    def flops(self) -> FloatArray: ...

    @property
    def memory_bytes(self) -> FloatArray: ...

    @property
    def launches(self) -> FloatArray: ...


@dataclass(frozen=True, eq=False)
class ComputeTime:
    """Seconds of arithmetic, of memory traffic and of launching kernels; they add up."""

    compute_s: FloatArray
    memory_s: FloatArray
    launch_s: FloatArray

    @property
    def total_s(self) -> FloatArray:
        """Their sum."""
        return self.compute_s + self.memory_s + self.launch_s


def compute_time(work: ComputeWork, rates: Rates) -> ComputeTime:
    """Seconds that `work` takes at `rates`; shapes broadcast.

    Raises:
        ProfileError: a rate that is not positive and finite.
        ValueError: a time that is not positive and finite (work without operations, bytes or launches).
    """
    for field in ("flops_per_s", "memory_bytes_per_s", "seconds_per_launch"):
        rate = np.asarray(getattr(rates, field))
        if not (np.isfinite(rate).all() and (rate > 0).all()):
            raise ProfileError(f"{field} is {rate}; it must be positive and finite")
    time = ComputeTime(
        np.asarray(work.flops / rates.flops_per_s),
        np.asarray(work.memory_bytes / rates.memory_bytes_per_s),
        np.asarray(work.launches * rates.seconds_per_launch),
    )
    total = time.total_s
    if not (np.isfinite(total).all() and (total > 0).all()):
        raise ValueError(f"compute time must be positive and finite, not {total}")
    return time


def busy_energy_joules(time_s: FloatArray, rates: Rates) -> FloatArray:
    """Energy of a busy board: the mode's power times busy time."""
    return np.asarray(time_s * rates.busy_power_watts)


def fits_memory(peak_memory_bytes: FloatArray, rates: Rates) -> FloatArray:
    """Whether a peak fits the board's memory less its reserve (boolean array)."""
    return np.asarray(peak_memory_bytes <= rates.usable_memory_bytes)


def estimate_step(
    profile: DeviceProfile,
    shape: ModelShape,
    setting: StepSetting,
    mode: str | None = None,
    lora_rank: int = 8,
    prune_ratio: float = 0.0,
) -> dict[str, float | bool]:
    """One local step (or one forward pass) of a model on a device, at a structure that does not change.

    Args:
        mode: power mode; None: the fastest.
        lora_rank: rank on every prunable Linear of the trained layers; read in LoRA tuning only.
        prune_ratio: pruning ratio of every layer, in [0, the shape's largest].
    Returns:
        The keys of ``fedsim estimate --json``, in their order; `upload_bytes` is one update (0 in inference).
    Raises:
        ConfigError, ProfileError: a value out of range, an unknown mode.
    """
    highest = largest_ratio(shape)
    if not 0.0 <= prune_ratio <= highest:
        raise ConfigError(
            f"prune_ratio is {prune_ratio:g}; {shape.name} allows 0 to {highest:.4f} (one head and one channel stay)"
        )
    if setting.tuning == "lora" and not 1 <= lora_rank <= min(shape.hidden, shape.ffn):
        raise ConfigError(f"lora_rank is {lora_rank}; {shape.name} allows 1 to {min(shape.hidden, shape.ffn)}")
    heads, channels = kept_counts(shape, prune_ratio)
    fractions = (heads / shape.head_groups)[None], (channels / shape.ffn)[None]
    work = step_work(shape, *fractions, lora_rank, setting)
    rates = rates_of(profile, mode, setting.precision)
    time = compute_time(work, rates)
    total_s = float(time.total_s)
    return {
        "step_time_s": total_s,
        "compute_s": float(time.compute_s),
        "memory_s": float(time.memory_s),
        "launch_s": float(time.launch_s),
        "peak_memory_bytes": float(work.peak_memory_bytes),
        "energy_j": float(busy_energy_joules(time.total_s, rates)),
        "flops": float(work.flops),
        "memory_bytes": float(work.memory_bytes),
        "upload_bytes": _upload_bytes(shape, setting, *fractions, lora_rank),
        "fits_memory": bool(fits_memory(work.peak_memory_bytes, rates)),
        "samples_per_s": setting.batch_size / total_s,
    }


def estimate(
    *,
    device: str,
    model: str,
    batch_size: int,
    seq_len: int,
    mode: str | None = None,
    tuning: Tuning = "lora",
    lora_rank: int = 8,
    train_top_layers: int | None = None,
    prune_ratio: float = 0.0,
    precision: Precision = "fp32",
) -> dict[str, float | bool]:
    """`estimate_step` by names: what ``fedsim estimate`` calls.

    Args:
        device: a built-in device, or the path of a profile's YAML file.
        model: see `fedsim.cost.shapes.load_shape`.
    """
    if tuning == "inference" and train_top_layers is not None:
        raise ConfigError(
            f"train_top_layers is {train_top_layers}; it is not allowed in inference, which trains nothing"
        )
    setting = StepSetting(batch_size, seq_len, precision, tuning, train_top_layers)
    return estimate_step(load_profile(device), load_shape(model), setting, mode, lora_rank, prune_ratio)


def _upload_bytes(
    shape: ModelShape, setting: StepSetting, heads: FloatArray, channels: FloatArray, lora_rank: int
) -> float:
    if setting.tuning == "inference":
        return 0.0
    kept = kept_sums(shape, setting, heads, channels)
    lora = setting.tuning == "lora"
    trained = lora_weights(shape, kept, lora_rank) if lora else tuned_weights(shape, setting, kept)
    return float(TRAINED_BYTES * (trained + shape.head_weights))
