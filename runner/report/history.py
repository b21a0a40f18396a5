"""The events of a run, added up to what happened in it: its steps, its marks, its evaluations. Pure.

A run is told by several trainers, and each may do again what the one before had not committed: the last word
on a step counts, and steps after the one that an attempt goes on from are forgotten until they are done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from runner.events import Event
from runner.report.loose import items, mapping, number, text, texts, whole
from runner.report.marks import Mark, of_fidelity, of_restart

KEPT = 5
"""Messages and warnings of one kind that are kept."""


@dataclass(frozen=True)
class Point:
    """One optimizer step. None where nobody wrote it down."""

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens: int | None = None
    images: int | None = None
    rows: int | None = None
    seconds: float | None = None
    """Of the step, waiting for data included."""
    waited: float | None = None
    """Seconds of it that data was waited for."""
    memory: int | None = None
    """Most bytes in use so far."""


@dataclass(frozen=True)
class Measured:
    """The metrics at a step."""

    step: int
    when: str
    """before, during or after."""
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Commit:
    """A checkpoint that was committed."""

    id: str
    step: int
    time: float | None
    seconds: float | None


@dataclass(frozen=True)
class History:
    """What happened."""

    points: tuple[Point, ...] = ()
    marks: tuple[Mark, ...] = ()
    measured: tuple[Measured, ...] = ()
    commits: tuple[Commit, ...] = ()
    audit: tuple[str, ...] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)
    """The newest `plan` event."""
    first_plan: Mapping[str, Any] = field(default_factory=dict)
    """The first one."""
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    end: Event | None = None
    """How the last supervisor ended; None while one is at work, or if it was killed."""
    began: float | None = None
    last: float | None = None
    """Times of the first and the newest event."""
    phase: str | None = None
    attempts: int = 0


def history(events: Iterable[Event], record: Iterable[Mapping[str, Any]] = ()) -> History:
    """Add up the events of a run, oldest first.

    Args:
        record: lines of `steps.jsonl`: what the events of other machines said of steps.
    """
    told = _Told()
    for event in events:
        told.note(event)
    return told.history(tuple(filter(None, map(_recorded, record))))


class _Told:
    """What was said so far."""

    def __init__(self) -> None:
        self.points: dict[int, Point] = {}
        self.marks: list[Mark] = []
        self.measured: list[Measured] = []
        self.commits: list[Commit] = []
        self.warnings: list[str] = []
        self.base = History()
        self.reached = 0
        self.origin = 0
        """The step that the newest attempt went on from."""

    def note(self, event: Event) -> None:
        """Take the next event."""
        now = number(event.get("time"))
        attempt = whole(event.get("attempt")) or 0
        self.base = replace(
            self.base,
            began=now if self.base.began is None else self.base.began,
            last=self.base.last if now is None else now,
            attempts=max(self.base.attempts, attempt),
        )
        step = whole(event.get("step"))
        match event["event"]:
            case "step" if step is not None:
                self.points[step] = _of_event(step, event)
                self.reached = step
            case "attempt":
                self._goes_on(step or 0)
            case "restart":
                self.marks.append(of_restart(event, attempt, self.reached))
            case "fidelity":
                self.marks += of_fidelity(texts(event.get("changes")), attempt, self.origin)
            case "evaluation" if step is not None:
                self._evaluated(step, event)
            case "commit" if step is not None:
                commit = Commit(str(event.get("id")), step, now, number(event.get("seconds")))
                self.commits.append(commit)
            case "bad":
                title, reason = "checkpoint is damaged", str(event.get("reason"))
                self.marks.append(Mark(self.origin, "damage", title, reason, attempt))
            case "audit":
                self.base = replace(self.base, audit=texts(event.get("lines")))
            case "plan":
                self.base = replace(self.base, plan=event, first_plan=self.base.first_plan or event)
            case "phase":
                self.base = replace(self.base, phase=text(event.get("phase")))
            case "warning":
                self.warnings.append(str(event.get("message")))
            case "start":
                told = mapping(event.get("versions")).items()
                versions = {name: str(version) for name, version in told}
                self.base = replace(self.base, versions=versions, end=None, phase=None)
            case "end":
                self.base = replace(self.base, end=event)

    def _goes_on(self, step: int) -> None:
        self.origin = step
        self.points = {number: point for number, point in self.points.items() if number <= step}
        self.measured = [one for one in self.measured if one.step <= step or one.when == "before"]

    def _evaluated(self, step: int, event: Event) -> None:
        found = Measured(step, str(event.get("when")), mapping(event.get("metrics")))
        before = [one for one in self.measured if (one.step, one.when) == (step, found.when)]
        others = [one for one in self.measured if one not in before]
        merged = {name: value for one in before for name, value in one.metrics.items()}
        self.measured = [*others, replace(found, metrics={**merged, **found.metrics})]

    def history(self, record: tuple[Point, ...]) -> History:
        points = {**{point.step: point for point in record}, **self.points}
        return replace(
            self.base,
            points=tuple(points[step] for step in sorted(points)),
            marks=tuple(self.marks),
            measured=tuple(sorted(self.measured, key=lambda one: one.step)),
            commits=tuple(self.commits),
            warnings=tuple(dict.fromkeys(self.warnings))[-KEPT:],
        )


def _of_event(step: int, event: Event) -> Point:
    return Point(
        step=step,
        loss=number(event.get("loss")),
        grad_norm=number(event.get("grad_norm")),
        learning_rate=number(event.get("learning_rate")),
        tokens=whole(event.get("tokens")),
        images=whole(event.get("images")),
        rows=len(items(event.get("ids"))) or None,
        seconds=number(event.get("seconds")),
        waited=number(event.get("data_seconds")),
        memory=whole(event.get("memory_bytes")),
    )


def _recorded(line: Mapping[str, Any]) -> Point | None:
    step = whole(line.get("step"))
    if step is None:
        return None
    return _of_event(step, {**line, "ids": line.get("rows")})
