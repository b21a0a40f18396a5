"""Who is told how a run goes: a person, a person who wants peace, or a program.

    lines    `runner.supervisor.screen.Screen`: a bar on a terminal, lines elsewhere
    quiet    the same, warnings and the verdict alone
    json     `Stream`: every event as one line of JSON on standard output, and no other word

What ends a command is on standard error, whoever listens (`runner.cli`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import BinaryIO, Literal, Protocol

from runner.events import Event, encoded
from runner.supervisor.screen import Screen, silence

Voice = Literal["lines", "quiet", "json"]


class Display(Protocol):
    """Takes everything; shows what its listener asked for. Nothing that becomes of it stops a run."""

    def show(self, event: Event) -> None:
        """What happened."""
        ...

    def line(self, text: str) -> None:
        """A line for a person about how it goes."""
        ...

    def loud(self, text: str) -> None:
        """A line for a person that says what came of it, or what went wrong."""
        ...

    def tick(self) -> None:
        """A moment passed."""
        ...

    def close(self) -> None:
        """There is no more progress to show; lines may follow."""
        ...


class Stream:
    """Events for a program, as events.jsonl has them, at once.

    Args:
        file: where to; standard output by default.
        clock: the time of an event that has none.
    """

    def __init__(self, file: BinaryIO | None = None, clock: Callable[[], float] = time.time) -> None:
        self._file = file or (None if sys.stdout is None else sys.stdout.buffer)
        self._clock = clock

    def show(self, event: Event) -> None:
        if self._file is None:
            return
        try:
            self._file.write(encoded({"time": self._clock(), "attempt": 0, **event}))
            self._file.flush()
        except (OSError, ValueError):  # nobody reads any more, a full disk, a closed file
            silence(self._file)
            self._file = None

    def line(self, text: str) -> None:
        del text

    def loud(self, text: str) -> None:
        del text

    def tick(self) -> None:
        pass

    def close(self) -> None:
        pass


def display(voice: Voice) -> Display:
    """The display on standard output."""
    return Stream() if voice == "json" else Screen(quiet=voice == "quiet")
