"""One child process of the supervisor: started so that it cannot outlive it, watched until it is gone.

    supervisor                                   child (`runner.train`, or `runner.supervisor.fetch`)
      RUNNER_EVENTS_FD     <- JSON lines -         what it does
      RUNNER_LIFELINE_FD   - held open ->          its end means: kill yourself
      PDEATHSIG (Linux)    - by the kernel ->      the same, without its help

The child has its own session: signals from a terminal do not reach it, and its whole group can be ended.
Everything happens in one thread, because PDEATHSIG follows the thread that forked. Signals to the supervisor
are collected by `Notices`; what they mean is the caller's business.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from runner.durable import disk
from runner.errors import RunnerError
from runner.events import Event, LineReader

TICK = 0.5
"""Seconds between two looks at the child when nothing happens; also how often a bar is drawn again."""

_PIECE = 1 << 16
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Notices:
    """SIGINT, SIGTERM and SIGHUP while a run is on: collected, never acted upon here.

    A second one hurries, if it comes `apart` seconds after the first: GNU `timeout` and some shells send
    one notice twice at once, to the process and to its group. A signal that was ignored stays ignored,
    as under nohup.
    """

    def __init__(self, apart: float = 0.5, clock: Callable[[], float] = time.monotonic) -> None:
        self._apart = apart
        self._clock = clock
        self._at = 0.0
        self._old: dict[int, Any] = {}
        self.first: str | None = None
        """Name of the signal that asked to stop."""
        self.hurry = False

    def __enter__(self) -> Self:
        self.wakeup, self._write = os.pipe()
        os.set_blocking(self.wakeup, False)
        os.set_blocking(self._write, False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._note)
        # A handler, so that a dead child wakes the loop through the wake-up pipe.
        self._old[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        os.close(self.wakeup)
        os.close(self._write)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = self._clock()
        if self.first is None:
            self.first, self._at = signal.Signals(number).name, now
        elif now - self._at >= self._apart:
            self.hurry = True


@dataclass(frozen=True)
class Exit:
    """How a child ended."""

    returncode: int
    """Exit code, or minus the signal's number."""
    killed_by_us: bool
    """A second notice ended it."""

    def __str__(self) -> str:
        if self.returncode >= 0:
            return f"exit code {self.returncode}"
        try:
            name = signal.Signals(-self.returncode).name
        except ValueError:  # a real-time signal
            name = f"signal {-self.returncode}"
        unasked = name == "SIGKILL" and not self.killed_by_us
        return f"{name}, often the kernel's answer to a lack of memory" if unasked else name


def watch(
    command: Sequence[str],
    *,
    environ: Mapping[str, str],
    log: Path,
    notices: Notices,
    on_event: Callable[[Event], None],
    on_notice: Callable[[str], bool],
    on_tick: Callable[[], None],
) -> Exit:
    """Run a child to its end.

    Args:
        environ: its whole environment, but for the two descriptors.
        log: takes its stdout and stderr.
        on_event: called for every event, in order, all of them before this returns.
        on_notice: called once, at the first notice; asks the child to stop, or returns True to end it.

    Raises:
        RunnerError: the command cannot be started.
    Whatever a callback raises ends the child and passes on.
    """
    events, events_child = os.pipe()
    lifeline_child, lifeline = os.pipe()
    os.set_blocking(events, False)
    try:
        with disk("write the log", log), log.open("ab") as output:
            child = _spawn(command, environ, events_child, lifeline_child, output.fileno())
    finally:
        os.close(events_child)
        os.close(lifeline_child)
    reader = LineReader()
    asked = killed = False
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(events, selectors.EVENT_READ)
            selector.register(notices.wakeup, selectors.EVENT_READ)
            while not _ended(child):
                if notices.first is not None and not asked:
                    asked = True
                    killed = on_notice(notices.first)
                if killed or notices.hurry:
                    killed = True
                    _kill_group(child)
                for key, _ in selector.select(TICK):
                    if key.fd == notices.wakeup:
                        _read(notices.wakeup)
                    elif _pump(events, reader, on_event) == b"":
                        selector.unregister(events)
                on_tick()
        # Its own children (data loader workers) would linger; they hold the pipe open, so its end is no sign.
        _kill_group(child)
        while _pump(events, reader, on_event):
            pass
        for event in reader.close():
            on_event(event)
        return Exit(child.wait(), killed)
    finally:
        if child.returncode is None:
            _kill_group(child)
            child.wait()
        os.close(events)
        os.close(lifeline)


def _spawn(
    command: Sequence[str], environ: Mapping[str, str], events: int, lifeline: int, output: int
) -> subprocess.Popen[bytes]:
    fds = {"RUNNER_EVENTS_FD": str(events), "RUNNER_LIFELINE_FD": str(lifeline)}
    try:
        return subprocess.Popen(
            command,
            env={**environ, **fds},
            pass_fds=(events, lifeline),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_die_with_parent(),
        )
    except OSError as error:
        why = f"start {command[0]}: {error.strerror}"
        raise RunnerError(f"{why}; remedy: install the package again") from error


def _die_with_parent() -> Callable[[], None] | None:
    """What the child does between fork and exec. This process has one thread, so that is safe."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with contextlib.suppress(OSError):  # /proc may be closed to us
            # Of the two, the kernel shall kill this one for memory: the parent can go on with less.
            Path("/proc/self/oom_score_adj").write_text("1000")
        if os.getppid() != parent:  # died in between: the signal will not come
            os._exit(1)

    return ask


def _ended(child: subprocess.Popen[bytes]) -> bool:
    """Whether the child has ended, without reaping it: its group keeps its number until then."""
    if sys.platform == "darwin":  # no os.waitid before Python 3.13
        return child.poll() is not None
    if os.getpid() == 1:
        _reap_orphans(child.pid)
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _reap_orphans(child: int) -> None:
    """As process 1 of a container one inherits everybody's orphans, and nobody else reaps them."""
    while True:
        dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if dead is None or dead.si_pid == child:
            return
        os.waitpid(dead.si_pid, os.WNOHANG)


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    # macOS answers EPERM for a group of zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _read(fd: int) -> bytes | None:
    """What there is, b"" at the end, None if there is nothing now."""
    try:
        return os.read(fd, _PIECE)
    except BlockingIOError:
        return None


def _pump(events: int, reader: LineReader, on_event: Callable[[Event], None]) -> bytes | None:
    """Pass on what the pipe has; returns what `_read` gave."""
    data = _read(events)
    for event in reader.feed(data or b""):
        on_event(event)
    return data
