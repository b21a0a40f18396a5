"""What a node that follows node 0 does, from its first connection to the end of the run.

    connect -> welcome -> attempt -> fetch -> ready -> start -> run the ranks -> ended -> the next attempt,
                                                                                          or finished

    node 0 says, or is       this node
    end                      kills its ranks, reports, waits for what follows
    finished                 kills its ranks, ends with the same exit code
    lost                     kills its ranks, ends with 75 if node 0 had committed something in this command,
                             or this machine was asked to stop; else with 1
    refused                  ends with 78
    unreachable              ends with 1

A notice is told to node 0, which asks the run to save and stop, and says `finished` when that is committed.
An advice to save is told to it as well. A second notice, or one before node 0 has answered, ends this node at
once. This node never talks to the run's store. What it keeps lies in a folder of its own, because `runs/` may
be shared between nodes.
"""

from __future__ import annotations

import os
import select
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runner.durable import disk
from runner.errors import (
    AccessDenied,
    DataError,
    JobError,
    NoProgress,
    NotOwner,
    Preempted,
    Problem,
    RunnerError,
    StorageError,
    UsageError,
)
from runner.plan import Plan
from runner.supervisor.fetch import Answer, Request
from runner.supervisor.notices import Notices
from runner.supervisor.order import Order, Share, ordered, share
from runner.supervisor.ranks import TICK
from runner.supervisor.run_folder import RunFolder
from runner.supervisor.uplink import Uplink
from runner.supervisor.verdict import Outcome
from runner.supervisor.wire import Message

_BY_CODE: dict[int, type[RunnerError]] = {
    kind.exit_code: kind
    for kind in (UsageError, DataError, StorageError, Preempted, NotOwner, AccessDenied, NoProgress)
}

_ALL = 1 << 16


@dataclass(frozen=True)
class GroupEnd:
    """How the ranks of a node ended."""

    exit: str
    """In words: `exit code 1: RuntimeError: ...`."""
    outcome: Outcome | None
    """What they left; None if they crashed."""


Look = Callable[[], str | None]
"""`on_tick` of `runner.supervisor.ranks.watch`: a reason that it returns ends what runs."""

Fetch = Callable[[Request, Look], Answer]
"""Raises RunnerError: it cannot be fetched."""

RunGroup = Callable[[Plan, Share, Look, Callable[[str], bool]], GroupEnd]
"""Takes `on_tick` and `on_notice` as `runner.supervisor.ranks.watch` does."""


def pause(notices: Notices) -> None:
    """Wait until something happens, or for `TICK`."""
    if select.select([notices.wakeup], [], [], TICK)[0]:
        os.read(notices.wakeup, _ALL)
    notices.poll()


