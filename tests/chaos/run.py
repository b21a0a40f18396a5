"""One run that is killed as often as it is told to, and then goes on to its end. No verdict.

A machine is a folder; a fresh one knows what the bucket knows. Who is killed: the supervisor, its child (the
trainer, or the fetcher while there is none), or both.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runner import events
from runner.checkpoint.head import Head, decode
from tests.chaos.bucket import Bucket
from tests.chaos.nursery import USUAL, Hurry, Invocation, Nursery
from tests.chaos.observer import Observer
from tests.chaos.processes import children, command_line, working_in
from tests.chaos.proxy import KillProxy, Strike

Target = Literal["supervisor", "rank", "both"]

Move = Literal["fresh", "former"]

LONGEST = 180.0
"""Seconds of one command; a busy machine is slow, a hang is for ever."""

NAME = "chaos"
PREFIX = f"runs/{NAME}/"
"""Of the run in its bucket."""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: at a call, or so many seconds after the start, of the trainer if it is to be hit."""

    target: Target = "supervisor"
    strike: Strike | None = None
    seconds: float = 0.0
    move: Move | None = None
    """Before the command: to a machine that knows nothing, or back to the one before."""

    def __str__(self) -> str:
        when = f"{self.seconds:.3f} s"
        if self.strike is not None:
            place = "" if self.strike.place is None else f" {self.strike.place}"
            when = f"{self.strike.side} call {self.strike.at}{place}"
        return f"{self.target} {when}{'' if self.move is None else f', {self.move} machine'}"


@dataclass
class Killed:
    """What a kill met."""

    kill: Kill
    place: str
    """The call that it hit, or the last one before it, in words."""
    victims: tuple[str, ...]
    committed: int
    """The step that `HEAD` had then."""
    done: bool
    """Whether `HEAD` said that the run is done."""


@dataclass(frozen=True)
class Kind:
    """What is run: the trainer and its job, for all runs of a campaign."""

    trainer: tuple[str, ...]
    job: dict[str, Any]
    """Without `checkpoints.uri`."""
    hurry: Hurry = USUAL
    fetched: str | None = None
    """A recorded answer of the fetcher; None runs the real one."""
    kept: tuple[str, ...] = ("adapter/*", "steps.jsonl")
    """What the run ends with, as patterns in its folder: compared byte by byte."""


@dataclass(frozen=True)
class Arena:
    """What all runs share."""

    port: int
    """Of the store."""
    proxy: KillProxy
    nursery: Nursery
    observer: Observer
    folder: Path

    def environ(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.proxy.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }


