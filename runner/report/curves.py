"""What the charts of a run are drawn from, small enough for a page however long the run was. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.report.history import Measured, Point
from runner.report.loose import mapping, whole
from runner.report.marks import Mark
from runner.report.metrics import Estimate, estimate
from runner.report.read import Run

POINTS = 1500
"""On a curve: more than a screen has columns."""

LOSS = "eval_loss"
"""Of the rows that are evaluated on."""


@dataclass(frozen=True)
class Curve:
    """One number over the steps; of several steps that share a point, their mean and their extremes."""

    steps: tuple[int, ...]
    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Evaluated:
    """The metric that a run is judged by, at a step."""

    step: int
    when: str
    found: Estimate


def curve(points: Sequence[Point], name: str, most: int = POINTS) -> Curve:
    """One field of the steps that have it, as at most `most` points."""
    told = [(point.step, value) for point in points if (value := getattr(point, name)) is not None]
    size = max(1, -(-len(told) // most))
    groups = [told[start : start + size] for start in range(0, len(told), size)]
    values = [[value for _, value in group] for group in groups]
    return Curve(
        steps=tuple(group[-1][0] for group in groups),
        values=tuple(sum(group) / len(group) for group in values),
        low=tuple(map(min, values)),
        high=tuple(map(max, values)),
    )


def during(run: Run) -> list[Measured]:
    """What was measured while it trained.

    The events know upstream's own evaluations of the loss, too; the file that goes with the checkpoints knows
    those of other machines, and its word counts.
    """
    found = {one.step: one.metrics for one in run.history.measured if one.when == "during"}
    for line in run.evaluations:
        if (step := whole(line.get("step"))) is not None:
            found[step] = {**found.get(step, {}), **line, **mapping(line.get("metrics"))}
    return [Measured(step, "during", found[step]) for step in sorted(found)]


def ends(run: Run) -> dict[str, Mapping[str, Any]]:
    """The metrics `before` and `after`, each empty where it was not measured."""
    result = mapping(run.result.get("metrics"))
    told = {one.when: one.metrics for one in run.history.measured}
    return {when: mapping(result.get(when)) or told.get(when, {}) for when in ("before", "after")}


def evaluated(run: Run, metric: str) -> list[Evaluated]:
    """A metric over the steps: before, during and after training.

    What was measured after training stands at the step that was kept (`kept_step`), and in the place of what
    was measured there on the way: the two are of the same parameters.
    """
    both = ends(run)
    told = [
        Measured(0, "before", both["before"]),
        *during(run),
        Measured(kept_step(run), "after", both["after"]),
    ]
    found = {
        one.step: Evaluated(one.step, one.when, value)
        for one in told
        if (value := estimate(one.metrics, metric)) is not None
    }
    return [found[step] for step in sorted(found)]


def kept_step(run: Run) -> int:
    """The step whose parameters were evaluated after training: the best one's, else the last."""
    best = whole(mapping(run.result.get("best")).get("step"))
    told = [one.step for one in run.history.measured if one.when == "after"]
    last = max((point.step for point in run.history.points), default=0)
    return best or (told[-1] if told else whole(run.result.get("steps")) or last)


def data(run: Run, metric: str, marks: Iterable[tuple[int, Mark]]) -> dict[str, Any]:
    """All that the charts of one run need, as JSON."""
    points = run.history.points
    return {
        "name": run.name,
        "curves": {name: _columns(curve(points, name)) for name in ("loss", "grad_norm", "learning_rate")},
        "evaluated": [_row(one) for one in evaluated(run, metric)],
        "eval_loss": [_row(one) for one in evaluated(run, LOSS)],
        "marks": [
            {"number": number, "step": mark.step, "kind": mark.kind, "title": mark.title}
            for number, mark in marks
        ],
    }


def _columns(one: Curve) -> dict[str, list[float]]:
    return {
        "step": list(one.steps),
        "value": [_short(value) for value in one.values],
        "low": [_short(value) for value in one.low],
        "high": [_short(value) for value in one.high],
    }


def _row(one: Evaluated) -> dict[str, Any]:
    found = one.found
    return {"step": one.step, "when": one.when, "value": found.value, "low": found.low, "high": found.high}


def _short(value: float) -> float:
    """Six digits, which is more than a screen shows."""
    return float(f"{value:.6g}")
