"""Memory in a plan: the estimate for a device, whether it fits, and what would make it fit. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from runner.errors import UsageError
from runner.job.matrix_strategies import splits
from runner.memory import GPUS, Choice, Estimate, Subject, choose, estimate, levers
from runner.memory.subject import Device
from runner.plan import recut, sizes

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


def chosen(it: Subject, at: Where) -> Choice:
    """The strategy that the job names, else the one that `auto` takes; `it` is of any."""
    asked = it.job.launch.strategy
    if asked == "auto" or it.cut.world == 1:
        return choose(it, at.capacity, splits(it.job))
    return Choice(asked, "named by the job")


def sized(it: Subject, at: Where) -> Subject:
    """The job with the per-device size that memory is counted for.

    per_device    capacity    answer
    a number      -           it
    auto          unknown     1: a run finds out what fits
    auto          known       the largest that surely fits, else 1
    """
    if it.job.training.per_device_train_batch_size != "auto":
        return it
    if at.capacity is not None:
        for size in sizes(it.cut.global_batch_size, it.cut.world):
            tried = replace(it, cut=recut(it.cut, size))
            if size <= it.cut.per_device and estimate(tried).verdict(at.capacity) == "fits":
                return tried
    return replace(it, cut=recut(it.cut, 1))


def section(it: Subject, at: Where) -> dict[str, Any]:
    """`memory` of the document.

    Args:
        it: of any strategy.
    """
    choice = chosen(it, at)
    counted = sized(replace(it, strategy=choice.strategy), at)
    found = estimate(counted)
    verdict = None if at.capacity is None else found.verdict(at.capacity)
    return {
        "gpu": at.name,
        "capacity": at.capacity,
        "strategy": choice.strategy,
        "reason": choice.reason,
        "per_device": counted.cut.per_device,
        "low": found.low,
        "high": found.high,
        "terms": {term.name: {"low": term.low, "high": term.high} for term in found.terms if term.high},
        "unknown": list(found.unknown),
        "verdict": verdict,
        "fits": [] if at.device == "cpu" else _fits(found),
        "levers": [] if at.capacity is None or verdict == "fits" else _levers(counted, at.capacity),
    }


def _fits(found: Estimate) -> list[str]:
    """The types of GPU that it surely fits, smallest first."""
    types = sorted(GPUS.items(), key=lambda item: item[1].usable)
    return [name for name, gpu in types if found.verdict(gpu.usable) == "fits"]


def _levers(it: Subject, capacity: int) -> list[dict[str, Any]]:
    return [
        {
            "name": lever.name,
            "keys": lever.keys,
            "saves": lever.saves,
            "high": lever.estimate.high,
            "verdict": lever.verdict,
        }
        for lever in levers(it, capacity)[:_LEVERS]
    ]
