"""Asks a metadata service while a supervisor works, in a thread of its own, and tells `Notices` what it says.

Nothing waits for this thread, and nothing that a service does ends it: what fails is asked again, after twice
the pause each time up to `LONGEST`. A service that failed `FAILURES` times in a row is said to be unusable,
once a command.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

from runner.supervisor.metadata.http import Unusable
from runner.supervisor.metadata.sources import Sign, Source
from runner.supervisor.notices import Notices

T = TypeVar("T")

FAILURES = 3
"""In a row, until a person hears of it."""

LONGEST = 60.0
"""Seconds between two questions to a service that does not answer."""

_DOUBLINGS = 10
"""From any pause to far above `LONGEST`; a day of failures would be a number that is none."""


class Watch:
    """A thread that asks, as long as the context lasts.

    Args:
        source: whom; None: nobody, and no thread is started.
        say: takes, from that thread, what a person should know.
    """

    def __init__(self, source: Source | None, notices: Notices, say: Callable[[str], None]) -> None:
        self._source = source
        self._notices = notices
        self._say = say
        self._open = threading.Lock()
        """Held while something is told: nobody is told anything once the context has ended."""
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        if self._source is not None:
            threading.Thread(target=self._serve, args=(self._source,), name="metadata", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:  # the thread may be in the middle of a question; it is not waited for
            self._ended.set()

    def _serve(self, source: Source) -> None:
        told: set[str] = set()
        failures = 0
        said = False
        while not self._ended.is_set():
            pause = source.pause
            try:
                signs = source.look()
                failures = 0
            except Unusable as error:
                signs = []
                failures += 1
                pause = min(LONGEST, pause * 2 ** min(failures, _DOUBLINGS))
                if failures == FAILURES and not said:
                    said = True
                    self._tell(self._say, _unusable(source, str(error)))
            for sign in signs:
                if sign.id not in told:
                    told.add(sign.id)
                    self._tell(self._pass_on, sign)
            self._ended.wait(pause)

    def _pass_on(self, sign: Sign) -> None:
        if sign.kind == "stop":
            self._notices.hear(sign.reason, sign.seconds)
        else:
            self._notices.advise(sign.reason)

    def _tell(self, tell: Callable[[T], None], what: T) -> None:
        with self._open:
            if not self._ended.is_set():
                tell(what)


def _unusable(source: Source, why: str) -> str:
    return (
        f"{source.name} cannot be used: {why}; only a signal tells this run that the machine will be "
        "taken away; remedy: let this container reach it, or set RUNNER_METADATA=off"
    )
