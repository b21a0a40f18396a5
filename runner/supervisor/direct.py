"""What a trainer is asked for while it works: save at this interval, save now, wait for the store, stop.

store                             notice    time left            asked
keeps up                          -         -                    go
further behind than max_loss      -         -                    wait, until it is not
-                                 yes       enough, or unknown   stop: save, and end
-                                 yes       too little to save   ended; what is under way is committed

An advice asks for one save more, and changes nothing else; several within `APART` are one. The time left is
what RUNNER_GRACE_SECONDS and the notice say, the shorter of both; a later notice can only shorten it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from runner import request
from runner.errors import JobError, Problem
from runner.request import Request
from runner.supervisor.journal import Journal
from runner.supervisor.pace import Pace

GRACE = "RUNNER_GRACE_SECONDS"
"""Variable: seconds from a notice until the machine is gone; unset: nobody knows."""

MARGIN = 1.0
"""Seconds of the grace period that are left for the end of this process."""

APART = 60.0
"""Seconds from an advice until the next one counts: all machines of a run may get the same, and of a service
that says it in other words each time a run would do nothing but save."""

CHANGE = 1.25
"""The interval between saves is told again when it has changed by this factor."""


def grace_seconds(environ: Mapping[str, str]) -> float | None:
    """The grace period of this machine; None where nobody said.

    Raises:
        JobError: it is no number of seconds.
    """
    text = environ.get(GRACE)
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        reason = f"{GRACE}={text!r} is no number of seconds"
        raise JobError([Problem("", reason, f"set {GRACE} to the grace period, as 30, or leave it out")])
    return seconds


class Director:
    """Requests to the trainers of one supervisor.

    Args:
        grace: seconds from a notice until the machine is gone; None: unknown.
    """

    def __init__(
        self,
        pace: Pace,
        grace: float | None,
        journal: Journal,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pace = pace
        self._grace = grace
        self._journal = journal
        self._clock = clock
        self._folder: Path | None = None
        self._asked = Request()
        self._said_slow = False
        self._advised: float | None = None
        self.deadline: float | None = None
        """On the monotonic clock, when the store has to have everything; None: no notice, or nobody knows."""

    def begin(self, attempt_dir: Path) -> None:
        """Talk to the trainer of this attempt from now on; it knows the interval from its plan."""
        self._pace.begin()
        self._folder = attempt_dir
        self._asked = Request(save_seconds=self._pace.save_seconds)

    def save(self, reason: str) -> None:
        """Answer an advice: one save more, at the next step's end."""
        early = self._advised is not None and self._clock() - self._advised < APART
        if self._asked.action != "stop" and not early:
            self._advised = self._clock()
            self._journal.say({"event": "advice", "reason": reason})
            self._journal.line(f"{reason}: saving now, and going on")
            self._ask(replace(self._asked, saves=self._asked.saves + 1))

    def stop(self, reason: str, left: float | None = None) -> bool:
        """Answer a notice. True when there is no time to save: the trainer is to be ended.

        Args:
            left: seconds until the machine is gone, as the notice said; None: it did not.
        """
        grace = min((known for known in (self._grace, left) if known is not None), default=None)
        if grace is not None:
            self.deadline = self._clock() + grace - MARGIN
            if grace - MARGIN < self._pace.last_save:
                self._journal.line(
                    f"{reason}: {grace:.3g} s of grace are too few for a save and its commit "
                    f"({self._pace.last_save:.1f} s): stopping with what is committed"
                )
                return True
        self._journal.line(f"{reason}: saving and stopping; a second one stops at once")
        self._ask(Request("stop", reason))
        return False

    def look(self, left: float | None = None) -> str | None:
        """Ask for what is right by now; returns why the trainer has to be ended, if it has.

        Args:
            left: seconds until the machine is gone, as all notices say.
        """
        if self._asked.action == "stop":
            if left is not None:
                until = self._clock() + left - MARGIN
                self.deadline = until if self.deadline is None else min(until, self.deadline)
            late = self.deadline is not None and self._clock() >= self.deadline - self._pace.commit_seconds
            return "the grace period leaves no time to save" if late else None
        if not self._said_slow and (slow := self._pace.too_slow()) is not None:
            self._said_slow = True
            self._journal.say({"event": "warning", "message": slow})
        interval, before = self._pace.save_seconds, self._asked.save_seconds or 0.0
        if self._pace.behind and self._asked.action == "go":
            at_risk = round(self._pace.at_risk, 1)
            reason = f"{at_risk} s of training are not in the store yet"
            # asked first: who reads the event may count on the request being there
            self._ask(replace(self._asked, action="wait", reason=reason, save_seconds=interval))
            self._journal.say({"event": "wait", "at_risk": at_risk})
            self._journal.line(f"training waits for the store: {reason}")
        elif not self._pace.behind and self._asked.action == "wait":
            self._ask(replace(self._asked, action="go", reason="", save_seconds=interval))
            self._journal.say({"event": "go", "at_risk": round(self._pace.at_risk, 1)})
            self._journal.line("the store has caught up: training goes on")
        elif max(interval, before) > CHANGE * min(interval, before):
            self._ask(replace(self._asked, save_seconds=interval))
        return None

    def _ask(self, asked: Request) -> None:
        assert self._folder is not None
        self._asked = asked
        request.write(self._folder, asked)
