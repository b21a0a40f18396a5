"""A process that may end at any time and is started again, ever more rarely; what it says goes to a log.

It has its own session, reads nothing but the end of its stdin, and dies with the supervisor. A thread waits
for it, and nobody else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from runner.errors import RunnerError
from runner.job.secrets import without_secrets
from runner.supervisor.ranks import shim
from runner.supervisor.remains import last_error

FIRST_PAUSE, LONGEST_PAUSE = 30.0, 900.0
"""Seconds before a process that ended is started again; doubled each time."""

_LOG_BYTES = 1 << 20
"""A log takes no more: some library may complain at every step."""

_LINE = 1 << 16


class Keeper:
    """Runs a process in a thread, and again; PDEATHSIG follows that thread, which outlives it.

    Args:
        warn: takes why it ended the first time that nobody asked it to.
    """

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str], log: Path, warn: Callable[[str], None]
    ) -> None:
        self._command = command
        self._environ = environ
        self._log = log
        self._warn = warn
        self._warned = False
        self._changed = threading.Condition()
        self._child: subprocess.Popen[bytes] | None = None
        self._closing = False
        self._left = False
        self._thread = threading.Thread(target=self._keep, name=f"tracker {log.stem}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Ask the process to finish; one that waits to be started again is started once more."""
        with self._changed:
            self._closing = True
            _end_input(self._child)
            self._changed.notify_all()

    def leave(self) -> bool:
        """Kill what is still there. True if there was something."""
        with self._changed:
            self._left = True
            alive = self._child is not None and self._child.poll() is None
            if alive:
                assert self._child is not None
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._child.pid, signal.SIGKILL)
        return alive

    def warn(self, why: str) -> None:
        """Say what is wrong, once."""
        if not self._warned:
            self._warned = True
            self._warn(why)

    def _keep(self) -> None:
        pause = FIRST_PAUSE
        while True:
            with self._changed:
                if self._left:
                    return
                last = self._closing
                try:
                    self._child = child = self._spawn()
                except OSError as error:
                    self.warn(f"it cannot be started: {error.strerror}")
                    return
                if last:
                    _end_input(child)
            code = child.wait()
            with self._changed:
                if self._left or (self._closing and code == 0):
                    return
            if not self._heard(self._why(code)):
                return
            with self._changed:
                if last:
                    return
                self._changed.wait_for(lambda: self._closing or self._left, pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _heard(self, why: str) -> bool:
        """Warn; False if the command has left meanwhile, and its journal may be closed."""
        with self._changed:
            if not self._left:
                self.warn(why)
            return not self._left

    def _spawn(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [*shim(), *self._command],
            env=self._environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert child.stdout is not None
        self._reader = threading.Thread(target=_copy, args=(child.stdout, self._log), daemon=True)
        self._reader.start()
        return child

    def _why(self, code: int) -> str:
        self._reader.join(1.0)  # a process that it left behind may hold the pipe open
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        try:
            line = last_error(self._log)
        except RunnerError:
            line = ""
        return f"its process ended with {how}{f': {line}' if line else ''}"


def _end_input(child: subprocess.Popen[bytes] | None) -> None:
    if child is not None and child.stdin is not None:
        with contextlib.suppress(OSError):
            child.stdin.close()


def _copy(lines: IO[bytes], log: Path) -> None:
    """Read all that a process writes, and keep the first of it. A full disk costs the log only."""
    with contextlib.suppress(OSError):
        log.write_bytes(b"")
    room = _LOG_BYTES
    with lines:
        while line := lines.readline(_LINE):
            text = without_secrets(line.decode("utf-8", "replace"), os.environ).encode()[:room]
            room -= len(text)
            if text:
                with contextlib.suppress(OSError), log.open("ab") as file:
                    file.write(text)
