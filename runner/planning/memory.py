"""Memory in a plan: the estimate for a device, whether it fits, and what would make it fit. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runner.errors import UsageError
from runner.facts import DataFacts, ModelFacts
from runner.job.matrix_strategies import splits
from runner.manifest import Job
from runner.memory import GPUS, Choice, Estimate, choose, estimate, levers
from runner.memory.terms import Device
from runner.plan import Geometry, Strategy, recut, sizes

CPU = "cpu"
"""The device of `--gpu` that is none: a process on a CPU."""

_LEVERS = 5
"""Levers that are worth reading."""


@dataclass(frozen=True)
class Where:
    """What memory is counted for."""

    name: str | None
    """A type of GPU, `cpu`, or None for a GPU of a type that nobody named."""

    @property
    def device(self) -> Device:
        return "cpu" if self.name == CPU else "cuda"

    @property
    def capacity(self) -> int | None:
        """Bytes that a process can use; None where that is not known."""
        return GPUS[self.name].usable if self.name in GPUS else None


def where(gpu: str | None) -> Where:
    """Read `--gpu`.

    Raises:
        UsageError: no type of the table.
    """
    if gpu is not None and gpu != CPU and gpu not in GPUS:
        raise UsageError(
            f"plan --gpu {gpu}: not a type that is known\n    remedy: use one of {', '.join(GPUS)}, or {CPU}"
        )
    return Where(gpu)


def chosen(job: Job, model: ModelFacts, data: DataFacts, cut: Geometry, at: Where) -> Choice:
    """The strategy that the job names, else the one that `auto` takes."""
    asked = job.launch.strategy
    if asked == "auto" or cut.world == 1:
        return choose(model, data, job, cut, at.device, at.capacity, splits(job))
    return Choice(asked, "named by the job", estimate(model, data, job, cut, asked, at.device))


def sized(
    job: Job, model: ModelFacts, data: DataFacts, cut: Geometry, strategy: Strategy, at: Where
) -> Geometry:
    """The cut with the per-device size that memory is counted for.

    per_device    capacity    answer
    a number      -           it
    auto          unknown     1: a run finds out what fits
    auto          known       the largest that surely fits, else 1
    """
    if job.training.per_device_train_batch_size != "auto":
        return cut
    if at.capacity is not None:
        for size in sizes(cut.global_batch_size, cut.world):
            tried = recut(cut, size)
            found = estimate(model, data, job, tried, strategy, at.device)
            if size <= cut.per_device and found.verdict(at.capacity) == "fits":
                return tried
    return recut(cut, 1)


def section(
    job: Job, model: ModelFacts, data: DataFacts, cut: Geometry, choice: Choice, at: Where
) -> dict[str, Any]:
    """`memory` of the document."""
    strategy = choice.strategy
    counted = sized(job, model, data, cut, strategy, at)
    found = estimate(model, data, job, counted, strategy, at.device)
    verdict = None if at.capacity is None else found.verdict(at.capacity)
    wanted = at.capacity is not None and verdict != "fits"
    return {
        "gpu": at.name,
        "capacity": at.capacity,
        "strategy": strategy,
        "reason": choice.reason,
        "per_device": counted.per_device,
        "low": found.low,
        "high": found.high,
        "terms": {term.name: {"low": term.low, "high": term.high} for term in found.terms if term.high},
        "unknown": list(found.unknown),
        "verdict": verdict,
        "fits": [] if at.device == "cpu" else _fits(found),
        "levers": _levers(job, model, data, counted, strategy, at) if wanted else [],
    }


def _fits(found: Estimate) -> list[str]:
    """The types of GPU that it surely fits, smallest first."""
    types = sorted(GPUS.items(), key=lambda item: item[1].usable)
    return [name for name, gpu in types if found.verdict(gpu.usable) == "fits"]


def _levers(
    job: Job, model: ModelFacts, data: DataFacts, cut: Geometry, strategy: Strategy, at: Where
) -> list[dict[str, Any]]:
    assert at.capacity is not None
    pulled = levers(model, data, job, cut, strategy, at.device, at.capacity)
    return [
        {
            "name": lever.name,
            "keys": lever.keys,
            "saves": lever.saves,
            "high": lever.estimate.high,
            "verdict": lever.verdict,
        }
        for lever in pulled[:_LEVERS]
    ]
