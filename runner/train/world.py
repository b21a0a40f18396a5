"""The processes of an attempt, seen from one of them: who it is, and what they tell each other.

The supervisor sets torchrun's variables: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. Without them this process is alone, and everything here answers at once. Rank 0 decides and
writes; the others agree. A function that says that it is collective is called by all ranks, in the same
order, or all wait.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

TIMEOUT = datetime.timedelta(days=7)
"""Of a collective: the others wait while the first prepares the rows of a large dataset. Ranks that are gone
or silent are noticed by the supervisor."""


@dataclass(frozen=True)
class World:
    """This process among those of its attempt."""

    rank: int
    """Counts over all machines, from 0."""
    size: int
    local_rank: int
    """Counts on this machine, from 0: the number of its GPU."""
    local_size: int
    """Processes on this machine."""

    @property
    def first(self) -> bool:
        """Whether it decides and writes."""
        return self.rank == 0

    @property
    def beside_first(self) -> bool:
        """Whether it runs on rank 0's machine, which has the run's files."""
        return self.rank == self.local_rank


def world() -> World:
    """This process, as the environment says."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, 0, 1)
    rank, local_rank, local_size = (
        int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    return World(rank, size, local_rank, local_size)


def device() -> torch.device:
    """The device of this process: its GPU, else the CPU."""
    return torch.device("cuda", world().local_rank) if torch.cuda.is_available() else torch.device("cpu")


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Inside, the ranks can talk. Collective."""
    if world().size == 1:
        yield
        return
    place = device()
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=TIMEOUT)
    yield
    # Only here: after an error the others may wait somewhere else, and the supervisor ends them.
    dist.destroy_process_group()


def from_first(value: T) -> T:
    """Rank 0's value, on every rank. Collective."""
    if world().size == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def from_all(value: T) -> list[T]:
    """Every rank's value, by rank, on every rank. Collective."""
    if world().size == 1:
        return [value]
    values: list[Any] = [None] * world().size
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def first_on_machine() -> Iterator[None]:
    """Inside, the machine's first rank goes first, and its others find what it left in caches. Collective."""
    alone = world().size == 1
    leads = world().local_rank == 0
    if not alone and not leads:
        dist.barrier()
    yield
    if not alone and leads:
        dist.barrier()
