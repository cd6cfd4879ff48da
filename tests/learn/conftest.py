"""Fixtures over the tiny random checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import ARCHITECTURES, make_padded_batch, save_tiny

from fedsim.learn.model.backbone import Backbone, load_backbone
from fedsim.settings import ModelSettings


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_folder(architecture, layers=2, **options of the model class)``: a folder as `save_tiny` writes it."""

    def make(architecture: str, **options: Any) -> Path:
        return save_tiny(architecture, tmp_path_factory.mktemp(architecture), **options)

    return make


@pytest.fixture(scope="session")
def tiny_folders(make_folder: Callable[..., Path]) -> dict[str, Path]:
    """One folder per architecture. LLaMA has 4 query heads on 2 key-value heads."""
    return {architecture: make_folder(architecture) for architecture in ARCHITECTURES}


@pytest.fixture(scope="session")
def make_backbone(tiny_folders: dict[str, Path]) -> Callable[..., Backbone]:
    """``make_backbone(architecture, attention="sdpa", pooling="native", dtype=torch.float64, labels=3)``."""

    def make(
        architecture: str,
        attention: str = "sdpa",
        pooling: str = "native",
        dtype: torch.dtype = torch.float64,
        labels: int = 3,
    ) -> Backbone:
        settings = ModelSettings(name=str(tiny_folders[architecture]), pooling=pooling)
        backbone = load_backbone(settings, labels, seed=3, device=torch.device("cpu"), attention=attention)
        backbone.model.to(dtype)
        return backbone

    return make


@pytest.fixture(scope="session")
def padded_batch() -> dict[str, torch.Tensor]:
    """Five rows of 3 to 11 tokens, padded on the right with token 1."""
    return make_padded_batch()
