"""What happened, for machines: JSON lines in `runs/<name>/events.jsonl`, and the reader of a trainer's pipe.

    {"time": 1767225600.25, "attempt": 2, "event": "step", "step": 17, "loss": 0.41, ...}

Events of the trainer: phase, probe, plan, audit, begin, step, progress, checkpoint, evaluation, warning,
message.
Events of the supervisor:

    start       a supervisor took the run: versions
    attempt     a trainer starts: restore (id or null), step
    restart     why there is another attempt: reason, step; after: trainer, or of a whole command notice,
                lost, failure; after an out of memory per_device: {from, to}
    fidelity    how an attempt goes on from its checkpoint: fidelity (exact, close), changes (texts)
    commit      a checkpoint is committed: id, step, leftover; seconds that it took
    replaced    a checkpoint that waited to be sent is given up for a newer one: id, by
    store       a call to the store failed and is made again: message, seconds waited
    owner       the run is taken: epoch
    wait, go    training waits for the store, or goes on: at_risk, seconds
    bad         a committed checkpoint does not verify: id, reason
    removed     something that nobody committed is deleted: id, reason
    notice      asked to stop: reason; seconds until the machine is gone, null if nobody said
    advice      asked to save at once and go on: reason
    garbage     a line on the pipe that is no event: bytes, text
    end         how the supervisor ended: outcome, exit_code, error

The reader is lenient, because a kill can leave half a line anywhere; the writer never makes a bad one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from runner.durable import disk

Event = dict[str, Any]

LONGEST = 1 << 20
"""Bytes of the longest line that is taken for an event; far above a step of many thousand rows."""

_SHOWN = 200
"""Characters kept of a line that is no event."""

_NUMBER = (int, float)
_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "phase": {"phase": str},
    "probe": {"per_device": int},
    "begin": {"step": int, "ids": list},
    "step": {"step": int, "steps": int, "loss": _NUMBER, "tokens": int, "images": int, "seconds": _NUMBER},
    "progress": {"phase": str, "done": int, "total": int},
    "checkpoint": {"id": str, "step": int},
    "evaluation": {"when": str},
}
"""What the supervisor reads of a trainer's events without asking again."""


class EventLog:
    """Appends events to a file, each with its time and attempt, each by one write."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self.attempt = 0
        """Goes into every event; 0 before the first trainer."""
        with disk("write events", path):
            self._file = path.open("ab+", buffering=0)
            self._end_half_line()

    def write(self, event: Mapping[str, Any]) -> Event:
        """Append an event and return it as written."""
        stamped = {"time": self._clock(), "attempt": self.attempt, **event}
        with disk("write events", self._path):
            self._file.write(encoded(stamped))
        return stamped

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _end_half_line(self) -> None:
        """A kill may have left half a line; the next event starts on its own."""
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")


def encoded(event: Mapping[str, Any]) -> bytes:
    """An event as its line."""
    return (json.dumps(event, ensure_ascii=False, default=str) + "\n").encode("utf-8", "replace")


def read(path: Path, begin: int = 0) -> Iterator[Event]:
    """The events of a file from a byte on, oldest first; what is no event is passed over. No file: none."""
    if not path.exists():
        return
    with disk("read events", path), path.open("rb") as file:
        file.seek(begin)
        for line in file:
            event = parse(line)
            if event is not None:
                yield event


def parse(line: bytes) -> Event | None:
    """One line as an event: a JSON object with a text under `event`. None if it is something else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("event"), str) else None


class LineReader:
    """Cuts the bytes of a pipe into events. Whatever comes, memory is bounded and the next line is read.

    Bytes that are no event come out as one `garbage` event a line.
    """

    def __init__(self) -> None:
        self._rest = bytearray()
        self._dropped = 0
        """Bytes of the current line that were thrown away because it is too long."""

    def feed(self, data: bytes) -> Iterator[Event]:
        """Take what the pipe gave; yields the events that it completes."""
        *whole, last = data.split(b"\n")
        for piece in whole:
            self._add(piece)
            yield from self._end()
        self._add(last)

    def close(self) -> Iterator[Event]:
        """The writer is gone; what is left is half a line."""
        if self._rest or self._dropped:
            yield from self._end()

    def _add(self, piece: bytes) -> None:
        room = LONGEST - len(self._rest)
        self._rest += piece[:room]
        self._dropped += len(piece[room:])

    def _end(self) -> Iterator[Event]:
        line, dropped = bytes(self._rest), self._dropped
        self._rest.clear()
        self._dropped = 0
        event = None if dropped else parse(line)
        if event is not None and _well_formed(event):
            yield event
        elif line.strip() or dropped:
            text = line[: 4 * _SHOWN].decode("utf-8", "replace")[:_SHOWN]
            yield {"event": "garbage", "bytes": len(line) + dropped, "text": text}


def _well_formed(event: Event) -> bool:
    fields = _FIELDS.get(event["event"], {})
    return all(isinstance(event.get(name), kind) for name, kind in fields.items())
