"""What one attempt will do, as data: the job, where its parts lie, and the batch geometry.

The supervisor writes a plan as `attempts/<n>/plan.json`; it is the only thing that crosses into
`runner.train`. Pure: no file is read, nothing is imported beyond the manifest's own pydantic.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from runner.errors import JobError, Problem
from runner.manifest import Job

Strategy = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
"""How the processes of an attempt share the model; `launch.strategy` with `auto` decided."""


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
    epoch: int = 1
    """Number of the owner that this attempt belongs to (`runner.checkpoint.lease`)."""
    attempt: int
    """Counts the trainers that were started for this run, from 1."""
    attempt_dir: Path
    """`runs/<name>/attempts/<n>`: the plan, the trainer's log, its request and its outcome."""
    geometry: Geometry
    strategy: Strategy = "single"
    probe: bool = False
    """Whether `geometry` is only the largest cut that may be tried, and the trainer finds one that fits."""
    fetched: Fetched
    restore: Path | None = None
    """Verified checkpoint folder to go on from; null starts at step 0."""
    adapter: Path | None = None
    """For `evaluate`: the adapter to load; null evaluates the base model."""
    reference: Path | None = None
    """For `evaluate` of method dpo: predictions of the model before training, which rewards are measured
    against; null reports none."""
    references: Path | None = None
    """Under method dpo: the file of this machine's cache that holds reference log-probabilities; null keeps
    none."""
    save_seconds: float
    """A checkpoint is saved when this much training time has passed since the last one."""


def checkpoint_id(plan: Plan, step: int) -> str:
    """Name of a checkpoint: sorts by step, and is never used twice, on whatever machine."""
    return f"{step:08d}-{plan.epoch:06d}-{plan.attempt:04d}"


def batch_record(job: Job, cut: Geometry, strategy: Strategy) -> dict[str, Any]:
    """What a checkpoint keeps of the cut: the size, what the job asked for when it came about, and who shared
    the global batch. Records of earlier versions end after the first two."""
    return {
        "per_device": cut.per_device,
        "asked": job.training.per_device_train_batch_size,
        "world": cut.world,
        "strategy": strategy,
    }


def changes(record: Any, cut: Geometry, strategy: Strategy) -> list[str]:
    """What a resume cuts in another way than the checkpoint that it goes on from: `["world 4 -> 2"]`.

    Nothing: on the same hardware it is bit-identical to a run that was not interrupted. Anything: the order
    of rows and the global batch are the same, but sums round differently, and dropout draws otherwise.

    Args:
        record: the checkpoint's `batch_record`; one without a world is of a version that knew one process.
    """
    if not isinstance(record, dict):
        return ["the checkpoint does not say how its batch was cut"]
    was = {"world": 1, "strategy": "single", "per_device": cut.per_device, **record}
    now = {"world": cut.world, "strategy": strategy, "per_device": cut.per_device}
    return [f"{name} {was[name]} -> {value}" for name, value in now.items() if was[name] != value]


def recorded_size(job: Job, record: Any) -> int | None:
    """The per-device size of a checkpoint's `batch_record`, if it still answers what the job asks for.

    job     checkpoint asked    answer
    auto    auto                its size
    8       8                   its size, 4 when 8 did not fit
    2       8, auto             None: somebody wants another size now
    any     no record           None
    """
    if isinstance(record, dict) and record.get("asked") == job.training.per_device_train_batch_size:
        size = record.get("per_device")
        return size if type(size) is int and size > 0 else None
    return None


def sizes(global_batch_size: int, world: int = 1) -> list[int]:
    """The per-device sizes that cut a global batch evenly, largest first; none for too many processes.

    global  world    sizes
        12      1    12, 6, 4, 3, 2, 1
        12      4    3, 1
    """
    each, rest = divmod(global_batch_size, world)
    if rest:
        return []
    small = [size for size in range(1, math.isqrt(each) + 1) if each % size == 0]
    return sorted({*small, *(each // size for size in small)}, reverse=True)


def smaller(cut: Geometry) -> Geometry | None:
    """The same global batch with the next smaller per-device size; None below 1."""
    below = [size for size in sizes(cut.global_batch_size, cut.world) if size < cut.per_device]
    return recut(cut, below[0]) if below else None


def recut(cut: Geometry, per_device: int) -> Geometry:
    """The same global batch in micro-batches of another of its `sizes`."""
    accumulation = cut.global_batch_size // (per_device * cut.world)
    return cut.model_copy(update={"per_device": per_device, "accumulation": accumulation})


def geometry(job: Job, world: int = 1, at_most: int | None = None) -> Geometry:
    """Cut the global batch.

        global  per_device  world  at_most   accumulation
             8           1      1        -              8
             8           4      1        -              2
             8           4      1        3              4, with 2 per device
             8        auto      1        -              1, with 8 per device
             8        auto      2        3              2, with 2 per device
             8           3      1        -        refused: 3 x 1 does not divide 8
             8           4      4        -              1, with 2 per device
             8           4      3        -        refused: 3 processes do not divide 8

    A size is a wish, which more processes make smaller; where it is part of the loss it is refused instead.

    Args:
        world: training processes.
        at_most: a per-device size that is known to fit, or one below a size that is known not to.

    Raises:
        JobError: `per_device_train_batch_size x world` does not divide `global_batch_size`.
    """
    total = job.training.global_batch_size
    usable = sizes(total, world)
    asked = job.training.per_device_train_batch_size
    per_device = asked if isinstance(asked, int) else (usable or [1])[0]
    if world > 1 and usable and not job.training.sorts:
        per_device = next(size for size in usable if size <= per_device)
    if total % (per_device * world):
        raise JobError(
            [
                Problem(
                    path="training.per_device_train_batch_size",
                    reason=f"{per_device} per device x {world} processes does not divide "
                    f"global_batch_size {total}",
                    remedy=f"use one of {usable[::-1]}" if usable else f"use at most {total} processes",
                )
            ]
        )
    if at_most is not None:
        per_device = next(size for size in usable if size <= min(per_device, at_most))
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


def warmup_steps(warmup: float, steps: int) -> int:
    """Steps of warm-up, as `transformers.TrainingArguments` reads `warmup_steps`: below 1 it is a share.

    warmup    steps    answer
      0.05      150    8
        50      150    50
    """
    return int(warmup) if warmup >= 1 else math.ceil(steps * warmup)
