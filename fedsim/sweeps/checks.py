"""What can be seen to be wrong with a sweep's cells before any of them runs.

Fleet, policy, rule, rank and ratio are checked by building each combination once, without its learner; the data by
reading and splitting it once for each way of doing so; a card by counting those there are. What only training shows
(a model whose weights do not load, memory) shows in the cells.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable

from fedsim.data.corpus import load_corpus
from fedsim.data.partition import partition
from fedsim.errors import ConfigError, FedsimError
from fedsim.settings import Config
from fedsim.sweeps.cells import Cell, SweepPlan, refuse

_COUNT_CARDS = "import torch; print(torch.cuda.device_count())"


def check_cells(plan: SweepPlan, here: bool) -> None:
    """Refuse combinations that cannot run.

    Args:
        here: whether this computer runs the cells, so that they can only use its cards.
    Raises:
        ConfigError: with each reason and the combinations that it concerns.
    """
    from fedsim.runner.build import build  # heavy enough to come after the cheap checks

    faults, combinations = [], plan.combinations()
    clients = {}
    for cell in combinations:
        config = cell.config
        try:
            clients[cell.index] = build(_without_learner(config), lambda line: None).fleet.clients
        except FedsimError as error:
            faults.append((cell.combination, str(error)))
    training = [cell for cell in combinations if _trains(cell.config) and cell.index in clients]
    faults += _data_faults((cell, clients[cell.index]) for cell in training)
    if here:
        faults += _card_faults(training)
    refuse(faults, len(combinations))


def _trains(config: Config) -> bool:
    return config.train.engine not in ("none", "surrogate")


def _without_learner(config: Config) -> Config:
    if not _trains(config):
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"engine": "none"})})


def _data_faults(cells: Iterable[tuple[Cell, int]]) -> list[tuple[str, str]]:
    """Reads and splits the data once for each distinct way of doing so, with the first seed."""
    faults = []
    reasons: dict[str, str | None] = {}
    for cell, clients in cells:
        data = cell.config.data
        key = json.dumps([data.model_dump(mode="json"), clients])
        if key not in reasons:
            try:
                partition(load_corpus(data, cell.config.seed).train, data, clients, cell.config.seed)
                reasons[key] = None
            except FedsimError as error:
                reasons[key] = str(error)
        reason = reasons[key]
        if reason is not None:
            faults.append((cell.combination, reason))
    return faults


def _card_faults(cells: Iterable[Cell]) -> list[tuple[str, str]]:
    """Cells that name a card which is not there. Counted in a process of its own: torch must not start in this one."""
    named = [(cell, cell.config.train.torch_device) for cell in cells if cell.config.train.torch_device != "auto"]
    named = [(cell, name) for cell, name in named if name != "cpu"]
    if not named:
        return []
    told = subprocess.run([sys.executable, "-c", _COUNT_CARDS], capture_output=True, text=True, check=False)
    if told.returncode != 0:
        raise ConfigError("train.torch_device: torch cannot be asked for CUDA devices: " + told.stderr.strip()[-200:])
    count = int(told.stdout)
    faults = []
    for cell, name in named:
        index = re.search(r"\d+", name)
        if (int(index.group()) if index else 0) >= count:
            reason = f"train.torch_device: value '{name}' is not allowed here (CUDA devices found: {count})"
            faults.append((cell.combination, reason))
    return faults
