"""Running out of memory, on a GPU and on a CPU: how it is recognised, and what it is turned into."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

import torch

from runner.errors import RunnerError

_SAID = (
    "DefaultCPUAllocator: can't allocate memory",  # torch, c10/core/impl/alloc_cpu.cpp
    "CUDA error: out of memory",  # allocated past torch's own allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What a RuntimeError of a full memory says."""

_SAID_UNDER_A_LIMIT = ("could not create a primitive", "could not create a memory object")
"""What oneDNN says of it and of other things: a full memory only where this process has a limit."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory is full.

    torch.OutOfMemoryError                              a GPU, by torch's allocator
    MemoryError                                         Python, NumPy, Arrow, C++ under an rlimit
    RuntimeError that says one of `_SAID`               torch on a CPU; CUDA's libraries
    RuntimeError that says `_SAID_UNDER_A_LIMIT`        oneDNN, if there is an rlimit
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = (*_SAID, *_SAID_UNDER_A_LIMIT) if _is_limited() else _SAID
    return isinstance(error, RuntimeError) and any(one in str(error) for one in said)


def _is_limited() -> bool:
    """Whether allocations of this process may be refused while the machine has memory."""
    kinds = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    return any(resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in kinds)


@contextlib.contextmanager
def memory_named(kind: type[RunnerError], message: str) -> Iterator[None]:
    """Inside, running out of memory raises `kind` with the message and what the device said."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).splitlines() or [type(error).__name__]
        raise kind(f"{message}. The device said: {said[0]}") from error
