"""How many processes an attempt has, on this machine and on others, and how they share the model. Pure, but
for `Machine.here`.

    visible GPUs, launch.gpus_per_node -> processes that there may be on a machine; on each as many
    training.global_batch_size         -> the largest world of these that cuts it evenly
    launch.strategy                    -> how they share the model

No torch: an attempt is planned before a process that may import it exists.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from runner.errors import JobError, Problem
from runner.manifest import Job
from runner.plan import Strategy, sizes

_DEVICE = re.compile(r"nvidia[0-9]+")
"""Device files of GPUs; beside them are nvidiactl, nvidia-uvm, ..."""

_VISIBLE = re.compile(r"[0-9]+|(GPU|MIG)-.+")
"""An entry of CUDA_VISIBLE_DEVICES that names a device; from the first other one on, CUDA sees none (CUDA C++
Programming Guide, environment variables)."""

_SHOWN = 4
"""Usable numbers of processes that a message names."""


@dataclass(frozen=True)
class Machine:
    """What this machine has for training processes."""

    gpus: int
    """That a child process would see."""
    cores: int
    """That this process may use."""

    @classmethod
    def here(cls, environ: Mapping[str, str], devices: Path = Path("/dev")) -> Self:
        """Look.

        CUDA_VISIBLE_DEVICES    GPUs
        unset                   device files /dev/nvidia<number>
        0,2 or UUIDs            as many as are named
        empty, -1               0

        Args:
            devices: the folder of the device files; tests give their own.
        """
        named = environ.get("CUDA_VISIBLE_DEVICES")
        if named is None:
            gpus = sum(1 for path in devices.glob("nvidia*") if _DEVICE.fullmatch(path.name))
        else:
            entries = (entry.strip() for entry in named.split(","))
            gpus = sum(1 for _ in itertools.takewhile(_VISIBLE.fullmatch, entries))
        return cls(gpus, _usable_cores())


def _usable_cores() -> int:
    if sys.platform != "linux":
        return os.cpu_count() or 1
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Placement:
    """The processes of a job's attempts."""

    world: int
    strategy: Strategy
    lines: tuple[str, ...] = ()
    """What a person should know of it: where it is not what was asked for."""


def place(job: Job, gpus: int, others: Sequence[int] = ()) -> Placement:
    """Place a job on its machines.

        strategy    GPUs    global    per device    world    said
        auto        0       32        auto          1        -
        auto        4       32        auto          4        -
        auto        3       32        auto          2        3 cannot cut 32; the usable ones
        auto        4       32        16            4        -
        auto        4       32        16, aot       2        4 of 16 rows cannot cut 32; the usable ones
        single      4       32        auto          1        -
        zero2       1       32        auto          1        zero2 with one process is single

        nodes    GPUs here    others    global    world    said
        2        4            4         32        8        -
        2        4            1         32        2        nodes offer 4, 1 processes; each has as many
        2        3            3         32        4        6 cannot cut 32; the usable ones
        3        1            1, 1      32        -        refused: 3 nodes cannot cut 32
        2        4            4         32        -        refused, with strategy single

    Args:
        gpus: that are visible.
        others: processes that each other node offers; empty before they have said it, which is enough for
            what is refused.

    Raises:
        JobError: `launch.gpus_per_node` is more than there are, or no world is a multiple of `launch.nodes`.
    """
    asked, nodes = job.launch.strategy, job.launch.nodes
    if asked == "single" and nodes > 1:
        raise _refused(f"strategy single is one process, and there are {nodes} nodes", "use launch.nodes: 1")
    offers = [1 if asked == "single" else processes(job, gpus), *others]
    most = nodes * min(offers)
    usable = [count for count in worlds(job) if count % nodes == 0]
    if nodes > 1 and not usable:
        raise _refused(
            f"{nodes} nodes cannot cut a global batch of {job.training.global_batch_size} evenly",
            f"use one of {', '.join(map(str, worlds(job))) or 1}, or another training.global_batch_size",
        )
    # Where no world is usable, the size of a micro-batch cuts no global batch: `geometry` says so.
    world = max((count for count in usable if count <= most), default=1)
    strategy = strategy_of(job, world)
    lines = []
    if len(set(offers)) > 1:
        lines.append(
            f"the nodes offer {', '.join(map(str, offers))} processes; each has as many as the others"
        )
    if world < most and usable:
        size = job.training.per_device_train_batch_size
        rows = f" of {size} rows" if isinstance(size, int) and job.training.sorts else ""
        shown = [str(count) for count in usable[:_SHOWN]] + ["..."] * (len(usable) > _SHOWN)
        lines.append(
            f"{most} processes{rows} cannot cut a global batch of {job.training.global_batch_size} evenly; "
            f"{world} {'is' if world == 1 else 'are'} used (usable: {', '.join(shown)})"
        )
    if asked not in ("auto", strategy):
        lines.append(f"strategy {asked} with one process is single")
    return Placement(world, strategy, tuple(lines))


def _refused(reason: str, remedy: str) -> JobError:
    return JobError([Problem("launch.nodes", reason, remedy)])


def processes(job: Job, gpus: int) -> int:
    """Processes that there may be on this machine.

        launch.gpus_per_node    visible GPUs    answer
        auto                    0               1, on the CPU
        auto                    4               4
        2                       0               2, on the CPU
        2                       4               2
        4                       2               refused

    Raises:
        JobError: more than there are GPUs.
    """
    asked = job.launch.gpus_per_node
    if asked == "auto":
        return max(1, gpus)
    if 0 < gpus < asked:
        raise JobError(
            [
                Problem(
                    path="launch.gpus_per_node",
                    reason=f"{asked} GPUs are asked for, and {gpus} {'is' if gpus == 1 else 'are'} visible",
                    remedy=f"use at most {gpus}, or auto for all that are visible, or a machine with more; "
                    "CUDA_VISIBLE_DEVICES says which are visible",
                )
            ]
        )
    return asked


def worlds(job: Job) -> list[int]:
    """The numbers of processes that cut the job's global batch evenly, smallest first.

    global    per device    answer
    12        auto, 2, 5    1, 2, 3, 4, 6, 12
    12        2, aot        1, 2, 3, 6
    12        5, aot        none

    A size is a wish, but under a loss that it is part of.
    """
    size = job.training.per_device_train_batch_size
    fixed = size if isinstance(size, int) and job.training.sorts else 1
    return sizes(job.training.global_batch_size, fixed)[::-1]


def strategy_of(job: Job, world: int) -> Strategy:
    """How the processes share the model.

    launch.strategy    world    answer
    any                1        single
    auto               above    ddp
    any other          above    itself
    """
    if world == 1:
        return "single"
    return "ddp" if job.launch.strategy == "auto" else job.launch.strategy
