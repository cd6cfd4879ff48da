"""The event log of a run: one record per change of state, in columns, with a hash that identifies the run.

The hash is chained: the digest of a block (what happened between two merges) covers the digest before it and the
block's own records. A run that resumes from a checkpoint therefore needs the last digest only, and ends with the digest
of an uninterrupted run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray, Labels

SERVER = -1
"""The client number of the server's own records."""

START_HASH = "0" * 64
"""The digest before the first record."""


class Event(IntEnum):
    """What changed, and what `value` then holds. The numbers order ties and enter the hash: only add."""

    ROUND_OPEN = 0  # clients sent off
    MODE = 1  # index of the power mode that holds from now on
    DOWNLOAD_START = 2  # bytes to come
    DOWNLOAD_END = 3  # bytes received
    OUT_OF_MEMORY = 4  # peak bytes that the job would need
    COMPUTE_END = 5  # seconds computed
    UPLOAD_END = 6  # bytes sent
    LATE = 7  # phases completed when it was given up: 0 none, 1 download, 2 compute
    ROUND_CLOSE = 8  # updates that were merged
    DROPPED = 9  # phases completed when the client dropped out: 0 none, 1 download, 2 compute


_KINDS = ("<f8", "<i8", "<i8", "<i8", "<f8")
_NAMES = np.array([event.name.lower() for event in Event])


@dataclass(frozen=True, eq=False)
class TraceBlock:
    """The records between two merges, shape (records,), ordered by time, then event, then client.

    Attributes:
        client: `SERVER` (-1) for the server's own records.
        code: numbers of `Event`.
        digest: hexadecimal SHA-256 over all records of the run up to and with this block.
    """

    time_s: FloatArray
    round: IntArray
    client: IntArray
    code: IntArray
    value: FloatArray
    digest: str

    @property
    def event(self) -> Labels:
        """Names of the events, in lower case."""
        return Labels(self.code, _NAMES)

    def columns(self) -> Mapping[str, np.ndarray | Labels]:
        """The block as named columns, as the records writer takes them."""
        return {
            "time_s": self.time_s,
            "round": self.round,
            "client": self.client,
            "event": self.event,
            "value": self.value,
        }


class Trace:
    """Collects records and hands them out in blocks.

    Args:
        digest: the hash so far, 64 hexadecimal digits (a resumed run's last one).
    """

    def __init__(self, digest: str = START_HASH) -> None:
        self._digest = digest
        self._columns: list[tuple[np.ndarray, ...]] = []

    @property
    def digest(self) -> str:
        """The hash up to the last block taken."""
        return self._digest

    def add_many(
        self, time_s: FloatArray, round_index: int, clients: IntArray, event: Event, values: FloatArray
    ) -> None:
        """Record the same kind of change of several clients, shape (P,) each."""
        if len(clients):
            codes = np.full(len(clients), int(event))
            self._columns.append((time_s, np.full(len(clients), round_index), clients, codes, values))

    def take_block(self) -> TraceBlock:
        """Close the block: order its records, extend the hash, and forget them.

        Ties in time are ordered by event and client, not by the order in which the event loop happened to run.
        """
        chunks, self._columns = self._columns, []
        chunks.sort(key=lambda chunk: int(chunk[3][0]))
        columns = [
            np.concatenate([np.empty(0, kind), *(chunk[place] for chunk in chunks)]).astype(kind, copy=False)
            for place, kind in enumerate(_KINDS)
        ]
        order = _order(columns[0], columns[2], columns[3])
        time_s, round_index, client, code, value = (column[order] for column in columns)
        digest = hashlib.sha256(bytes.fromhex(self._digest))
        for column in (time_s, round_index, client, code, value):
            digest.update(column.data)
        self._digest = digest.hexdigest()
        return TraceBlock(time_s, round_index, client, code, value, self._digest)


def _order(time_s: FloatArray, client: IntArray, code: IntArray) -> IntArray:
    """Places by time, then event, then client."""
    more = np.diff(code)
    # What whole rounds add is in order but for the time: one stable sort instead of three.
    if np.all((more > 0) | ((more == 0) & (np.diff(client) > 0))):
        return np.argsort(time_s, kind="stable")
    return np.lexsort((client, code, time_s))
