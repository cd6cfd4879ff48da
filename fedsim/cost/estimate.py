"""One step of a model on a device in numbers: what ``fedsim estimate`` prints."""

from __future__ import annotations

from typing import Any

from fedsim.contracts.common import FloatArray
from fedsim.cost.bands import band, step_seconds
from fedsim.cost.device import DeviceProfile, load_profile, rates_of
from fedsim.cost.seconds import ComputeTime, busy_energy_joules, compute_time, fits_memory
from fedsim.cost.setting import TRAINED_BYTES, StepSetting, kept_sums
from fedsim.cost.shapes import load_shape
from fedsim.cost.widths import trained_weights
from fedsim.cost.workload import step_work
from fedsim.errors import ConfigError
from fedsim.structure import ModelShape, kept_counts, largest_ratio

__all__ = [
    "ComputeTime",
    "busy_energy_joules",
    "compute_time",
    "estimate",
    "estimate_step",
    "fits_memory",
]


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
        The keys of ``fedsim estimate --json``, in their order; the step time's band is that of `fedsim.cost.bands`,
        `upload_bytes` one update (0 in inference).
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
    low_s, high_s = band(step_seconds(profile, work, mode, setting.precision))
    return {
        "step_time_s": total_s,
        "step_time_low_s": min(low_s, total_s),
        "step_time_high_s": max(high_s, total_s),
        "compute_s": float(time.compute_s),
        "memory_s": float(time.memory_s),
        "launch_s": float(time.launch_s),
        "peak_memory_bytes": float(work.peak_memory_bytes),
        "energy_j": float(busy_energy_joules(time.total_s, rates)),
        "flops": float(work.flops),
        "memory_bytes": float(work.memory_bytes),
        "upload_bytes": _upload_bytes(shape, setting, *fractions, lora_rank),
        "fits_memory": bool(fits_memory(work.peak_memory_bytes, rates)),
        "samples_per_s": setting.samples / total_s,
    }


def estimate(
    *,
    device: str,
    model: str,
    batch_size: int,
    seq_len: int,
    mode: str | None = None,
    lora_rank: int = 8,
    prune_ratio: float = 0.0,
    causal_lm: bool = False,
    **setting: Any,
) -> dict[str, float | bool]:
    """`estimate_step` by names: what ``fedsim estimate`` calls.

    Args:
        device: a built-in device, or the path of a profile's YAML file.
        model: see `fedsim.cost.shapes.load_shape`.
        causal_lm: the model predicts tokens; False: it classifies.
        setting: further fields of `fedsim.cost.setting.StepSetting`.
    """
    if setting.get("tuning") == "inference" and setting.get("train_top_layers") is not None:
        raise ConfigError(
            f"train_top_layers is {setting['train_top_layers']}; it is not allowed in inference, which trains nothing"
        )
    step = StepSetting(batch_size, seq_len, **setting)
    shape = load_shape(model, labels=0 if causal_lm else 2)
    return estimate_step(load_profile(device), shape, step, mode, lora_rank, prune_ratio)


def _upload_bytes(
    shape: ModelShape, setting: StepSetting, heads: FloatArray, channels: FloatArray, lora_rank: int
) -> float:
    if setting.tuning == "inference":
        return 0.0
    kept = kept_sums(shape, setting, heads, channels)
    return float(TRAINED_BYTES * trained_weights(shape, setting, kept, lora_rank))
