"""Who decodes images while a step runs: the processes of the data loader, and how far ahead they work.

    with a GPU       its processes decode ahead, into pinned memory, and live for the whole run
    without          none: the training has the cores, and whoever decodes takes them away

What a job sets itself stays. A collator draws nothing, so that bits depend on none of it, but for this: where
processes do not live for the whole run, or there are none, PyTorch takes a number an epoch from the CPU's
generator, which dropout on a CPU draws from, too.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from runner.errors import DataError
from runner.plan import Plan
from runner.train.world import device, world

MOST = 8
"""Workers of a process. One makes some 7 pictures a second of 13 tiles, measured with Pillow on one core."""

SHARE = 1 << 30
"""Bytes of shared memory for what one worker has ready: `AHEAD` pairs of 13 tiles in float32 are 0.7 GB. A
worker that finds none left dies of a bus error, and the attempt with it."""

AHEAD = 16
"""Rows that one worker has ready at most, but for the two micro-batches that it always may."""

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Room:
    """What a training process and its workers have."""

    gpu: bool
    cores: float
    """Of the machine, shared evenly among its training processes."""
    shared: float
    """Bytes of shared memory, shared likewise; infinite where nobody bounds it."""

    @classmethod
    def here(cls) -> Self:
        """Look."""
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        shared = math.inf
        if SHARED_MEMORY.is_dir():
            found = os.statvfs(SHARED_MEMORY)
            shared = found.f_bavail * found.f_frsize
        processes = world().local_size
        return cls(device().type == "cuda", cores / processes, shared / processes)


def workers(room: Room) -> int:
    """Processes of the data loader of one training process.

    GPU    cores    shared memory    workers
    no     any      any              0
    yes    16       64 GiB           8: `MOST`
    yes    4        64 GiB           3: one core is the training's
    yes    1        64 GiB           1
    yes    16       3 GiB            3: `SHARE` each
    yes    16       64 MiB           0: what a container has by default
    """
    if not room.gpu:
        return 0
    return int(min(MOST, max(1, room.cores - 1), room.shared // SHARE))


def prefetch(count: int, accumulation: int, per_device: int) -> int:
    """Micro-batches that each of `count` workers has ready.

    All micro-batches of a step are taken at its start, because its loss is a mean over all their tokens; so
    as many have to be ready by then, or the step waits while the workers were idle before.

    workers    accumulation    per device    micro-batches
    8          1               8             2: upstream's default
    8          32              1             4: 32 in all
    8          512             1             16: `AHEAD`
    8          64              8             2
    """
    return max(2, min(math.ceil(accumulation / count), AHEAD // per_device))


def arguments(plan: Plan, room: Room) -> dict[str, Any]:
    """The fields of TrainingArguments about the loader: the job's own, and for the others what fits."""
    options = plan.job.training.options
    given = {name: value for name, value in options.items() if name.startswith("dataloader_")}
    count = given.get("dataloader_num_workers", workers(room))
    ours = {"dataloader_num_workers": count, "dataloader_pin_memory": room.gpu}
    if count:
        cut = plan.geometry
        ours["dataloader_persistent_workers"] = True
        ours["dataloader_prefetch_factor"] = prefetch(count, cut.accumulation, cut.per_device)
    return {**ours, **given}


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """What a worker says of a row, as it said it: PyTorch puts the worker's traceback before it."""
    try:
        yield
    except DataError as error:
        said = str(error).rpartition(f"{DataError.__module__}.{DataError.__qualname__}: ")[2]
        raise DataError(said.strip()) from error


class Timed:
    """An iterator that adds up how long it was waited for, `seconds`."""

    def __init__(self, inner: Iterator[Any]) -> None:
        self._inner = inner
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        began = time.monotonic()
        try:
            return next(self._inner)
        finally:
            self.seconds += time.monotonic() - began
