"""What a run has committed by now, read from its folder again and again. Writes nothing.

    newest/<id>/steps.jsonl   every step up to the newest committed checkpoint, whoever did it
    evaluations.jsonl         every evaluation during training, whoever did it
    events.jsonl              of this machine: seconds of steps, evaluations, how a command ended

What is being restored is called `*.partial`, and every file may be gone between two lines of ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.events import Event, parse
from runner.tracking.rows import Ending, Row, finite, flat, of_evaluation, of_step

EVENTS_AT_ONCE = 8 << 20
"""Bytes."""


class Feed:
    """The rows of one run.

    Args:
        batch: rows of a step.
        before: metrics before training, if they are known.
    """

    def __init__(self, run_dir: Path, batch: int, before: dict[str, Any] | None) -> None:
        self._run = run_dir
        self._batch = batch
        self._metrics: dict[str, dict[str, Any]] = {} if before is None else {"before": before}
        self._evaluations: list[Row] = [] if before is None else [of_evaluation(0, before)]
        """That are not committed yet."""
        self._offset = 0
        self._steps: dict[int, Event] = {}
        """The newest event of steps that are not committed yet."""
        self._epoch_steps: int | None = None
        self._committed = 0
        self._checkpoint: str | None = None
        self._end: Event | None = None

    def look(self) -> list[Row]:
        """The rows that were committed since the last call. A row of an evaluation may come again."""
        while self._read_events():
            pass
        rows = list(self._new_steps())
        ready = [row for row in self._evaluations if row.step <= self._committed]
        self._evaluations = [row for row in self._evaluations if row.step > self._committed]
        return rows + ready

    @property
    def ending(self) -> Ending | None:
        """How the command ended; None while it has not said so."""
        if self._end is None:
            return None
        summary = {
            name: value
            for when, metrics in self._metrics.items()
            for name, value in finite(flat(metrics, f"{when}/")).items()
        }
        return Ending(str(self._end.get("outcome")), int(self._end.get("exit_code") or 0), summary)

    def _read_events(self) -> bool:
        """Take the next whole lines; False when there is none."""
        with (self._run / "events.jsonl").open("rb") as file:
            file.seek(self._offset)
            data = file.read(EVENTS_AT_ONCE)
        whole = data.rfind(b"\n") + 1
        for line in data[:whole].splitlines():
            if (event := parse(line)) is not None:
                self._note(event)
        self._offset += whole
        return whole > 0

    def _note(self, event: Event) -> None:
        match event:
            case {"event": "step", "step": int(step)}:
                self._steps[step] = event
            case {"event": "plan", "rows": int(rows)}:
                self._epoch_steps = -(-rows // self._batch)
            case {"event": "evaluation", "when": str(when), "step": int(step), "metrics": dict(metrics)}:
                if when in ("before", "after"):
                    self._metrics[when] = metrics
                self._evaluations.append(of_evaluation(step, metrics, event.get("time")))
            case {"event": "attempt", "step": int(restored)}:  # what came after is done again
                self._evaluations = [row for row in self._evaluations if row.step <= restored]
            case {"event": "start"}:
                self._end = None  # of an earlier command
            case {"event": "end"}:
                self._end = event

    def _new_steps(self) -> Iterator[Row]:
        if self._epoch_steps is None and self._end is None:
            return  # on a new machine: the trainer is about to say how long an epoch is
        try:
            folder = next(path for path in (self._run / "newest").iterdir() if path.suffix != ".partial")
            if folder.name == self._checkpoint:
                return
            lines = (folder / "steps.jsonl").read_text().splitlines()
            kept = self._run / "evaluations.jsonl"
            evaluations = kept.read_text().splitlines() if kept.exists() else []
        except (FileNotFoundError, StopIteration):
            return  # it is being replaced by the next one
        for line in lines[self._committed :]:
            step = json.loads(line)
            event = self._steps.pop(step["step"], {})
            epoch = None if not self._epoch_steps else round(step["step"] / self._epoch_steps, 4)
            yield of_step(step, seconds=event.get("seconds"), time=event.get("time"), epoch=epoch)
        for line in evaluations:
            told = json.loads(line)
            self._evaluations.append(of_evaluation(told["step"], told["metrics"]))
        self._committed = max(self._committed, len(lines))
        self._checkpoint = folder.name
