"""`runs/<name>/result.json`: the truth about how a run ended, composed from its record and its last outcome.

    outcome       "done" | "preempted" | "failed"                      public
    exit_code     of the command                                       public
    steps         optimizer steps that are kept                        public
    attempts      trainers that were started                           public
    metrics       {"before": ..., "after": ...}, null if unknown       public
    restarts      the newest 50: [{"attempt", "reason", "step", "per_device"}], step = restored from,
                  per_device = {"from", "to"} after an out of memory, else null
    error         the message, null when done
    fidelity      "exact": no resume changed how the batch is cut; "close": one did, and sums were rounded
                  differently from there on (the events say what it was); null: never resumed
    best          {"step", "metric", "value"} of the evaluation during training that was chosen and exported
                  (`evaluation.metric_for_best_model`), else null
    stopped_early whether `evaluation.early_stopping_patience` ended training before its last step
    adapter       folder of what was trained, null before it is there
    checkpoint    id of the newest committed checkpoint
    versions      of the packages of the last attempt
    facts         what was really in force, as the trainer recorded it
    seconds       wall time of all attempts, on all machines

It is written at every end that this process sees, and says nothing about a run that goes on or was killed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from runner.durable import disk, write_json
from runner.events import Event
from runner.supervisor.now import Now

RESTARTS_KEPT = 50
"""`HEAD` holds them, and is read and written whole."""


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
    fidelity: str | None = None
    best: dict[str, Any] | None = None
    stopped_early: bool = False
    adapter: str | None
    checkpoint: str | None
    versions: dict[str, str]
    facts: dict[str, Any]
    seconds: float

    @property
    def exported_step(self) -> int:
        """The step whose parameters are in `adapter`: the best one's, or the last."""
        return self.steps if self.best is None else int(self.best["step"])


class Record(BaseModel):
    """What the events of a run add up to, on all machines that it was on: `record` in `HEAD`."""

    attempts: int = 0
    """Number of the newest attempt."""
    seconds: float = 0.0
    """Of all attempts, from their events."""
    restarts: list[dict[str, Any]] = []
    """The newest `RESTARTS_KEPT`."""
    metrics: dict[str, Any] = {"before": None, "after": None}
    fidelity: str | None = None
    """Of the least faithful resume."""
    last: dict[str, Any] | None = None
    """The newest event of an attempt or of the end of a supervisor."""
    exit_code: int | None = None
    """Of that end."""
    size: int = 0
    """Bytes of the events file of the last supervisor that are in this."""
    clock: float | None = None
    """Time of the newest event of the attempt."""
    noticed: int = 0
    """How often the run went on after a notice had stopped it."""
    lost: int = 0
    """How often it went on after its supervisor had ended without a word: most often, with its machine."""
    now: Now = Now()
    """Where it stands."""

    def note(self, event: Event) -> None:
        """Take the next event of the run."""
        attempt, now = event.get("attempt"), event.get("time")
        if isinstance(attempt, int) and attempt > 0 and isinstance(now, int | float):
            if attempt == self.attempts and self.clock is not None:
                # Never negative, should the machine's clock have been set back.
                self.seconds = round(self.seconds + max(0.0, now - self.clock), 3)
            self.attempts, self.clock = max(attempt, self.attempts), now
        self.now = self.now.after(event)
        match event["event"]:
            case "restart":
                self.noticed += event.get("after") == "notice"
                self.lost += event.get("after") == "lost"
                restart = {key: event.get(key) for key in ("attempt", "reason", "step", "per_device")}
                self.restarts = [*self.restarts, restart][-RESTARTS_KEPT:]
            case "evaluation" if event.get("when") in self.metrics:
                self.metrics = {**self.metrics, event["when"]: event.get("metrics")}
            case "fidelity" if self.fidelity != "close":
                self.fidelity = event.get("fidelity")
            case "attempt" | "end":
                self.last = {key: event.get(key) for key in ("event", "outcome", "error")}
                self.exit_code = event.get("exit_code")


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
