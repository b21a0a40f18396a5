"""What happens, told once: to events.jsonl at once and from any thread, to the run's record, to the screen,
and to `metrics.prom`.

Only the thread that watches the trainer draws; what other threads say waits until it looks. What libraries
wrote, as the last line of a log, may hold a credential: no words are kept or drawn with one.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from runner import events
from runner.errors import DataError
from runner.events import Event, EventLog
from runner.job.secrets import without_secrets
from runner.supervisor.display import Display
from runner.supervisor.metrics_file import MetricsFile
from runner.supervisor.result import Record

_WORDS = ("reason", "message", "error", "text")
"""Fields of events that somebody wrote for people."""


def cleaned(event: Mapping[str, Any]) -> Event:
    """An event without credentials in its words."""
    said = {key: event[key] for key in _WORDS if isinstance(event.get(key), str)}
    return {**event, **{key: without_secrets(text, os.environ) for key, text in said.items()}}


class Journal:
    """The voice of one supervisor; made by the thread that draws.

    Args:
        wake: called when another thread has said something.
    """

    def __init__(
        self, log: EventLog, screen: Display, wake: Callable[[], None], metrics: MetricsFile | None = None
    ) -> None:
        self._log = log
        self._screen = screen
        self._metrics = metrics
        self._wake = wake
        self._lock = threading.Lock()
        self._artist = threading.get_ident()
        self._unseen: deque[Event] = deque()
        self.record = Record()

    def resume(self, record: Mapping[str, Any], here: bool, file: Path) -> None:
        """Go on from the record in `HEAD`.

        Args:
            here: the last supervisor wrote to this same `file`, which has what it did since.

        Raises:
            DataError: it is no such record.
        """
        with self._lock:
            try:
                kept = Record.model_validate(record)
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(str(part) for part in first["loc"])
                raise DataError(
                    f"HEAD: record: {place}: {first['msg']}; remedy: put HEAD back from a copy, or runner "
                    "checkpoints adopt with the newest manifest"
                ) from error
            if here:
                for event in events.read(file, kept.size):
                    kept.note(event)
            kept.size = self._log.size
            self.record = kept
            if self._metrics is not None:
                self._metrics.resume(kept.metrics)

    def begin_attempt(self, number: int) -> None:
        """What is said from now on belongs to this attempt."""
        self._log.attempt = number

    @property
    def size(self) -> int:
        """Bytes of the events file."""
        return self._log.size

    @property
    def attempt(self) -> int:
        """The attempt that events belong to, 0 before the first."""
        return self._log.attempt

    def say(self, event: Mapping[str, Any]) -> None:
        """Tell what happened."""
        with self._lock:
            written = self._log.write(cleaned(event))
            self.record.note(written)
            self.record.size = self._log.size
            if self._metrics is not None:
                self._metrics.note(written)
            self._unseen.append(written)
        if threading.get_ident() == self._artist:
            self.show()
        else:
            self._wake()

    def show(self) -> None:
        """Draw what has been said; the watching thread's."""
        while self._unseen:
            self._screen.show(self._unseen.popleft())
        if self._metrics is not None:
            with self._lock:
                self._metrics.write()

    def line(self, text: str) -> None:
        """A line for the person alone; the watching thread's."""
        self.show()
        self._screen.line(without_secrets(text, os.environ))

    def loud(self, text: str) -> None:
        """`line` of what came of it, or what went wrong: also where it is to be quiet."""
        self.show()
        self._screen.loud(without_secrets(text, os.environ))

    def snapshot(self) -> dict[str, Any]:
        """The record as `HEAD` keeps it."""
        with self._lock:
            return self.record.model_dump(mode="json")
