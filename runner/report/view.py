"""A run as the page shows it: every section decided, nothing drawn. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from runner.planning.words import size
from runner.report import beside, curves, gallery, metrics
from runner.report.beside import Line, Room
from runner.report.history import Commit
from runner.report.job_text import Value
from runner.report.loose import items, mapping, number, text, whole
from runner.report.marks import Kind, Mark, merged
from runner.report.metrics import Compared, Estimate
from runner.report.read import Run
from runner.report.verdict import Verdict, verdict
from runner.supervisor.progress import duration

_COUNTED = {"tokens": "Tokens a row", "image_tokens": "of them for images", "images": "Images a row"}

_AGAIN: dict[Kind, str] = {"preemption": "preempted", "restart": "restarted", "batch": "batch changed"}


@dataclass(frozen=True)
class Fact:
    """A number of the run at large."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Numbered:
    """A mark, by the number that it has on the curves."""

    number: int
    mark: Mark


@dataclass(frozen=True)
class Page:
    """One run."""

    run: Run
    metric: str
    verdict: Verdict
    before: Estimate | None
    after: Estimate | None
    facts: tuple[Fact, ...]
    compared: tuple[Compared, ...]
    meanings: tuple[str, ...]
    """Metrics of them that can be explained."""
    marks: tuple[Numbered, ...]
    values: tuple[tuple[str, ...], ...]
    """Step, loss, gradient norm and learning rate of some steps, as texts."""
    predictions: gallery.Predictions
    audit: tuple[str, ...]
    changed: tuple[Value, ...]
    """Values of the job that somebody set."""
    defaults: tuple[Value, ...]
    beside: tuple[Line, ...]
    room: Room | None
    data: tuple[Fact, ...]
    versions: tuple[tuple[str, str], ...]
    commits: tuple[Commit, ...]
    charts: Mapping[str, Any]


def page(run: Run) -> Page:
    """Decide all that a report says of a run."""
    told, facts = run.history, mapping(run.result.get("facts"))
    both = curves.ends(run)
    before, after = both["before"], both["after"]
    metric = metrics.main_metric(run.value("evaluation.metric"), run.value("method"), after or before)
    ends = metrics.estimate(before, metric), metrics.estimate(after, metric)
    steps = whole(told.plan.get("steps"))
    last = told.points[-1].step if told.points else whole(run.result.get("steps")) or 0
    marks = tuple(Numbered(number, mark) for number, mark in enumerate(_marks(run), start=1))
    plan = beside.planned(run.resolved, told.plan, facts.get("device"))
    return Page(
        run=run,
        metric=metric,
        verdict=verdict(run.state, told.end or run.result, metric, *ends, last, steps),
        before=ends[0],
        after=ends[1],
        facts=tuple(_facts(run, facts, last, steps)),
        compared=metrics.compared(before, after),
        meanings=tuple(one for one in dict.fromkeys([*before, *after]) if one in metrics.MEANING),
        marks=marks,
        values=_values(run),
        predictions=gallery.table(run, metric),
        audit=told.audit,
        changed=tuple(value for value in run.job if not value.is_default),
        defaults=tuple(value for value in run.job if value.is_default),
        beside=tuple(beside.lines(plan, run, facts)),
        room=beside.room(plan, beside.peak_of(facts, told.points)),
        data=tuple(_data(told.plan)),
        versions=tuple(sorted(_versions(run, facts).items())),
        commits=told.commits,
        charts={
            "metric": metrics.named(metric),
            "share": metric not in metrics.MEANS,
            "runs": [curves.data(run, metric, ((one.number, one.mark) for one in marks))],
        },
    )


def _marks(run: Run) -> Iterator[Mark]:
    yield from merged(run.history.marks, items(run.result.get("restarts")))
    best = mapping(run.result.get("best"))
    if (step := whole(best.get("step"))) is not None:
        value = number(best.get("value"))
        told = "" if value is None else f" {value:.4g}"
        yield Mark(step, "best", f"{metrics.named(str(best.get('metric')))}{told}", "")
    if run.result.get("stopped_early") is True and run.history.points:
        yield Mark(run.history.points[-1].step, "early", "the metric got no better", "")


