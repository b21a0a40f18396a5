"""The arithmetic of a plan: from a job, its facts and its cut to the sections of the document. Pure."""

from __future__ import annotations

from typing import Any

from runner.facts import DataFacts, ModelFacts
from runner.manifest import Job
from runner.memory.subject import DEFAULTS
from runner.memory.terms import OPTIMIZERS
from runner.plan import Geometry, Strategy, steps_per_epoch, total_steps, warmup_steps
from runner.supervisor.pace import UNMEASURED_SAVE, save_interval

RATE = 50e6
"""Bytes a second that a commit is taken to bring to its store; a run measures its own."""

_LARGEST_STATE = 8
"""Bytes of moments for a parameter, of an optimizer that is not in the table."""

_STEP_BYTES = 170
"""Of a line of steps.jsonl and the same step in transformers' log, without its rows."""
_ROW_BYTES = 6
_REFERENCE_BYTES = 9
"""Two float32 of a pair, and whether they are known."""
_OTHER_BYTES = 32_000
"""Generators' states, names of the tensors, configuration."""


def model_section(job: Job, model: ModelFacts, weight_bytes: int) -> dict[str, Any]:
    """What trains, and what the base takes in memory."""
    parts = model.parts.values()
    return {
        "parameters": sum(part.parameters for part in parts),
        "quantized_parameters": sum(part.quantized for part in parts),
        "trainable_parameters": trainable(model),
        "weight_bytes": weight_bytes,
        "frozen": list(job.model.freeze),
        **model.model_dump(),
    }


def trainable(model: ModelFacts) -> int:
    """Parameters that train, of base and adapter."""
    return sum(part.trainable + part.adapter for part in model.parts.values())


def training_section(job: Job, data: DataFacts, cut: Geometry, strategy: Strategy | None) -> dict[str, Any]:
    """Steps and how each is cut.

    Args:
        strategy: None: not known.
    """
    options = job.training.options
    size = cut.global_batch_size
    steps = total_steps(data.rows, size, options.get("num_train_epochs", 3.0), options.get("max_steps", -1))
    # Unseen rows may be left out where the job allows that.
    leaves_out = job.datasets.on_bad_row == "skip" or job.datasets.on_overflow == "drop"
    an_epoch = steps_per_epoch(data.rows, size)
    return {
        **cut.model_dump(),
        "auto": job.training.per_device_train_batch_size == "auto",
        "strategy": strategy,
        "steps": steps,
        "steps_per_epoch": an_epoch,
        "epochs": round(steps / an_epoch, 4),
        "warmup_steps": warmup_steps(options.get("warmup_steps") or 0, steps),
        "exact": data.looked_at >= data.rows + data.skipped or not leaves_out,
        "evaluations": evaluations(job, steps),
        "exports": None if job.evaluation is None else job.evaluation.metric_for_best_model,
    }


def evaluations(job: Job, steps: int) -> int | None:
    """How often a run is evaluated during training; None where the clock decides.

    evaluation          steps    answer
    none, or neither    100      0
    steps 30            100      3
    steps 30, best      100      4, the last step among them
    minutes             100      -
    """
    spec = job.evaluation
    if spec is None or not spec.during:
        return 0
    if spec.steps is None:
        return None
    between = (steps - 1) // spec.steps
    return between + (spec.metric_for_best_model is not None)


def checkpoint_bytes(job: Job, model: ModelFacts, data: DataFacts, steps: int) -> int:
    """About the size of the last, largest checkpoint: trained parameters in float32, the optimizer's moments,
    the record of all steps, what dpo's reference thinks of every pair, and the best parameters so far."""
    optimizer = job.training.options.get("optim", DEFAULTS["optim"])
    state = OPTIMIZERS[optimizer][0] if optimizer in OPTIMIZERS else _LARGEST_STATE
    record = steps * (_STEP_BYTES + _ROW_BYTES * job.training.global_batch_size)
    kept = data.rows * _REFERENCE_BYTES if data.saves("cache_reference") else 0
    best = 4 if job.evaluation is not None and job.evaluation.metric_for_best_model is not None else 0
    return int(trainable(model) * (4 + state + best)) + record + kept + _OTHER_BYTES


def checkpoints_section(job: Job, place: str, size: int | None) -> dict[str, Any]:
    """Where checkpoints go, what they take, and how often one is saved until saves were measured."""
    settings = job.checkpoints
    return {
        "place": place,
        "bytes": size,
        "keep_last": settings.keep_last,
        "kept_bytes": None if size is None else size * settings.keep_last,
        "save_steps": settings.save_steps,
        "save_seconds": save_interval(settings.max_loss_seconds, None, None),
        "max_loss_seconds": settings.max_loss_seconds,
    }


def grace_section(grace: float | None, size: int | None, steps_per_second: float | None) -> dict[str, Any]:
    """What the time from a notice to the end of the machine allows: the end of a step, a save, its commit.

    Args:
        grace: `RUNNER_GRACE_SECONDS`; None: nobody said.
    """
    step = 0.0 if steps_per_second is None else 1 / steps_per_second
    needed = None if size is None else round(step + UNMEASURED_SAVE + size / RATE, 1)
    return {
        "seconds": grace,
        "needed_seconds": needed,
        "assumed_bytes_per_second": RATE,
        "enough": None if grace is None or needed is None else needed <= grace,
    }


def time_section(
    steps: int | None, steps_per_second: float | None, source: str | None, price_per_hour: float | None
) -> dict[str, Any]:
    """How long and how dear, where a throughput is known."""
    seconds = None if steps is None or steps_per_second is None else round(steps / steps_per_second, 1)
    price = None if seconds is None or price_per_hour is None else round(seconds / 3600 * price_per_hour, 2)
    return {
        "steps_per_second": steps_per_second,
        "source": source,
        "seconds": seconds,
        "price_per_hour": price_per_hour,
        "price": price,
    }
