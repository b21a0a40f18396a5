"""Rows of numbers as trackers get them, and how the numbers are called: as transformers' own callbacks do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

Known = dict[str, set[int]]
"""Of each metric by its name, the steps that a tracker has."""

_STEP = ("loss", "grad_norm", "learning_rate", "tokens", "images")


@dataclass(frozen=True)
class Row:
    """Numbers of one optimizer step, or of one evaluation."""

    step: int
    values: dict[str, float]
    """By name, all finite."""
    time: float | None = None
    """When it happened, in seconds since 1970; None: on another machine."""


@dataclass(frozen=True)
class Ending:
    """How a command on the run ended."""

    outcome: str
    """done, preempted or failed."""
    exit_code: int
    summary: dict[str, float]
    """The metrics before and after training, by name."""


def of_step(
    line: Mapping[str, Any], *, seconds: float | None, time: float | None, epoch: float | None
) -> Row:
    """A line of steps.jsonl, with what only this machine knows about it."""
    values = {f"train/{name}": line.get(name) for name in _STEP}
    values |= {"train/epoch": epoch, "train/seconds": seconds}
    return Row(int(line["step"]), finite(values), time)


def of_evaluation(step: int, metrics: Mapping[str, Any], time: float | None = None) -> Row:
    """Metrics of an evaluation."""
    return Row(step, finite(flat(metrics, "eval/")), time)


def flat(metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Metrics by one name each, without how many rows they are of.

    {"eval_loss": 0.4}                               eval/loss
    {"accuracy": {"overall": 0.9, "n": 4, "x": 1}}   eval/accuracy, eval/accuracy_x
    """
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        name = prefix + name.removeprefix("eval_")
        if isinstance(value, Mapping):
            found[name] = value.get("overall")
            parts = {part: one for part, one in value.items() if part not in ("overall", "n")}
            found |= {f"{name}_{part}": one for part, one in parts.items() if not part.startswith("n_")}
        else:
            found[name] = value
    return found


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """What is a number, and not infinite."""
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def fresh(rows: Iterable[Row], known: Known) -> list[Row]:
    """What a tracker does not have yet, by step; rows of which nothing is left are gone.

    Two rows of one step that have a metric in common count as told once: the first.
    """
    found: list[Row] = []
    told: Known = {}
    for row in sorted(rows, key=lambda row: row.step):
        values = {
            name: one
            for name, one in row.values.items()
            if row.step not in known.get(name, ()) and row.step not in told.get(name, ())
        }
        if values:
            found.append(replace(row, values=values))
            note(found[-1:], told)
    return found


def note(rows: Iterable[Row], known: Known) -> None:
    """Remember in `known` what a tracker was given."""
    for row in rows:
        for name in row.values:
            known.setdefault(name, set()).add(row.step)
