"""A surrogate model written by hand: what a fit would find, without a run."""

from __future__ import annotations

from typing import Any

from fedsim.learn.standins.surrogate_model import SurrogateModel

TREE: dict[str, Any] = {
    "kind": "fedsim surrogate",
    "schema_version": 1,
    "source": {
        "config_hash": "abcdef0123456789" * 4,
        "method": "fedspine",
        "prunes": True,
        "model": "tiny",
        "model_sha256": "1" * 64,
        "data": "synthetic",
        "data_sha256": "2" * 64,
        "clients": 80,
        "rounds": 30,
        "settings": {"train.local_steps": 5, "aggregate.rule": "lowrank"},
    },
    "seen": {
        "ratio": [0.0, 0.8],
        "rank": [2.0, 16.0],
        "participants": [80.0, 80.0],
        "dose": [0.0, 15.5],
        "loss_before": [0.001, 5.0],
        "loss_after": [0.001, 5.0],
    },
    "first_dose": 0.025,
    "curve": {"start": -0.37, "drop": 0.4, "tail": 0.55, "damage": 1.5, "half": 3.1, "power": 4.0},
    "contribution": {"rank_reference": 6.0, "rank_slope": 0.2},
    "local": {"advance": 1.0, "least_spread": 0.2, "level": -0.08, "change": 0.9, "deviation": -0.2, "cut": 0.5},
    "noise": {"client": 0.4, "before": 0.3, "after": 0.5},
    "tests": {
        "loss": {"level": -0.5, "progress": 0.5, "tail": 0.1, "damage": 0.3},
        "accuracy": {"level": 0.5, "progress": 0.8, "tail": 0.3, "damage": 0.9},
        "accuracy_consensus": {"level": 0.5, "progress": 0.8, "tail": 0.3, "damage": 0.5},
    },
    "importance": {"rank": -0.5, "ratio": 1.9, "loss": 0.1, "noise": 0.7},
    "quality": {},
    "notes": [],
}


def made_up_model(**parts: Any) -> SurrogateModel:
    """The hand-written model; `parts` replace top-level parts."""
    return SurrogateModel.model_validate({**TREE, **parts})
