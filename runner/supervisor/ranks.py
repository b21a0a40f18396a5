"""One child process of the supervisor: started so that it cannot outlive it, watched until it is gone.

    supervisor                                   child (`runner.train`, or `runner.supervisor.fetch`)
      RUNNER_EVENTS_FD     <- JSON lines -         what it does
      RUNNER_LIFELINE_FD   - held open ->          its end means: kill yourself
      PDEATHSIG (Linux)    - by the kernel ->      the same, without its help

The child has its own session: signals from a terminal do not reach it, and its whole group can be ended.
PDEATHSIG follows the thread that started the child, so `watch` belongs to the main thread, which lives as
long as its process; other threads may run beside it, and wake it with `Notices.wake`. Requests to stop are
collected by `Notices`; what they mean is the caller's business.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import threading
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

SHIM = Path(__file__).with_name("shim.py")

_PIECE = 1 << 16


class Notices:
    """What asks a run to stop: SIGINT, SIGTERM, SIGHUP, and a file that somebody makes. Collected, never
    acted upon here.

    A second one hurries, if it comes `apart` seconds after the first: GNU `timeout` and some shells send
    one notice twice at once, to the process and to its group. A signal that was ignored stays ignored,
    as under nohup.

    The stop file is for whoever can reach the run's folder and not its process. Taking it removes it, so that
    the next command goes on. One that is there from the start counts too: asked for once too often costs
    that command, which says why it stopped; asked for in vain would cost the machine.

    Args:
        stop_file: where to look for it; None: nowhere.
    """

    def __init__(
        self,
        apart: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
        stop_file: Path | None = None,
    ) -> None:
        self._apart = apart
        self._clock = clock
        self._at = 0.0
        self._old: dict[int, Any] = {}
        self._stop_file = stop_file
        self._write: int | None = None
        self._guard = threading.Lock()
        """Of `_write`: a number that was closed may be somebody else's by now."""
        self.first: str | None = None
        """What asked to stop: the name of a signal, or `stop file <path>`."""
        self.hurry = False

    def __enter__(self) -> Self:
        self.wakeup, self._write = os.pipe()
        os.set_blocking(self.wakeup, False)
        os.set_blocking(self._write, False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._on_signal)
        # A handler, so that a dead child wakes the loop through the wake-up pipe.
        self._old[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self.poll()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        with self._guard:
            write, self._write = self._write, None
        os.close(self.wakeup)
        if write is not None:
            os.close(write)

    def wake(self) -> None:
        """Make `watch` look again at once. From any thread; outside the context it does nothing."""
        with self._guard, contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            if self._write is not None:
                os.write(self._write, b"\0")

    def poll(self) -> None:
        """Look for the stop file, and take it. `watch` does so at every tick."""
        path = self._stop_file
        if path is None:
            return
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError:  # a folder, or not ours to remove: it stays, so it counts once
            if not os.path.lexists(path):
                return
            self._stop_file = None
        self._note(f"stop file {path}")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._note(signal.Signals(number).name)

    def _note(self, what: str) -> None:
        now = self._clock()
        if self.first is None:
            self.first, self._at = what, now
        elif now - self._at >= self._apart:
            self.hurry = True


@dataclass(frozen=True)
class Exit:
    """How a child ended."""

    returncode: int
    """Exit code, or minus the signal's number."""
    ended: str | None = None
    """Why the supervisor killed it; None: it did not, or came too late."""

    def __str__(self) -> str:
        if self.returncode >= 0:
            return f"exit code {self.returncode}"
        try:
            name = signal.Signals(-self.returncode).name
        except ValueError:  # a real-time signal
            name = f"signal {-self.returncode}"
        if self.ended is not None:
            return f"{name} by its supervisor: {self.ended}"
        return f"{name}, often the kernel's answer to a lack of memory" if name == "SIGKILL" else name


def watch(
    command: Sequence[str],
    *,
    environ: Mapping[str, str],
    log: Path,
    notices: Notices,
    on_event: Callable[[Event], None],
    on_notice: Callable[[str], bool],
    on_tick: Callable[[], str | None],
) -> Exit:
    """Run a child to its end, from the main thread.

    Args:
        environ: its whole environment, but for the two descriptors.
        log: takes its stdout and stderr.
        on_event: called for every event, in order, all of them before this returns.
        on_notice: called once, at the first notice; asks the child to stop, or returns True to end it.
        on_tick: called after every look at the child, every `TICK` seconds and more often; the first reason
            that it returns ends the child at once.

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
    asked = False
    why: str | None = None
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(events, selectors.EVENT_READ)
            selector.register(notices.wakeup, selectors.EVENT_READ)
            while not _ended(child):
                notices.poll()
                if notices.first is not None and not asked:
                    asked = True
                    if on_notice(notices.first):
                        why = why or notices.first
                if notices.hurry:
                    why = why or "a second notice"
                if why is not None:
                    _kill_group(child)
                for key, _ in selector.select(TICK):
                    if key.fd == notices.wakeup:
                        _read(notices.wakeup)
                    elif _pump(events, reader, on_event) == b"":
                        selector.unregister(events)
                reason = on_tick()
                why = why or reason
        # Its own children (data loader workers) would linger; they hold the pipe open, so its end is no sign.
        _kill_group(child)
        while _pump(events, reader, on_event):
            pass
        for event in reader.close():
            on_event(event)
        returncode = child.wait()
        return Exit(returncode, why if returncode == -signal.SIGKILL else None)
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
    why = f"start {command[0]}: {{}}; remedy: install the package again"
    # Here, because what the shim cannot start is one line in the log.
    if shutil.which(command[0], path=environ.get("PATH")) is None:
        raise RunnerError(why.format("no such program"))
    try:
        return subprocess.Popen(
            [*_shim(), *command],
            env={**environ, **fds},
            pass_fds=(events, lifeline),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    except OSError as error:
        raise RunnerError(why.format(error.strerror)) from error


def _shim() -> list[str]:
    """What goes before a command so that it dies with this process; 10 ms. Elsewhere the lifeline does it."""
    if sys.platform != "linux":
        return []
    return [sys.executable, "-I", "-S", str(SHIM), str(os.getpid())]


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
