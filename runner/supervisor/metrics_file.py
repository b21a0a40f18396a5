"""Keeps `metrics.prom` up to date and nobody waiting: seldom, not synced; a full disk costs the file only."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runner.events import Event
from runner.manifest import Job
from runner.tracking.prometheus import standing, text

EVERY = 5.0
"""Seconds between two writes, at least."""


class MetricsFile:
    """The file of one command. `note` is for any one thread at a time, `write` for the watching thread."""

    def __init__(self, path: Path, job: Job, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._state = standing(job)
        self._changed = False
        self._wrote: float | None = None

    def resume(self, metrics: Mapping[str, Any]) -> None:
        """Know what earlier commands on the run, here or elsewhere, have evaluated, by `when`."""
        for when, known in metrics.items():
            self._state.evaluated(when, known)

    def note(self, event: Event) -> None:
        """Take the next event."""
        self._state.note(event)
        self._changed = True
        if event["event"] == "end":
            self._wrote = None

    def write(self) -> None:
        """Replace the file, if something changed and it is time. A reader sees the old one or the new."""
        if not self._changed or (self._wrote is not None and self._clock() - self._wrote < EVERY):
            return
        self._changed, self._wrote = False, self._clock()
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        with contextlib.suppress(OSError):
            temporary.write_text(text(self._state), encoding="utf-8")
            temporary.replace(self._path)
