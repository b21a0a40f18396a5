"""The nodes that follow this one, as the attempts of node 0 see them: ordered, watched, ended together.

    gather -> order -> all are ready -> start -> one is lost | ends badly -> end -> all have ended
                                                 one is asked to stop, or to save -> so is the run

A run on one node has nobody to wait for, and opens no port. What is said is in `runner.supervisor.wire`, what
a node makes of it in `follow`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Self

from runner.errors import Preempted, RunnerError
from runner.manifest import Job
from runner.plan import Plan
from runner.supervisor.attempt import Ended, is_cause
from runner.supervisor.environment import free_port
from runner.supervisor.follow import GroupEnd
from runner.supervisor.hello import Hello, job_hashes
from runner.supervisor.identity import Identity
from runner.supervisor.link import Leader
from runner.supervisor.notices import Notices
from runner.supervisor.order import Order, Share, share
from runner.supervisor.ranks import Exit
from runner.supervisor.verdict import Outcome, final_error
from runner.supervisor.wire import PATIENCE, Message
from runner.topology import Topology

LATE = 60.0
"""Seconds that a run which is done already waits for its other nodes, so that they need not wait for it."""

Pause = Callable[[], None]
"""Waits for something to happen, or a short time; what it raises ends the wait."""


class Team:
    """The other nodes. A context, whose end tells them how the command ended.

    Args:
        topology: of node 0.
        processes: that node 0 offers.
        notices: hears the notices of all nodes.
        line: takes a line for people.

    Raises:
        RunnerError: the port cannot be listened on.
    """

    def __init__(
        self, job: Job, topology: Topology, processes: int, notices: Notices, line: Callable[[str], None]
    ) -> None:
        self._others = set(range(1, topology.count))
        self._notices = notices
        self._line = line
        self._leader: Leader | None = None
        if self._others:
            hello = Hello(
                run=job.name, node=0, nodes=topology.count, processes=processes, job=job_hashes(job)
            )
            self._leader = Leader(hello, topology.port, notices.wake)
        self._attempt = 0
        self._ready: set[int] = set()
        self._ended: dict[int, GroupEnd] = {}
        self._lost: dict[int, str] = {}
        self._progressed = False

    def __enter__(self) -> Self:
        if self._leader is not None:
            self._leader.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._leader is None:
            return
        if error is None:
            self._send({"say": "finished", "outcome": "done", "exit_code": 0, "error": None})
        elif isinstance(error, RunnerError):
            said = {"outcome": error.outcome, "exit_code": error.exit_code, "error": str(error)}
            self._send({"say": "finished", **said})
        self._leader.__exit__(kind, error, trace)

    def gather(self, pause: Pause, patience: float = PATIENCE) -> list[int]:
        """Wait until every node is here. Returns how many processes each other one offers.

        Raises:
            RunnerError: some did not come.
        """
        if self._leader is None:
            return []

        def hear_and_pause() -> None:
            self._hear()
            pause()

        self._hear()
        while self._leader.missing:  # one may be lost in the moment in which the last one came
            self._leader.gather(hear_and_pause, patience)
            self._hear()
        return self._leader.processes[1:]

    def dismiss(self, pause: Pause) -> None:
        """Wait a little for who is still to come, so that all hear how the command ends."""
        with contextlib.suppress(RunnerError):
            self.gather(pause, LATE)

    def begin(self, plan: Plan, identity: Identity, pause: Pause) -> Share | None:
        """Order an attempt. All nodes are ready for it when this returns the ranks of node 0; None: all are
        here.

        Raises:
            Preempted, RunnerError: a node cannot run it, or is lost.
        """
        if self._leader is None:
            return None
        each = plan.geometry.world // (len(self._others) + 1)
        for node, offered in enumerate(self.gather(pause), start=1):
            if offered < each:
                raise self._broken_off(f"node {node} came back and offers {offered} of {each} processes")
        self._attempt = plan.attempt
        self._ready, self._ended, self._lost = set(), {}, {}
        assert self._leader.address is not None  # known since the first of them joined
        order = Order(
            attempt=plan.attempt,
            plan=plan,
            pins=identity.pins,
            fingerprints=identity.fingerprints,
            processes=[each] * (len(self._others) + 1),
            address=self._leader.address,
            port=free_port(),
        )
        self._send(order.message())
        while self._ready != self._others:
            self.check()
            for node, end in self._ended.items():
                said = f"node {node} cannot run attempt {plan.attempt}: {end.exit}"
                cause = None if end.outcome is None else final_error(_named(node, end.outcome))
                raise cause or RunnerError(said)
            pause()
            self._hear()
        self._send({"say": "start", "attempt": plan.attempt})
        return share(order, 0)

    def look(self) -> str | None:
        """Why the ranks of node 0 have to be ended now; None: they go on."""
        self._hear()
        for node, reason in self._lost.items():
            return f"the loss of node {node}: {reason}"
        for node, end in self._ended.items():
            if not _well(end.outcome):
                return f"node {node}: {end.exit}"
        return None

    def progress(self, step: int) -> None:
        """A step is committed."""
        self._progressed = True
        self._send({"say": "progress", "step": step})

    def finish(self, ended: Ended, pause: Pause) -> Ended:
        """Wait until the ranks of all nodes are gone, and end them if they do not all end well.

        Returns:
            How the attempt ended, on all nodes.
        """
        told: str | None = None
        while self._others - self._ended.keys() - self._lost.keys():
            why = self.look() or (None if _well(ended.outcome) else ended.reason)
            if self._notices.hurry:
                why = why or "a second notice"
            if why is not None and told is None:
                told = why
                self._send({"say": "end", "attempt": self._attempt, "reason": why})
            pause()
            self._hear()
        return together(ended, self._ended, self.look(), told)

    def check(self) -> None:
        """Raise what ends the command: a node is lost.

        Raises:
            Preempted: something was committed in this command.
            RunnerError: nothing was.
        """
        for node, reason in self._lost.items():
            raise self._broken_off(f"node {node} is lost: {reason}; the ranks of all nodes were ended")

    def _broken_off(self, what: str) -> RunnerError:
        if self._progressed:
            return Preempted(f"{what}; the same command on all nodes goes on from the last checkpoint")
        return RunnerError(
            f"{what}; nothing was committed; remedy: look at its log, then give the same command again on "
            "all nodes"
        )

    def _send(self, message: Message) -> None:
        if self._leader is not None:
            self._leader.send(message)

    def _hear(self) -> None:
        for said in () if self._leader is None else self._leader.received():
            node, message = said.node, said.message
            if node is None:
                self._line(f"{message['address']} does not follow: {message['reason']}")
                continue
            match message["say"]:
                case "joined":
                    self._line(f"node {node} is here")
                case "lost":
                    self._lost[node] = message["reason"]
                    self._line(f"node {node} is lost: {message['reason']}")
                case "notice":
                    self._notices.hear(message["reason"], message["seconds"])
                case "advice":
                    self._notices.advise(message["reason"])
                case "remark":
                    self._line(f"node {node}: {message['text']}")
                case "ready" if message["attempt"] == self._attempt:
                    self._ready.add(node)
                case "ended" if message["attempt"] == self._attempt:
                    left = message["outcome"]
                    outcome = None if left is None else Outcome.model_validate(left)
                    self._ended[node] = GroupEnd(message["exit"], outcome)


def together(ended: Ended, others: Mapping[int, GroupEnd], why: str | None, told: str | None) -> Ended:
    """How an attempt ended on all nodes.

        node 0                   the others                       answer
        stopped, or a cause      -                                its own
        done                     all well                         its own
        any other                one has a cause                  that, with the node's name
        done                     lost, or ended badly             no outcome: what became of them
        crashed, failed with 1   ended badly by themselves        its own, and theirs
        crashed, failed with 1   ended for it, or lost            its own, which says so

    A cause is as in `runner.supervisor.attempt.judged`.

    Args:
        ended: of node 0.
        why: what became of the others (`Team.look`); None: they ended well.
        told: why they were ended; None: they were not.
    """
    own = ended.outcome
    if why is None or is_cause(own) or (own is not None and own.outcome == Preempted.outcome):
        return ended
    for node, end in others.items():
        if end.outcome is not None and is_cause(end.outcome):
            return replace(ended, exit=Exit(end.outcome.exit_code), outcome=_named(node, end.outcome))
    if _well(own):
        return replace(ended, exit=replace(ended.exit, ended=why), outcome=None)
    theirs = [
        said
        for node, end in others.items()
        if not _well(end.outcome)
        and end.exit != told
        and (said := f"node {node}: {end.exit}") not in ended.reason
    ]
    if not theirs:
        return ended
    return replace(ended, exit=replace(ended.exit, ended="; ".join([ended.reason, *theirs])), outcome=None)


def _well(outcome: Outcome | None) -> bool:
    return outcome is not None and outcome.outcome in ("done", Preempted.outcome)


def _named(node: int, outcome: Outcome) -> Outcome:
    return outcome.model_copy(update={"error": f"node {node}: {outcome.error}"})
