"""Supervisors in milliseconds: forked from one process that has imported everything and has no threads.

    with Nursery() as nursery:
        command = nursery.start(Invocation(...))
        command.wait(60)

It is `runner train` as `runner.launch.train` runs it, in a process of its own that real signals reach. The
trainer is a real child of it, and the fetcher, unless `fetched` names a recorded answer.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_LARGEST = 1 << 16
"""Bytes of a message; an invocation is a few hundred."""


@dataclass(frozen=True)
class Hurry:
    """What is shorter than in production, so that a run takes seconds: the protocol does not depend on it."""

    ttl: float = 1.0
    renew: float = 5.0
    poll: float = 0.1
    grace: float = 0.0
    """Seconds that readers have; 0 collects after every commit."""
    whole: int = 64 << 10
    part: int = 48 << 10
    shared_from: int = 64 << 10
    pause: float = 0.05
    """Seconds before a failed call is made again."""
    defect: str | None = None
    """Of `tests.chaos.defects`, planted in it."""


USUAL = Hurry()


@dataclass(frozen=True)
class Invocation:
    """One command on one machine."""

    job: str
    """Path of its file."""
    runs: str
    cwd: str
    output: str
    trainer: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)
    fetched: str | None = None
    """A recorded answer of the fetcher; None runs the real one."""
    hurry: Hurry = USUAL


class Command:
    """An invocation that was started."""

    def __init__(self) -> None:
        self.pid = 0
        self._born, self._ended = threading.Event(), threading.Event()
        self._code: int | None = None

    def began(self, pid: int) -> None:
        self.pid = pid
        self._born.set()

    def ended(self, code: int) -> None:
        self._code = code
        self._ended.set()

    def born(self) -> int:
        """Its process id, as soon as there is one."""
        assert self._born.wait(60), "the nursery does not answer"
        return self.pid

    @property
    def code(self) -> int | None:
        """Its exit code, minus the signal that ended it; None while it lives."""
        return self._code if self._ended.is_set() else None

    def wait(self, seconds: float) -> int | None:
        """Its exit code, None when it is still alive after so long."""
        self._ended.wait(seconds)
        return self.code


class Nursery:
    """The process that forks, seen from the one that asks. Begin it before any thread."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            ours.close()
            _serve(theirs)
        theirs.close()
        self._socket = ours
        self._lock = threading.Lock()
        self._commands: list[Command] = []
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.shutdown(socket.SHUT_WR)
        os.waitpid(self._pid, 0)
        self._reader.join()
        self._socket.close()

    def start(self, invocation: Invocation) -> Command:
        """Start a command; returns when it has a process."""
        command = Command()
        with self._lock:
            number = len(self._commands)
            self._commands.append(command)
            self._socket.send(json.dumps([number, dataclasses.asdict(invocation)]).encode())
        command.born()
        return command

    def _read(self) -> None:
        while message := self._socket.recv(_LARGEST):
            number, what, value = json.loads(message)
            command = self._commands[number]
            if what == "pid":
                command.began(value)
            else:
                command.ended(value)


def die_with(parent: int) -> None:
    """This process ends when its parent does."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _serve(connection: socket.socket) -> None:
    """The nursery itself; never returns."""
    try:
        die_with(os.getppid())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _prepare()
        wake, woken = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(woken, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        children: dict[int, int] = {}
        while True:
            ready, _, _ = select.select([connection, wake], [], [])
            if wake in ready:
                os.read(wake, 4096)
            for pid in list(children):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    code = os.waitstatus_to_exitcode(status)
                    connection.send(json.dumps([children.pop(pid), "code", code]).encode())
            if connection in ready:
                message = connection.recv(_LARGEST)
                if not message:
                    break
                number, fields = json.loads(message)
                if not (pid := os.fork()):
                    signal.set_wakeup_fd(-1)
                    for fd in (connection.fileno(), wake, woken):
                        os.close(fd)
                    _live(fields)
                children[pid] = number
                connection.send(json.dumps([number, "pid", pid]).encode())
        for pid in children:
            os.kill(pid, signal.SIGKILL)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(0)


def _prepare() -> None:
    """Import all that a supervisor will, and read botocore's models once for all of them."""
    import boto3
    import botocore.session

    import runner.checkpoint.s3
    import runner.launch  # noqa: F401
    from runner.supervisor import identity

    loader = botocore.session.create_loader()
    botocore.session.create_loader = lambda search_path_string=None: loader
    environ = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}
    os.environ.update(environ)
    boto3.session.Session(region_name="us-east-1").client("s3").close()
    versions = identity.versions()
    identity.versions = lambda: dict(versions)
    gc.collect()
    gc.freeze()


def _live(fields: dict[str, Any]) -> None:
    """Be one supervisor; never returns."""
    code = 99
    try:
        die_with(os.getppid())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        output = os.open(fields["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w")
        os.chdir(fields["cwd"])
        os.environ.update(fields["environ"])
        _hurry(Hurry(**fields["hurry"]), fields["fetched"])
        code = _train(fields)
        sys.stdout.flush()
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        raise
    finally:
        os._exit(code)


def _hurry(hurry: Hurry, fetched: str | None) -> None:
    from runner.checkpoint import commit, lease, s3, store
    from runner.supervisor import custody, fetching

    custody.TTL, custody.RENEW_EVERY, custody.GRACE = hurry.ttl, hurry.renew, hurry.grace
    custody.LOOK, custody.SHORT = 0.02, 0.2
    lease.POLL, store.FIRST_PAUSE = hurry.poll, hurry.pause
    commit.SHARED_FROM = hurry.shared_from
    s3.Settings = functools.partial(s3.Settings, whole=hurry.whole, part=hurry.part)
    if hurry.defect is not None:
        from tests.chaos import defects

        defects.plant(hurry.defect)
    if fetched is not None:
        fetching.FETCHER = ("/bin/sh", "-c", 'cp "$0" "$2.new" && mv "$2.new" "$2"', fetched)


def _train(fields: dict[str, Any]) -> int:
    from runner.errors import RunnerError
    from runner.launch import train
    from runner.settings import resolve

    began = time.monotonic()
    try:
        return train(resolve(fields["job"], [], {}), Path(fields["runs"]), trainer=fields["trainer"])
    except RunnerError as error:
        sys.stdout.write(f"{error}\n")
        return error.exit_code
    finally:
        sys.stdout.write(f"[{time.monotonic() - began:.2f} s]\n")
