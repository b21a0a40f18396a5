"""What one attempt will do, as data: the job, where its parts lie, and the batch geometry.

The supervisor writes a plan as `attempts/<n>/plan.json`; it is the only thing that crosses into
`runner.train`. Pure: no file is read, nothing is imported beyond the manifest's own pydantic.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from runner.errors import JobError, Problem
from runner.manifest import Job


class Geometry(BaseModel):
    """How a global batch is cut: `global_batch_size = per_device x accumulation x world`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    global_batch_size: int
    """Samples between two optimizer steps, over all processes."""
    per_device: int
    """Samples of one forward and backward on one device."""
    accumulation: int
    """Micro-batches between two optimizer steps."""
    world: int
    """Training processes."""


class Fetched(BaseModel):
    """Where the parts that a job names lie on this machine, after the supervisor fetched them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """Folder that `from_pretrained` reads."""
    train: list[str]
    """Folder or file of each `datasets.train` entry, in the job's order."""
    eval: list[str]
    """The same for `datasets.eval`."""
    init_from: str | None = None
    """Folder of the adapter or checkpoint that `lora.init_from` names."""
    revisions: dict[str, str] = {}
    """Resolved commit hash of every hub repository, by its id."""


class Plan(BaseModel):
    """One attempt of one run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    purpose: Literal["train", "evaluate"]
    job: Job
    run_dir: Path
    """`runs/<name>`, absolute."""
    attempt: int
    """Counts the trainers that were started for this run, from 1."""
    attempt_dir: Path
    """`runs/<name>/attempts/<n>`: the plan, the trainer's log, its request and its outcome."""
    geometry: Geometry
    fetched: Fetched
    restore: Path | None = None
    """Verified checkpoint folder to go on from; null starts at step 0."""
    adapter: Path | None = None
    """For `evaluate`: the adapter to load; null evaluates the base model."""
    save_seconds: float
    """A checkpoint is saved when this much training time has passed since the last one."""


def geometry(job: Job, world: int = 1) -> Geometry:
    """Cut the global batch.

        global  per_device  world    accumulation
             8           1      1               8
             8           4      1               2
             8           3      1         refused: 3 x 1 does not divide 8
             8           4      4         refused: 4 x 4 does not divide 8

    Raises:
        JobError: `per_device_train_batch_size x world` does not divide `global_batch_size`.
    """
    total = job.training.global_batch_size
    per_device = job.training.per_device_train_batch_size
    if total % (per_device * world):
        usable = [size for size in range(1, total // world + 1) if total % (size * world) == 0]
        raise JobError(
            [
                Problem(
                    path="training.per_device_train_batch_size",
                    reason=f"{per_device} per device x {world} processes does not divide "
                    f"global_batch_size {total}",
                    remedy=f"use one of {usable}" if usable else f"use at most {total} processes",
                )
            ]
        )
    return Geometry(
        global_batch_size=total,
        per_device=per_device,
        accumulation=total // (per_device * world),
        world=world,
    )


def steps_per_epoch(rows: int, global_batch_size: int) -> int:
    """Optimizer steps of one pass; the last global batch is filled from the epoch's own start."""
    return math.ceil(rows / global_batch_size)


def total_steps(rows: int, global_batch_size: int, epochs: float, max_steps: int) -> int:
    """Optimizer steps of a run, as `transformers.Trainer` counts them: a positive `max_steps` wins."""
    if max_steps > 0:
        return max_steps
    return math.ceil(epochs * steps_per_epoch(rows, global_batch_size))
