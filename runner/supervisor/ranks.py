"""The child processes of the supervisor: started so that they cannot outlive it, watched until they are gone.

    supervisor                                   children (`runner.train`, or `runner.supervisor.fetch`)
      RUNNER_EVENTS_FD     <- JSON lines -         what the first does; the others have no such pipe
      RUNNER_LIFELINE_FD   - held open ->          its end means: kill yourself
      PDEATHSIG (Linux)    - by the kernel ->      the same, without its help

Several are the ranks of one attempt: none can go on without the others, so that the bad end of one ends them
all (`end_of`). Each has its own session: signals from a terminal do not reach it, and its whole process group
can be ended. PDEATHSIG follows the thread that started a child, so `watch` belongs to the main thread, which
lives as long as its process; other threads may run beside it, and wake it with `Notices.wake`.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from runner.durable import disk
from runner.errors import Preempted, RunnerError
from runner.events import Event, LineReader
from runner.supervisor.notices import Notices

TICK = 0.5
"""Seconds between two looks at the children when nothing happens; also how often a bar is drawn again."""

SHIM = Path(__file__).with_name("shim.py")

WELL = (0, Preempted.exit_code)
"""Exit codes of a rank that ended in agreement with the others, which are waited for."""

_PIECE = 1 << 16


@dataclass(frozen=True)
class Child:
    """A process to start."""

    command: Sequence[str]
    environ: Mapping[str, str]
    """All of it, but for the two descriptors."""
    log: Path
    """Takes its stdout and stderr."""


@dataclass(frozen=True)
class Exit:
    """How a child ended; of several, the one that the end of the others follows from."""

    returncode: int
    """Exit code, or minus the signal's number."""
    ended: str | None = None
    """Why the supervisor killed it, and all others; None: it did not, or came too late."""
    rank: int | None = None
    """Which of several ended badly; None: there is one, or none did by itself."""

    def __str__(self) -> str:
        return self.of_rank(self._words())

    def of_rank(self, words: str) -> str:
        """What is said of the process, with its rank if there are several: `rank 3: SIGSEGV`."""
        return words if self.rank is None else f"rank {self.rank}: {words}"

    def _words(self) -> str:
        if self.returncode >= 0:
            return f"exit code {self.returncode}"
        try:
            name = signal.Signals(-self.returncode).name
        except ValueError:  # a real-time signal
            name = f"signal {-self.returncode}"
        if self.ended is not None:
            return f"{name} by its supervisor: {self.ended}"
        return f"{name}, often the kernel's answer to a lack of memory" if name == "SIGKILL" else name


def end_of(codes: Sequence[int | None], killed: str | None) -> Exit | None:
    """How children have ended, by their return codes; None: they go on.

        codes                              killed    answer
        None, all others 0 or 75           -         None: it is waited for
        all 0 or 75                        -         the code of the first
        others, with SIGKILL and more      no        the first that a signal ended, but for SIGABRT
        others, exit codes and SIGABRT     no        the first of these
        others, all SIGKILL                yes       SIGKILL by the supervisor
        others, with some more             yes       the first of these: it ended before the kill

    Ranks whose peer was killed fail by themselves a moment later, with an exit code or by PyTorch's SIGABRT;
    so of several that ended between two looks a signal is more likely to be the cause.

    Args:
        codes: of each rank, None while it runs.
        killed: why the supervisor has killed them; None: it has not.
    """
    bad = [(rank, code) for rank, code in enumerate(codes) if code is not None and code not in WELL]
    if killed is not None:
        before = [(rank, code) for rank, code in bad if code != -signal.SIGKILL]
        if bad and not before:
            return Exit(-signal.SIGKILL, killed)
        bad = before
    if bad:
        rank, code = min(bad, key=lambda one: one[1] >= 0 or one[1] == -signal.SIGABRT)
        return Exit(code, rank=rank if len(codes) > 1 else None)
    first = codes[0]
    return None if first is None or None in codes else Exit(first)


