"""What objectives with memory remember: the server's set of tensors, and one of each client whose update was merged.

A set has the shapes of the global adapter (factors and head, fp32) and is held as one row: 4 bytes a trained weight and
client, for clients that took part. See `fedsim.contracts.program.RememberingObjective`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.contracts.common import State
from fedsim.contracts.learning import LocalRequest
from fedsim.contracts.program import Trained
from fedsim.errors import ConfigError
from fedsim.learn.model.adapter import Adapter
from fedsim.learn.store import Rows
from fedsim.learn.train.jobs import Update
from fedsim.learn.train.objective import as_trained, remembering


class ObjectiveMemory:
    """Sets of tensors by client, empty until an objective remembers something.

    Args:
        adapter: the first global adapter, whose shapes all sets have.
        clients: of the whole fleet.
    """

    def __init__(self, adapter: Adapter, clients: int) -> None:
        self._zero = as_trained(adapter).mapped(torch.zeros_like)
        self._clients = clients
        width = sum(tensor.numel() for tensor in self._zero.tensors())
        self._own = Rows(width, np.float32)
        self._nothing = np.zeros(width, dtype=np.float32)
        self._shared = self._nothing

    def carried(self, request: LocalRequest, whole: bool) -> Trained | None:
        """What a client takes along in a job; None where the job's objective remembers nothing.

        Args:
            whole: whether the client keeps every group.
        Raises:
            ConfigError: the model is pruned, or the client has another rank than the global adapter.
        """
        objective = remembering(request.program.objective)
        if objective is None:
            return None
        rank = next(self._zero.tensors()).shape[1]
        if request.program.cuts or not whole or request.rank != rank:
            raise ConfigError(
                f"the objective {type(objective).__name__} remembers tensors like the global adapter's, so its method "
                f"must prune nothing and give every client the global rank {rank} (client {request.client} has rank "
                f"{request.rank})"
            )
        own = self._own.get(request.client)
        return objective.carried(self._set(self._shared), self._set(self._nothing if own is None else own))

    def merge(self, clients: Iterable[int], updates: Iterable[Update]) -> None:
        """Keep what merged clients remember, and let the server's set follow."""
        change, objective = np.zeros_like(self._shared), None
        for client, update in zip(clients, updates, strict=True):
            if update.remembered is None:
                continue
            objective, new, old = update.remembered.objective, _row(update.remembered.kept), self._own.get(client)
            change += new if old is None else new - old
            self._own.put(client, new)
        if objective is not None:
            shared = objective.merged(self._set(self._shared), self._set(change), self._clients)
            self._shared = _row(shared)

    def state(self) -> State:
        """Arrays for the checkpoint; none before anything is remembered."""
        if not len(self._own):
            return {}
        clients, rows = self._own.arrays()
        return {"memory_clients": clients, "memory_rows": rows, "memory_shared": self._shared.copy()}

    def restore(self, state: State) -> None:
        """Take what `state` gave."""
        if "memory_clients" in state:
            self._own.refill(state["memory_clients"], state["memory_rows"])
            self._shared = np.array(state["memory_shared"])

    def _set(self, row: NDArray[np.float32]) -> Trained:
        parts = iter(torch.from_numpy(np.array(row)).split([tensor.numel() for tensor in self._zero.tensors()]))
        return self._zero.mapped(lambda zero: next(parts).view(zero.shape).to(zero.device))


def _row(tensors: Trained) -> NDArray[np.float32]:
    row: NDArray[np.float32] = torch.cat([tensor.flatten() for tensor in tensors.tensors()]).float().cpu().numpy()
    return row
