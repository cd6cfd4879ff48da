"""How many clients are trained together: jobs that go together, in chunks that fit the memory.

The chunk follows from configuration and machine alone, never from what else happens to run there, so that a repeated
or resumed run adds up in the same order. Where the memory runs out all the same, the chunk is halved, once and for all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from fedsim.errors import ResourceError
from fedsim.learn.cohort.stack import base_key
from fedsim.learn.faults import is_out_of_memory
from fedsim.learn.train.jobs import Job

_LOG = logging.getLogger(__name__)


def cohorts(jobs: Sequence[Job]) -> list[list[int]]:
    """Places of the jobs that run alike (same program), those of like structure beside each other.

    Jobs of several versions of the global adapter go together, unless updates were merged into their frozen weights.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for place, job in enumerate(jobs):
        key = (base_key(job.adapter), job.request.program)
        alike.setdefault(key, []).append(place)

    def size(place: int) -> tuple[int, int, float]:
        job = jobs[place]
        return int(job.start.channels_kept.sum()), int(job.start.heads_kept.sum()), -job.request.ratio_asked

    return [sorted(places, key=size, reverse=True) for places in alike.values()]


class ChunkPlan:
    """Cuts a cohort into chunks.

    Attributes:
        limit: clients of a chunk at most; shrinks where memory runs out.
        chunks: how many were trained.
    """

    def __init__(self, limit: int) -> None:
        self.limit = max(1, limit)
        self.chunks = 0

    def run(self, places: Sequence[int], work: Callable[[Sequence[int]], None]) -> None:
        """Call `work` for chunk after chunk; a chunk that meets out-of-memory is run again in halves.

        Raises:
            ResourceError: one client alone does not fit.
        """
        start = 0
        while start < len(places):
            # Even chunks: of 17 clients at 16 a time, 9 and 8.
            chunks = -(-(len(places) - start) // self.limit)
            chunk = places[start : start + -(-(len(places) - start) // chunks)]
            try:
                work(chunk)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(chunk) == 1:
                    raise _too_large(error) from error
            else:
                start += len(chunk)
                self.chunks += 1
                continue
            # Not before the error is gone: its traceback holds what the chunk has taken.
            self._shrink(len(chunk))

    def _shrink(self, clients: int) -> None:
        self.limit = clients // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _LOG.warning("out of memory with %d clients at once: from here on at most %d", clients, self.limit)


def _too_large(error: BaseException) -> ResourceError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ResourceError(
        f"one client alone does not fit into memory ({reason}): take a smaller train.batch_size, train.max_length or "
        "model"
    )
