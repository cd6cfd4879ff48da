"""What a machine can do to a run: memory that runs out, a device that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedsim.errors import ResourceError

_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of torch, on a card or on the host, found no room."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The processor's allocator, pinned memory and cuBLAS raise errors of their own kinds.
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


@contextmanager
def device_faults(device: torch.device) -> Iterator[None]:
    """Turn a failure of the device into one sentence. What lies on disk is not touched: the last checkpoint stands.

    Raises:
        ResourceError: the device failed.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error) or not _is_fault(error):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ResourceError(
            f"the torch device '{device}' failed ({first}): the run stops at its last checkpoint, from which --resume "
            "goes on"
        ) from error


def _is_fault(error: RuntimeError) -> bool:
    # Older kinds of failure come as plain RuntimeErrors.
    return isinstance(error, torch.AcceleratorError) or str(error).startswith(
        ("CUDA error", "cuDNN error", "NCCL error")
    )
