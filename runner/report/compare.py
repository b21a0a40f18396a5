"""Several runs side by side: what differs in their jobs, and what came of it. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.planning.words import size
from runner.report import beside, curves, metrics
from runner.report.loose import items, mapping, number, whole
from runner.report.marks import RESTARTS, merged
from runner.report.metrics import Estimate
from runner.report.read import Run
from runner.report.verdict import WORDS
from runner.supervisor.progress import duration

UNSET = "–"
"""A key that a job does not have, or a number that nobody knows."""

_NAMES = ("name",)
"""Keys that tell runs apart and change nothing."""


@dataclass(frozen=True)
class Row:
    """One quantity of every run, in their order."""

    name: str
    cells: tuple[str, ...]

    @property
    def differs(self) -> bool:
        return len(set(self.cells)) > 1


@dataclass(frozen=True)
class Comparison:
    """Several runs."""

    runs: tuple[Run, ...]
    labels: tuple[str, ...]
    """What to call each: its name, or where it is where two have one name."""
    job: tuple[Row, ...]
    """Keys whose values are not the same."""
    outcome: tuple[Row, ...]
    charts: Mapping[str, Any]


def compare(runs: Sequence[Run]) -> Comparison:
    """Put runs side by side, in the given order."""
    labels = labelled(runs)
    metric = next((one for run in runs if (one := _metric(run)) is not None), "relaxed_accuracy")
    drawn = [{**curves.data(run, metric, ()), "name": label} for run, label in zip(runs, labels, strict=True)]
    return Comparison(
        runs=tuple(runs),
        labels=labels,
        job=tuple(_job(runs)),
        outcome=tuple(_outcome(runs)),
        charts={"metric": metrics.named(metric), "share": metric not in metrics.MEANS, "runs": drawn},
    )


def labelled(runs: Sequence[Run]) -> tuple[str, ...]:
    """A label for each run.

    runs                              labels
    a in runs/a, b in runs/b          a, b
    a in runs/a, a in old/a           runs/a, old/a
    """
    names = [run.name for run in runs]
    return tuple(run.place if names.count(run.name) > 1 else run.name for run in runs)


def _metric(run: Run) -> str | None:
    both = curves.ends(run)
    found = both["after"] or both["before"]
    return metrics.main_metric(run.value("evaluation.metric"), run.value("method"), found) if found else None


def _job(runs: Sequence[Run]) -> Iterator[Row]:
    jobs = [{value.key: _shown(value.value) for value in run.job} for run in runs]
    for key in dict.fromkeys(key for job in jobs for key in job):
        row = Row(key, tuple(job.get(key, UNSET) for job in jobs))
        if row.differs and key not in _NAMES:
            yield row


def _outcome(runs: Sequence[Run]) -> Iterator[Row]:
    def row(name: str, cells: Sequence[str | None]) -> Iterator[Row]:
        if any(cell is not None for cell in cells):
            yield Row(name, tuple(cell or UNSET for cell in cells))

    yield from row("outcome", [WORDS[run.state] for run in runs])
    both = [curves.ends(run) for run in runs]
    for metric in dict.fromkeys(metric for one in both for found in one.values() for metric in found):
        for when in ("before", "after"):
            cells = [_estimate(metrics.estimate(one[when], metric)) for one in both]
            yield from row(f"{metrics.named(metric)} {when}", cells)
    best = [mapping(run.result.get("best")) for run in runs]
    yield from row("best step", [_count(whole(one.get("step"))) for one in best])
    yield from row("steps", [_count(max(_steps(run), default=None)) for run in runs])
    yield from row("last loss", [_last_loss(run) for run in runs])
    yield from row("wall time", [_wall(run) for run in runs])
    yield from row("tokens/s", [_rate(run) for run in runs])
    yield from row("peak memory", [_peak(run) for run in runs])
    yield from row("restarts", [_restarts(run) for run in runs])


def _estimate(found: Estimate | None) -> str | None:
    if found is None:
        return None
    interval = "" if found.low is None or found.high is None else f" [{found.low:.2f}, {found.high:.2f}]"
    count = "" if found.n is None else f" n={found.n:,}"
    return f"{found.value:.2f}{interval}{count}"


def _steps(run: Run) -> list[int]:
    return [point.step for point in run.history.points]


def _restarts(run: Run) -> str:
    kinds = [mark.kind for mark in merged(run.history.marks, items(run.result.get("restarts")))]
    return f"{sum(kind in RESTARTS for kind in kinds)}"


def _last_loss(run: Run) -> str | None:
    losses = [point.loss for point in run.history.points if point.loss is not None]
    return f"{losses[-1]:.4f}" if losses else None


def _wall(run: Run) -> str | None:
    seconds = number(run.result.get("seconds"))
    if seconds is None and run.history.began is not None and run.history.last is not None:
        seconds = run.history.last - run.history.began
    return None if seconds is None else duration(seconds)


def _rate(run: Run) -> str | None:
    tokens, _, _ = beside.throughput(run.history.points)
    return None if tokens is None else f"{tokens:,.0f}"


def _peak(run: Run) -> str | None:
    peak = beside.peak_of(mapping(run.result.get("facts")), run.history.points)
    return None if peak is None else size(peak)


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
