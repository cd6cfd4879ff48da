"""What the learner holds of every client that has taken part: the groups it keeps, and its averaged group scores.

Rows of growing arrays, not objects: masks one bit per group, scores in float32. With roberta-base that is 4.6 KB and
148 KB a client; a client that never took part holds nothing. Getting and putting a row does not depend on how many
there are, and neither does the fleet's mean: its sum is kept up to date, new score in, old score out.

What we chose:

* Local training averages scores in float64; between rounds they are rounded to float32 (6e-8 of the value). Groups
  closer than that may change places in a ranking; a resumed run sees the same rounded scores as one that went on.
* The sum is held in float64 and taken anew from all rows after as many replacements as there are rows: still a constant
  cost per update in the mean, and the error stays below ``3 n 2**-53`` of the largest sum held in between
  (n clients; 3e-13 for 1000). It belongs to the state, so that a resumed run goes on to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fedsim.contracts.common import FloatArray, State
from fedsim.learn.train.importance import GroupScores
from fedsim.structure import ModelShape, Structure

_BLOCK_BYTES = 1 << 20
"""Rows are added in blocks of about this size (a row at least): no row is ever moved, and little room is unused."""


class Rows:
    """One row of fixed width per client, in the order in which clients first came."""

    def __init__(self, width: int, dtype: DTypeLike) -> None:
        self._width, self._dtype = width, np.dtype(dtype)
        self._per_block = max(1, _BLOCK_BYTES // (width * self._dtype.itemsize))
        self._places: dict[int, int] = {}
        self._blocks: list[NDArray[Any]] = []

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, client: int) -> bool:
        return client in self._places

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, used or not."""
        return sum(block.nbytes for block in self._blocks)

    def get(self, client: int) -> NDArray[Any] | None:
        """The client's row (a view: write through `put`); None if it has none."""
        place = self._places.get(client)
        return None if place is None else self._blocks[place // self._per_block][place % self._per_block]

    def put(self, client: int, values: NDArray[Any]) -> None:
        """Write the client's row."""
        place = self._places.setdefault(client, len(self._places))
        if place == len(self._blocks) * self._per_block:
            self._blocks.append(np.empty((self._per_block, self._width), dtype=self._dtype))
        self._blocks[place // self._per_block][place % self._per_block] = values

    def total(self) -> FloatArray:
        """Sum over clients in float64, shape (width,): a function of the rows and their order alone."""
        total = np.zeros(self._width)
        for used in self._used():
            total += used.sum(axis=0, dtype=np.float64)
        return total

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Clients (n,) and rows (n, width)."""
        clients = np.fromiter(self._places, dtype=np.int64, count=len(self))
        return clients, np.concatenate([np.empty((0, self._width), dtype=self._dtype), *self._used()])

    def refill(self, clients: NDArray[np.int64], rows: NDArray[Any]) -> None:
        """Take what `arrays` gave."""
        self._places = {client: place for place, client in enumerate(clients.tolist())}
        self._blocks = []
        for start in range(0, len(clients), self._per_block):
            block = np.empty((self._per_block, self._width), dtype=self._dtype)
            part = rows[start : start + self._per_block]
            block[: len(part)] = part
            self._blocks.append(block)

    def _used(self) -> list[NDArray[Any]]:
        left = len(self)
        return [block[: left - index * self._per_block] for index, block in enumerate(self._blocks)]


class ClientStore:
    """Structures and averaged scores by client number. See the module."""

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        self._head_total = shape.layers * shape.head_groups
        groups = self._head_total + shape.layers * shape.ffn
        self._bits = Rows((groups + 7) // 8, np.uint8)
        self._scores = Rows(groups, np.float32)
        self._sum = np.zeros(groups)
        self._replaced = 0

    def __contains__(self, client: int) -> bool:
        """Whether anything is held for the client."""
        return client in self._bits or client in self._scores

    @property
    def nbytes(self) -> int:
        """Bytes held for clients: blocks of rows, and the running sum."""
        return self._bits.nbytes + self._scores.nbytes + self._sum.nbytes

    def structure(self, client: int) -> Structure:
        """The groups that the client keeps; all of them if it never took part."""
        row = self._bits.get(client)
        if row is None:
            return Structure.full(self._shape)
        flat = np.unpackbits(row, count=len(self._sum)).view(np.bool_)
        heads, channels = self._split(flat)
        return Structure(heads, channels)

    def put_structure(self, client: int, structure: Structure) -> None:
        """Keep the client's structure."""
        self._bits.put(client, np.packbits(np.concatenate([structure.head_mask, structure.channel_mask], axis=None)))

    def scores(self, client: int) -> GroupScores | None:
        """The client's averaged scores, in float64 but rounded to float32; None before its first."""
        row = self._scores.get(client)
        return None if row is None else GroupScores(*self._split(row.astype(np.float64)))

    def put_scores(self, client: int, scores: GroupScores) -> None:
        """Keep the client's averaged scores, and bring the fleet's sum up to date.

        Raises:
            ValueError: a score that is not finite in float32.
        """
        with np.errstate(over="ignore"):
            new = np.concatenate([scores.heads, scores.channels], axis=None).astype(np.float32)
        if not np.isfinite(new).all():
            raise ValueError(f"client {client}: averaged group scores must be finite, below 3.4e38 in magnitude")
        old = self._scores.get(client)
        change = new.astype(np.float64)
        if old is not None:
            change -= old
            self._replaced += 1
        self._scores.put(client, new)
        self._sum += change
        if self._replaced >= len(self._scores):
            self._sum, self._replaced = self._scores.total(), 0

    def fleet_scores(self) -> GroupScores | None:
        """The mean over all clients that have scores; None before the first."""
        if not len(self._scores):
            return None
        return GroupScores(*self._split(self._sum / len(self._scores)))

    def state(self) -> State:
        """Arrays for the checkpoint: rows of the clients that took part, no others."""
        structure_clients, bits = self._bits.arrays()
        score_clients, scores = self._scores.arrays()
        return {
            "structure_clients": structure_clients,
            "structure_bits": bits,
            "score_clients": score_clients,
            "scores": scores,
            "score_sum": self._sum.copy(),
            "score_replaced": np.array(self._replaced, dtype=np.int64),
        }

    def restore(self, state: State) -> None:
        """Take what `state` gave."""
        self._bits.refill(state["structure_clients"], state["structure_bits"])
        self._scores.refill(state["score_clients"], state["scores"])
        self._sum = np.array(state["score_sum"], dtype=np.float64)
        self._replaced = int(state["score_replaced"])

    def _split(self, flat: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Heads (layers, head_groups) and channels (layers, ffn) of one row."""
        layers = self._shape.layers
        return flat[: self._head_total].reshape(layers, -1), flat[self._head_total :].reshape(layers, -1)
