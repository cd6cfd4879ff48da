"""Which client holds which training row.

A partition is a tuple of index arrays, one per client: every row belongs to exactly one client, and no client is empty.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from fedsim.data.labelled import LabelledText
from fedsim.errors import DataError
from fedsim.rng import Stream, generator
from fedsim.settings import DataSettings

Shares = list[NDArray[np.int64]]


def _cut(rows: NDArray[np.int64], shares: NDArray[np.float64]) -> Shares:
    """`rows` in consecutive pieces whose sizes are the given shares (which sum to one), rounded cumulatively."""
    edges = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
    return np.split(rows, edges)


def _iid(labels: NDArray[np.int64], clients: int, rng: np.random.Generator) -> Shares:
    return np.array_split(rng.permutation(len(labels)), clients)


def _fill_empty(shares: Shares) -> Shares:
    """Give every empty client one row of the client that holds most (the lowest index on ties)."""
    sizes = np.array([len(share) for share in shares])
    for client in np.flatnonzero(sizes == 0):
        giver = int(np.argmax(sizes))
        shares[client], shares[giver] = shares[giver][-1:], shares[giver][:-1]
        sizes[client], sizes[giver] = 1, sizes[giver] - 1
    return shares


def _dirichlet(labels: NDArray[np.int64], clients: int, alpha: float, rng: np.random.Generator) -> Shares:
    """The rows of each label go to the clients in shares drawn from Dirichlet(alpha), as in 2102.02079, section III."""
    shares: list[Shares] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        for client, piece in enumerate(_cut(rows, rng.dirichlet(np.full(clients, alpha)))):
            shares[client].append(piece)
    return _fill_empty([np.concatenate(pieces) for pieces in shares])


def _few_values(groups: Shares, clients: int) -> Shares:
    """At most as many values as clients: each value gets clients in proportion to its rows (D'Hondt), at least one."""
    seats = np.ones(len(groups), dtype=np.int64)
    queue = [(-len(rows) / 2, value) for value, rows in enumerate(groups) if len(rows) > 1]
    heapq.heapify(queue)
    for _ in range(clients - len(groups)):
        _, value = heapq.heappop(queue)
        seats[value] += 1
        if seats[value] < len(groups[value]):
            heapq.heappush(queue, (-len(groups[value]) / (seats[value] + 1), value))
    return [piece for rows, count in zip(groups, seats, strict=True) for piece in np.array_split(rows, count)]


def _many_values(groups: Shares, clients: int) -> Shares:
    """More values than clients: whole values, the largest first, each to the client with the fewest rows so far."""
    held: list[Shares] = [[] for _ in range(clients)]
    queue = [(0, client) for client in range(clients)]
    for value in sorted(range(len(groups)), key=lambda value: -len(groups[value])):
        size, client = heapq.heappop(queue)
        held[client].append(groups[value])
        heapq.heappush(queue, (size + len(groups[value]), client))
    return [np.concatenate(pieces) for pieces in held]


def _by_field(fields: tuple[str, ...], clients: int, rng: np.random.Generator) -> Shares:
    names, value_of_row = np.unique(np.array(fields, dtype=object).astype(str), return_inverse=True)
    values = rng.permutation(len(names))
    groups = [rng.permutation(np.flatnonzero(value_of_row == value)) for value in values]
    return (_few_values if len(groups) <= clients else _many_values)(groups, clients)


def partition(
    corpus_train: LabelledText, settings: DataSettings, clients: int, seed: int
) -> tuple[NDArray[np.int64], ...]:
    """The training rows of each client, ascending; a function of the arguments alone.

    ``iid`` shuffles and deals equal shares. ``dirichlet`` draws, for each label, the clients' shares of its rows from
    Dirichlet(``alpha``), so that clients differ in size and in labels; the paper (FedSpine, arXiv 2501.02438) names the
    method but not alpha, and leaves empty clients open: here such a client takes one row of the largest one. ``field``
    splits by the values of a column: whole values per client where there are more values than clients, else each
    value's rows are shared by clients of its own, in number proportional to its rows.

    Args:
        clients: number of clients, >= 1.

    Raises:
        DataError: fewer rows than clients, or ``data.partition: field`` without the column.
    """
    if len(corpus_train) < clients:
        raise DataError(
            f"fleet.clients is {clients}, but the training data has {len(corpus_train)} rows: "
            "every client needs at least one row"
        )
    rng = generator(seed, Stream.PARTITION)
    if settings.partition == "iid":
        shares = _iid(corpus_train.labels, clients, rng)
    elif settings.partition == "dirichlet":
        shares = _dirichlet(corpus_train.labels, clients, settings.alpha, rng)
    elif corpus_train.fields is None:
        raise DataError("data.partition is 'field', but data.field is not set: name the column to split by")
    else:
        shares = _by_field(corpus_train.fields, clients, rng)
    return tuple(np.sort(share).astype(np.int64) for share in shares)
