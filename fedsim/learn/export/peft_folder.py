"""The global adapter on disk, in the format that PEFT reads.

``adapter_config.json`` and ``adapter_model.safetensors`` load onto the plain base model
(``PeftModel.from_pretrained(AutoModel.from_pretrained(name), folder)``); the classification head lies beside them in
``head.safetensors``, by its parameter names (PEFT has no place for a head that is not part of the base model). A
language model has no such head; its adapter loads onto ``AutoModelForCausalLM``, which is given as the task's type.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save

from fedsim.errors import RunError
from fedsim.learn.model.adapter import Adapter
from fedsim.learn.model.backbone import Backbone
from fedsim.settings import ModelSettings


def write_peft_folder(folder: Path, backbone: Backbone, adapter: Adapter, settings: ModelSettings) -> None:
    """Write an adapter of full width. What is in the folder is replaced.

    Raises:
        RunError: the folder cannot be written.
    """
    is_language_model = backbone.shape.is_language_model
    # There the base model is one module of the whole.
    prefix = f"{backbone.encoder.base_model_prefix}." if is_language_model else ""
    tensors = {}
    for name, (a, b) in adapter.factors.items():
        tensors[f"base_model.model.{prefix}{name}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"base_model.model.{prefix}{name}.lora_B.weight"] = b.cpu().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_language_model else "FEATURE_EXTRACTION",
        "base_model_name_or_path": settings.name,
        "r": adapter.rank,
        "lora_alpha": settings.lora_alpha_over_rank * adapter.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(f"{prefix}{name}" for name in adapter.factors),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        head = {name: tensor.cpu().contiguous() for name, tensor in adapter.head.items()}
        (folder / "adapter_model.safetensors").write_bytes(save(tensors))
        if head:
            (folder / "head.safetensors").write_bytes(save(head))
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write adapter folder '{folder}': {error.strerror or error}") from error
