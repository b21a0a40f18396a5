"""When a trainer hangs: it has said nothing for longer than anything that it does may take. Acts on nothing.

    signs of life    any event; a log that has grown (libraries draw bars of what sends no event)
    limit            the larger of `FLOOR` and `STEPS` times the median of the last steps, in every phase
    phase `wait`     never a hang: the trainer waits because its supervisor asked it to

    start, load, data, probe, first step    `FLOOR`, because no step has been timed
    step, eval, save, export                the limit; a slow machine is slow in all of them

Only time in which this process itself runs counts. A laptop that slept, a supervisor that was stopped or that
was busy with a long commit has not watched, and the trainer's signs of life may still lie in the pipe.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

from runner.events import Event
from runner.supervisor.ranks import TICK

FLOOR = 600.0
"""Seconds: longer than the silent stretches of a sound run, a model's load or a first step that compiles."""

STEPS = 20
"""A step that takes this many times the usual one is no slow step."""

WAIT = "wait"
"""The phase in which a trainer waits for the store, because the supervisor asked it to."""

_WINDOW = 20
"""Steps whose median is the usual one."""

_MOST = 4 * TICK
"""Seconds that a single tick may count."""


class Watchdog:
    """The silence of one trainer.

    Args:
        clock: seconds that do not go on while the machine sleeps; only their differences matter.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked = clock()
        self._silent = 0.0
        self._waits = False
        self._log = 0
        self._steps: deque[float] = deque(maxlen=_WINDOW)

    @property
    def limit(self) -> float:
        """Seconds of silence that are a hang."""
        usual = statistics.median(self._steps) if self._steps else 0.0
        return max(FLOOR, STEPS * usual)

    def note(self, event: Event) -> None:
        """Take an event of the trainer."""
        self._silent = 0.0
        if event["event"] == "phase":
            self._waits = event["phase"] == WAIT
        elif event["event"] == "step":
            self._steps.append(event["seconds"])

    def tick(self, log: int) -> str | None:
        """Look at the clock: `no sign of life for 600 s` if it hangs, else None.

        Args:
            log: bytes in the trainer's log.
        """
        now = self._clock()
        self._silent += min(now - self._looked, _MOST)
        self._looked = now
        if log != self._log or self._waits:
            self._silent, self._log = 0.0, log
        return f"no sign of life for {self.limit:.0f} s" if self._silent >= self.limit else None
