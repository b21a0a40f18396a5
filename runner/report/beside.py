"""The plan of a run beside what was measured. Pure: the trainer told the facts, the arithmetic is the plan's.

Without them, as in runs of earlier versions, the planned column has what the events say anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from pydantic import ValidationError

from runner.facts import DataFacts, ModelFacts
from runner.manifest import Job
from runner.memory import Estimate, Subject, estimate
from runner.plan import Geometry
from runner.planning.numbers import checkpoint_bytes, trainable
from runner.planning.words import size
from runner.report.history import Point
from runner.report.loose import mapping, number, whole
from runner.report.read import Run
from runner.supervisor.progress import duration

Inside = Literal["inside", "below", "above"]


@dataclass(frozen=True)
class Line:
    """One quantity."""

    name: str
    planned: str
    measured: str
    note: str = ""


@dataclass(frozen=True)
class Room:
    """Memory of one device."""

    low: int
    high: int
    peak: int | None
    unknown: tuple[str, ...]
    """What is not counted, and why."""

    @property
    def where(self) -> Inside | None:
        """Where the peak lies; None while it is not known.

        low   high   peak   where
        1     2      1      inside
        1     2      3      above
        2     3      1      below
        """
        if self.peak is None:
            return None
        return "below" if self.peak < self.low else "above" if self.peak > self.high else "inside"


@dataclass(frozen=True)
class Planned:
    """What the trainer told of its plan, as far as it can be read."""

    job: Job
    model: ModelFacts
    data: DataFacts
    cut: Geometry
    strategy: str
    device: Literal["cpu", "cuda"]

    @property
    def memory(self) -> Estimate:
        strategy: Any = self.strategy
        return estimate(Subject(self.model, self.data, self.job, self.cut, strategy, self.device))


def planned(job: Mapping[str, Any], told: Mapping[str, Any], device: Any) -> Planned | None:
    """Read the facts of a `plan` event; None if it has none, or not those of this version.

    Args:
        job: the resolved job.
        told: the event.
        device: of result.json's facts; a name that begins with cuda is a GPU.
    """
    try:
        return Planned(
            job=Job.model_validate(job),
            model=ModelFacts.model_validate(told.get("model")),
            data=DataFacts.model_validate(told.get("data")),
            cut=Geometry.model_validate(told.get("geometry")),
            strategy=str(told.get("strategy")),
            device="cuda" if str(device).startswith("cuda") else "cpu",
        )
    except ValidationError:
        return None


def room(plan: Planned | None, peak: int | None) -> Room | None:
    """The interval that memory was estimated to lie in, and where its peak did."""
    if plan is None:
        return None
    found = plan.memory
    return Room(found.low, found.high, peak, found.unknown)


def peak_of(facts: Mapping[str, Any], points: Iterable[Point]) -> int | None:
    """Most bytes in use by the last trainer, whose cut of the batch is the one that was estimated: as it said
    at its end, else at its last step."""
    said = [point.memory for point in points if point.memory is not None]
    return whole(facts.get("peak_memory_bytes")) or (said[-1] if said else None)


def lines(plan: Planned | None, run: Run, facts: Mapping[str, Any]) -> list[Line]:
    """Quantities that a plan has and a run measures.

    Args:
        facts: of result.json.
    """
    told, points = run.history.plan, run.history.points
    steps = whole(told.get("steps"))
    found = [Line("Optimizer steps", _count(steps), _count(points[-1].step if points else None))]
    found.append(_tokens(plan, told, points))
    found.append(_images(plan, points))
    if plan is not None:
        trains = _count(trainable(plan.model))
        found.append(Line("Trained parameters", trains, _count(whole(facts.get("trainable_parameters")))))
        if steps is not None:
            about = checkpoint_bytes(plan.job, plan.model, plan.data, steps)
            here = "–" if run.checkpoint_bytes is None else size(run.checkpoint_bytes)
            found.append(Line("Last checkpoint", f"about {size(about)}", here))
    cut, now = (mapping(one.get("geometry")) for one in (run.history.first_plan, told))
    found.append(Line("Rows a step", _cut(cut), _cut(now), "at once × accumulated, in every process"))
    found.append(Line("Time a step", "–", _time(points)))
    return found


def throughput(points: Iterable[Point]) -> tuple[float | None, float | None, float | None]:
    """Tokens a second, images a second, and the share of the time that data was waited for."""
    timed = [point for point in points if point.seconds]
    seconds = sum(point.seconds or 0.0 for point in timed)
    if not seconds:
        return None, None, None
    tokens, images = (sum(getattr(point, name) or 0 for point in timed) for name in ("tokens", "images"))
    return tokens / seconds, images / seconds, sum(point.waited or 0.0 for point in timed) / seconds


def _tokens(plan: Planned | None, told: Mapping[str, Any], points: tuple[Point, ...]) -> Line:
    longest = whole(told.get("tokens_max"))
    said = "–" if longest is None else f"longest {longest:,}"
    if plan is not None:
        tokens = plan.data.tokens
        said = f"mean {tokens.mean:,.1f}, 95 % up to {tokens.p95:,}, longest {tokens.largest:,}"
    mean = _mean(points, "tokens")
    pairs = plan is not None and plan.job.method == "dpo"
    note = "a pair is planned by its longer answer; a step counts what was fed" if pairs else ""
    return Line("Tokens a row", said, "–" if mean is None else f"mean {mean:,.1f}", note)


def _images(plan: Planned | None, points: tuple[Point, ...]) -> Line:
    mean = _mean(points, "images")
    said = "–" if plan is None else f"mean {plan.data.images.mean:,.2f}, most {plan.data.images.largest:,}"
    return Line("Images a row", said, "–" if mean is None else f"mean {mean:,.2f}")


def _mean(points: tuple[Point, ...], name: str) -> float | None:
    """Of a count a row, over the steps that say both."""
    told = [(getattr(point, name), point.rows) for point in points]
    known = [(count, rows) for count, rows in told if count is not None and rows]
    rows = sum(rows for _, rows in known)
    return sum(count for count, _ in known) / rows if rows else None


def _time(points: tuple[Point, ...]) -> str:
    seconds = [point.seconds for point in points if point.seconds is not None]
    if not seconds:
        return "–"
    return f"median {median(seconds):.2f} s; {duration(sum(seconds))} in all steps"


def _cut(cut: Mapping[str, Any]) -> str:
    parts = [number(cut.get(name)) for name in ("per_device", "accumulation", "world")]
    if None in parts or not cut:
        return "–"
    each, accumulation, world = (int(part or 0) for part in parts)
    processes = "" if world == 1 else f" × {world} processes"
    return f"{each} × {accumulation}{processes}"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