def _facts(run: Run, facts: Mapping[str, Any], last: int, steps: int | None) -> Iterator[Fact]:
    told = run.history
    yield Fact("Steps", f"{last:,}" if steps is None else f"{last:,} of {steps:,}")
    if (kept := whole(mapping(run.result.get("best")).get("step"))) is not None:
        yield Fact("Exported", f"step {kept:,}", _chosen(run))
    seconds = number(run.result.get("seconds"))
    if seconds is None and told.began is not None and told.last is not None:
        seconds = told.last - told.began
    if seconds is not None:
        trained = sum(point.seconds or 0.0 for point in told.points)
        yield Fact("Wall time", duration(seconds), f"{duration(trained)} of it in steps" if trained else "")
    attempts = whole(run.result.get("attempts")) or told.attempts
    yield Fact("Attempts", f"{attempts}", _restarts(run))
    tokens, images, waited = beside.throughput(told.points)
    if tokens is not None and images is not None:
        note = f"{images:,.1f} images/s" + (f", {waited:.0%} waiting for data" if waited else "")
        yield Fact("Throughput", f"{tokens:,.0f} tokens/s", note)
    peak = beside.peak_of(facts, told.points)
    if peak is not None:
        yield Fact("Peak memory", size(peak), str(facts.get("device") or ""))
    if told.points and (loss := told.points[-1].loss) is not None:
        first = told.points[0].loss
        yield Fact("Loss", f"{loss:.4f}", "" if first is None else f"{first:.4f} at first")


def _chosen(run: Run) -> str:
    """How the exported step was chosen, and that this makes its numbers a little too good."""
    metric = metrics.named(str(mapping(run.result.get("best")).get("metric")))
    count = len(run.evaluations)
    return f"the best of {count:,} by {metric}: chosen on the rows that judge it, which flatters it a little"


def _restarts(run: Run) -> str:
    kinds = Counter(mark.kind for mark in merged(run.history.marks, items(run.result.get("restarts"))))
    return ", ".join(f"{word} {kinds[kind]}×" for kind, word in _AGAIN.items() if kinds[kind])


def _values(run: Run, most: int = 20) -> tuple[tuple[str, ...], ...]:
    points = run.history.points
    if not points:
        return ()
    every = -(-len(points) // most)
    chosen = [*points[::every], *(() if (len(points) - 1) % every == 0 else points[-1:])]
    return tuple(
        (
            f"{point.step:,}",
            *(_short(value) for value in (point.loss, point.grad_norm, point.learning_rate)),
        )
        for point in chosen
    )


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _data(told: Mapping[str, Any]) -> Iterator[Fact]:
    facts = mapping(told.get("data"))
    rows, skipped = whole(told.get("rows")), whole(told.get("skipped"))
    if rows is not None:
        yield Fact("Rows to train on", f"{rows:,}", f"{skipped:,} skipped" if skipped else "none skipped")
    for name, label in _COUNTED.items():
        found = mapping(facts.get(name))
        parts = [number(found.get(part)) for part in ("mean", "p50", "p95", "largest")]
        if None not in parts:
            mean, middle, most, largest = (part or 0.0 for part in parts)
            note = f"median {middle:,.0f}, 95 % up to {most:,.0f}, largest {largest:,.0f}"
            yield Fact(label, f"{mean:,.1f}", note)
    for name, why in mapping(facts.get("savings")).items():
        yield Fact(f"speed.{name}", "in force" if why is None else "off", text(why) or "")


def _versions(run: Run, facts: Mapping[str, Any]) -> dict[str, str]:
    said = mapping(run.result.get("versions")) or run.history.versions
    return {str(name): str(version) for name, version in {**said, **mapping(facts.get("versions"))}.items()}