def watch(
    children: Sequence[Child],
    *,
    notices: Notices,
    on_event: Callable[[Event], None],
    on_notice: Callable[[str], bool],
    on_tick: Callable[[], str | None],
) -> Exit:
    """Run children to their end, from the main thread. None is left when this returns or raises.

    Args:
        children: by rank.
        on_event: called for every event of the first, in order, all of them before this returns.
        on_notice: called once, at the first notice; asks the children to stop, or returns True to end them.
        on_tick: called after every look at the children, every `TICK` seconds and more often; the first
            reason that it returns ends them at once.

    Raises:
        RunnerError: a command cannot be started.
    Whatever a callback raises ends the children and passes on.
    """
    reader = LineReader()
    asked = False
    why: str | None = None
    with _Group() as group, selectors.DefaultSelector() as selector:
        group.start(children)
        selector.register(group.events, selectors.EVENT_READ)
        selector.register(notices.wakeup, selectors.EVENT_READ)
        killed: str | None = None
        while (end := end_of(group.look(), killed)) is None:
            notices.poll()
            if notices.first is not None and not asked:
                asked = True
                if on_notice(notices.first):
                    why = why or notices.first
            if notices.hurry:
                why = why or "a second notice"
            if why is not None:
                killed = why
                group.kill()
            for key, _ in selector.select(TICK):
                if key.fd == notices.wakeup:
                    _read(notices.wakeup)
                elif _pump(group.events, reader, on_event) == b"":
                    selector.unregister(group.events)
            reason = on_tick()
            why = why or reason
        group.kill()
        while _pump(group.events, reader, on_event):
            pass
        for event in reader.close():
            on_event(event)
        return end


class _Group:
    """Children that run, with the pipes that tie them to us. Whoever is left at the end is killed."""

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self.events, self._events_child = os.pipe()
        self._lifeline_child, self._lifeline = os.pipe()
        os.set_blocking(self.events, False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for child in self._children:
            child.wait()
        os.close(self.events)
        os.close(self._lifeline)

    def start(self, children: Sequence[Child]) -> None:
        """Start them; the first gets the events' pipe."""
        try:
            for child in children:
                events = None if self._children else self._events_child
                with disk("write the log", child.log), child.log.open("ab") as output:
                    started = _spawn(child, events, self._lifeline_child, output.fileno())
                self._children.append(started)
        finally:
            os.close(self._events_child)
            os.close(self._lifeline_child)

    def look(self) -> list[int | None]:
        """The return code of each, None of those that run."""
        if sys.platform != "darwin" and os.getpid() == 1:
            self._reap_orphans()
        for child in self._children:
            if child.returncode is None and _ended(child):
                # Its own children (data loader workers) would linger; they hold the pipe open, so its end is
                # no sign.
                _kill_group(child)
                child.wait()
        return [child.returncode for child in self._children]

    def kill(self) -> None:
        """Kill all that run, each with its own children."""
        for child in self._children:
            if child.returncode is None:
                _kill_group(child)

    def _reap_orphans(self) -> None:
        """As process 1 of a container one inherits everybody's orphans, and nobody else reaps them."""
        ours = {child.pid for child in self._children}
        while True:
            dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if dead is None or dead.si_pid in ours:
                return
            os.waitpid(dead.si_pid, os.WNOHANG)


def _spawn(child: Child, events: int | None, lifeline: int, output: int) -> subprocess.Popen[bytes]:
    fds = {"RUNNER_LIFELINE_FD": lifeline, **({} if events is None else {"RUNNER_EVENTS_FD": events})}
    program = child.command[0]
    why = f"start {program}: {{}}; remedy: install the package again"
    # Here, because what the shim cannot start is one line in the log.
    if shutil.which(program, path=child.environ.get("PATH")) is None:
        raise RunnerError(why.format("no such program"))
    try:
        return subprocess.Popen(
            [*shim(), *child.command],
            env={**child.environ, **{name: str(fd) for name, fd in fds.items()}},
            pass_fds=tuple(fds.values()),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    except OSError as error:
        raise RunnerError(why.format(error.strerror)) from error


def shim() -> list[str]:
    """What goes before a command so that it dies with this process; 10 ms. Elsewhere the lifeline does it."""
    if sys.platform != "linux":
        return []
    return [sys.executable, "-I", "-S", str(SHIM), str(os.getpid())]


def _ended(child: subprocess.Popen[bytes]) -> bool:
    """Whether the child has ended, without reaping it: its group keeps its number until then."""
    if sys.platform == "darwin":  # no os.waitid before Python 3.13
        return child.poll() is not None
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


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