class Follower:
    """One command of a node that follows.

    Args:
        node: index of this one.
        uplink: wakes `notices`.
        folder: where this node keeps what it has; `nodes/<index>` of the run's.
        line: takes a line for people.
    """

    def __init__(
        self,
        node: int,
        uplink: Uplink,
        notices: Notices,
        folder: RunFolder,
        *,
        fetched: Fetch,
        run_group: RunGroup,
        line: Callable[[str], None],
    ) -> None:
        self._node = node
        self._uplink = uplink
        self._notices = notices
        self._folder = folder
        self._fetched = fetched
        self._run_group = run_group
        self._line = line
        self._answer: Answer | None = None
        self._order: Order | None = None
        """What is to be done, or is being done."""
        self._started = 0
        """The attempt that may run."""
        self._killed: str | None = None
        """Why node 0 wants the ranks of `_order` gone."""
        self._welcome = False
        self._progressed = False
        self._told = False
        self._end: RunnerError | int | None = None
        """How the command ends, once that is known."""

    def run(self) -> int:
        """Follow node 0 to the end of the run. Returns 0: node 0 has committed `done`.

        Raises:
            RunnerError: every other end, with the exit code of node 0 where it said one.
        """
        while self._end is None:
            if self._order is None:
                pause(self._notices)
                self._look()
            else:
                self._attempt(self._order)
        if isinstance(self._end, RunnerError):
            raise self._end
        return self._end

    def _attempt(self, order: Order) -> None:
        number = order.attempt

        def look() -> str | None:
            return self._look() or (None if self._order is order else "node 0 asks for another attempt")

        try:
            plan = self._plan(order, look)
            self._uplink.send({"say": "ready", "attempt": number})
            while (why := look()) is None and self._started != number:
                pause(self._notices)
            if why is None:
                end = self._run_group(plan, share(order, self._node), look, lambda reason: False)
            else:
                end = GroupEnd(f"not started: {why}", None)
        except RunnerError as error:
            self._line(f"attempt {number} cannot run on node {self._node}: {error}")
            end = GroupEnd(str(error), _outcome(error))
        said = None if end.outcome is None else end.outcome.model_dump(mode="json")
        self._uplink.send({"say": "ended", "attempt": number, "exit": end.exit, "outcome": said})
        if self._order is order:
            self._order = None

    def _plan(self, order: Order, look: Look) -> Plan:
        """The plan with the paths of this machine, and what it names fetched."""
        if self._answer is None:
            request = Request(job=order.plan.job, train=order.plan.purpose == "train", pins=order.pins)
            answer = self._fetched(request, look)
            other = sorted(
                path
                for path, print in order.fingerprints.items()
                if answer.fingerprints.get(path, print) != print
            )
            if other:
                raise DataError(
                    f"node {self._node} has other content than node 0 in {', '.join(other)}; remedy: give "
                    "every node the same files"
                )
            self._answer = answer  # the same for every attempt of a command
        attempt = self._folder.attempts / str(order.attempt)
        with disk("create the attempt's folder", attempt):
            if attempt.exists():  # of a run of this name that is gone: node 0 never gives a number twice
                shutil.rmtree(attempt)
            attempt.mkdir(parents=True)
        here: dict[str, Any] = {
            "run_dir": self._folder.path,
            "attempt_dir": attempt,
            "fetched": self._answer.fetched,
        }
        return order.plan.model_copy(update=here)

    def _look(self) -> str | None:
        """Hear node 0, tell it of a notice. Returns why nothing may run now; None: it may."""
        for message in self._uplink.received():
            self._take(message)
        if self._notices.first is not None and not self._welcome:
            self._ends(
                Preempted(f"{self._notices.first}: before node 0 had answered; the same command goes on")
            )
        elif self._notices.first is not None and not self._told:
            self._told = True
            reason = f"{self._notices.first} on node {self._node}"
            self._uplink.send({"say": "notice", "reason": reason, "seconds": self._notices.left})
            self._line(f"{self._notices.first}: node 0 saves and stops the run; a second one stops at once")
        if self._welcome and (advice := self._notices.advice()) is not None:
            self._uplink.send({"say": "advice", "reason": f"{advice} on node {self._node}"})
        if self._notices.hurry:
            self._ends(Preempted("a second notice: this node stopped at once; the same command goes on"))
        return self._killed if self._end is None else "the command ends"

    def _take(self, message: Message) -> None:
        match message["say"]:
            case "welcome":
                self._welcome = True
                self._line(f"node {self._node} follows {self._uplink}")
            case "attempt":
                self._order, self._killed = ordered(message), None
            case "start":
                self._started = message["attempt"]
            case "end" if self._order is not None and message["attempt"] == self._order.attempt:
                self._killed = message["reason"]
            case "progress":
                self._progressed = True
            case "finished":
                self._ends(finished(message["exit_code"], message["error"]))
            case "refused":
                problem = Problem("launch.nodes", message["reason"], message["remedy"], str(self._uplink))
                self._ends(JobError([problem]))
            case "unreachable":
                remedy = "look at the log of node 0, and whether this machine reaches that port"
                self._ends(RunnerError(f"connect to {self._uplink}: {message['reason']}; remedy: {remedy}"))
            case "lost":
                self._ends(self._lost(message["reason"]))

    def _lost(self, reason: str) -> RunnerError:
        what = f"{self._uplink} is lost: {reason}; the ranks of node {self._node} were ended"
        if self._progressed or self._told:
            return Preempted(f"{what}; the same command on all nodes goes on from the last checkpoint")
        return RunnerError(f"{what}; node 0 had committed nothing; remedy: look at its log")

    def _ends(self, end: RunnerError | int) -> None:
        """Note how the command ends; the first says it."""
        if self._end is None:
            self._end = end


def finished(exit_code: int, error: str | None) -> RunnerError | int:
    """The end of a node whose node 0 ended: 0, or an error of the same exit code.

    0                     0
    64 to 77, 93          its exception
    78                    JobError
    any other             RunnerError 1
    """
    if exit_code == 0:
        return 0
    message = f"node 0 ended with {exit_code}: {error or 'it said no reason'}"
    if exit_code == JobError.exit_code:
        return JobError([Problem("", message, "change the job as said, for every node")])
    return _BY_CODE.get(exit_code, RunnerError)(message)


def _outcome(error: RunnerError) -> Outcome:
    return Outcome(outcome=error.outcome, exit_code=error.exit_code, error=str(error))
