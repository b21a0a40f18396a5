"""`runs/<name>/result.json`: the truth about how a run ended, composed from its events and its last outcome.

    outcome       "done" | "preempted" | "failed"                      public
    exit_code     of the command                                       public
    steps         optimizer steps that are kept                        public
    attempts      trainers that were started                           public
    metrics       {"before": ..., "after": ...}, null if unknown       public
    restarts      [{"attempt", "reason", "step", "per_device"}], step = restored from,
                  per_device = {"from", "to"} after an out of memory, else null
    error         the message, null when done
    adapter       folder of what was trained, null before it is there
    checkpoint    id of the newest committed checkpoint
    versions      of the packages of the last attempt
    facts         what was really in force, as the trainer recorded it
    seconds       wall time of all attempts, from their events

It is written at every end that this process sees, and says nothing about a run that goes on or was killed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from runner.durable import disk, write_json
from runner.events import Event


class Result(BaseModel):
    """The file. A reader of later versions ignores what it does not know."""

    model_config = ConfigDict(frozen=True)

    format: int = 1
    name: str
    outcome: str
    exit_code: int
    steps: int
    attempts: int
    metrics: dict[str, dict[str, Any] | None]
    restarts: list[dict[str, Any]]
    error: str | None
    adapter: str | None
    checkpoint: str | None
    versions: dict[str, str]
    facts: dict[str, Any]
    seconds: float


@dataclass
class Record:
    """What the events of a run add up to."""

    restarts: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=lambda: {"before": None, "after": None})
    seconds: float = 0.0
    last: Event | None = None
    """The newest event of an attempt or of the end of a supervisor."""


def add_up(events: Iterable[Event]) -> Record:
    """Read a run's events, oldest first."""
    record = Record()
    spans: dict[Any, tuple[float, float]] = {}
    for event in events:
        attempt, now = event.get("attempt"), event.get("time")
        if isinstance(attempt, int) and attempt > 0 and isinstance(now, int | float):
            start, _ = spans.get(attempt, (now, now))
            spans[attempt] = (start, now)
        if event["event"] == "restart":
            record.restarts.append(
                {key: event.get(key) for key in ("attempt", "reason", "step", "per_device")}
            )
        elif event["event"] == "evaluation" and event.get("when") in record.metrics:
            record.metrics[event["when"]] = event.get("metrics")
        if event["event"] in ("attempt", "end"):
            record.last = event
    # Never negative, should the machine's clock have been set back.
    record.seconds = round(sum(max(0.0, end - start) for start, end in spans.values()), 3)
    return record


def read(path: Path) -> Result | None:
    """The result of an earlier command; None if there is none that can be read."""
    try:
        return Result.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def write(path: Path, result: Result) -> None:
    """Replace the file."""
    with disk("write the result", path):
        write_json(path, result.model_dump(mode="json"))


def merged_metrics(record: Record, outcome: Mapping[str, Any]) -> dict[str, dict[str, Any] | None]:
    """`before` and `after`: the trainer's last word, else what it reported on the way."""
    return {when: outcome.get(when) or record.metrics[when] for when in ("before", "after")}