@dataclass
class Run:
    """One run in a bucket of its own."""

    arena: Arena
    name: str
    kind: Kind
    machines: list[Path] = field(default_factory=list)
    commands: int = 0
    kills: list[Killed] = field(default_factory=list)
    crashed: bool = False
    """Whether the command of now may end with 1: its fetcher was killed, and it may be given again."""
    unreached: int = 0
    """Kills whose call never came."""
    wrong: list[str] = field(default_factory=list)
    """What was seen on the way that must not be."""

    def __post_init__(self) -> None:
        self.folder = self.arena.folder / self.name
        self.folder.mkdir(parents=True)
        self.bucket = Bucket(self.arena.port, self.name)
        self.bucket.make()
        self.trace = self.arena.proxy.trace(self.name)
        self.job = self.folder / "job.yaml"
        settings = {**self.kind.job.get("checkpoints", {}), "uri": f"s3://{self.name}/runs"}
        self.job.write_text(json.dumps({**self.kind.job, "name": NAME, "checkpoints": settings}))
        self.move()

    def move(self, to: Move = "fresh") -> None:
        """To a machine that knows nothing, or back to the one before."""
        if to == "former":
            before = self.machines.index(self.machine) - 1
            self.machine = self.machines[max(0, before)]
            return
        self.machine = self.folder / f"machine-{len(self.machines)}"
        self.machine.mkdir()
        self.machines.append(self.machine)

    @property
    def path(self) -> Path:
        """The run's folder on the machine of now."""
        return self.machine / "runs" / NAME

    def head(self) -> Head | None:
        """`HEAD` as it is."""
        data = self.bucket.read(f"{PREFIX}HEAD")
        return None if data is None else decode(Head, data, "HEAD")

    def accepted(self) -> Head | None:
        """The last HEAD that the store accepted, by the record of the proxy."""
        heads = self.trace.heads()
        return decode(Head, heads[-1].body, "HEAD") if heads else None

    def committed(self) -> int:
        """The step of its head checkpoint."""
        head = self.accepted()
        return 0 if head is None or head.newest is None else head.newest.step

    def invocation(self, machine: Path, **environ: str) -> Invocation:
        """A command on a machine."""
        self.commands += 1
        return Invocation(
            job=str(self.job),
            runs=str(machine / "runs"),
            cwd=str(machine),
            output=str(machine / f"output-{self.commands:03d}"),
            trainer=self.kind.trainer,
            environ={**self.arena.environ(), **environ},
            fetched=self.kind.fetched,
            hurry=self.kind.hurry,
        )

    def command(self, kill: Kill | None = None) -> int | None:
        """Give the command, and kill as planned. Returns its exit code; None: it hangs, and was killed."""
        if kill is not None and kill.move is not None:
            self.move(kill.move)
        floor, seen, self.crashed = self.committed(), len(self.events()), False
        started: list[int] = []

        def act() -> None:
            while not started:  # the first call may come before the nursery has told
                time.sleep(0.001)
            assert kill is not None
            self._hit(kill, started[0])

        self.trace.arm(None if kill is None else kill.strike, act)
        process = self.arena.nursery.start(self.invocation(self.machine))
        started.append(process.pid)
        if kill is not None and kill.strike is None:
            while kill.target != "supervisor" and process.code is None and not _trainers(process.pid):
                time.sleep(0.01)
            if process.wait(kill.seconds) is None:
                act()
        code = process.wait(LONGEST)
        if code is None:
            self.wrong.append(f"command {self.commands} hangs")
            for pid in (*children(process.pid), process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(10)
        if kill is not None and kill.strike is not None and self.trace.struck is None:
            self.unreached += 1
        self.wrong += lost(self.events()[seen:], floor)
        return code

    def to_end(self, kills: Sequence[Kill] = ()) -> None:
        """Give the same command until the run is done, with a kill in each of the first ones."""
        for kill in kills:
            if self._done(self.command(kill)):
                return
        for _ in range(8):  # a request that was late may fence one, or make it fail
            if self._done(self.command()):
                return
        self.wrong.append("the same command does not finish the run")

    def _done(self, code: int | None) -> bool:
        if code not in (0, -signal.SIGKILL, None) and not (code == 1 and self.crashed):
            said = (self.machine / f"output-{self.commands:03d}").read_text()[-600:]
            self.wrong.append(f"command {self.commands} ended with {code}: {said}")
        return code == 0

    def _hit(self, kill: Kill, pid: int) -> None:
        head, committed = self.accepted(), self.committed()
        done = head is not None and head.state == "done"
        place = "random time" if kill.strike is None else str(self.trace.struck)
        below = [] if kill.target == "supervisor" else children(pid)
        trainers = _trainers(pid) if below else []
        victims = {child: "rank" if child in trainers else "fetcher" for child in below}
        if kill.target != "rank" or not victims:
            victims[pid] = "supervisor"
        hit = []
        for victim, what in victims.items():
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                hit.append(what)
        if hit:
            self.kills.append(Killed(kill, place, tuple(hit), committed, done))
            self.crashed = "fetcher" in hit

    def events(self) -> list[dict[str, Any]]:
        """Of the machine of now."""
        file = self.path / "events.jsonl"
        return list(events.read(file)) if file.exists() else []

    def settle(self) -> None:
        """Wait until every late request has arrived, and every orphan has gone."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with self.trace.lock:
                busy = self.trace.under_way
            if not busy and not working_in(self.folder):
                return
            time.sleep(0.02)
        left = working_in(self.folder)
        self.wrong.append(f"still there: {left or 'requests under way'}")


def _trainers(pid: int) -> list[int]:
    return [child for child in children(pid) if "plan.json" in command_line(child)]


def lost(said: Sequence[dict[str, Any]], floor: int) -> list[str]:
    """Where one command began a trainer behind what was committed, or behind what one had published here.

    Args:
        said: events of the command.
        floor: the step that was committed before it.
    """
    wrong, published, first = [], 0, True
    for event in said:
        if event["event"] == "checkpoint":
            published = max(published, event["step"])
        if event["event"] == "attempt":
            least = floor if first else max(floor, published)
            if event["step"] < least:
                wrong.append(f"attempt {event['attempt']} began at step {event['step']}, not {least}")
            first = False
    return wrong
