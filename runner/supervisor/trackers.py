"""The trackers of one supervisor, a process each (`python -m runner.tracking`): started, started again, left.

Nothing here may hurt a run. Each process has its own session, yields to everybody, and dies with the
supervisor; a thread waits for it and starts it again, ever more rarely, because what it missed it logs later.
Its first end that nobody asked for is one warning; the reasons of all are in its log. At the end of the
command each has a few seconds to log what is committed, and is left behind then.

    supervisor                          runner.tracking
      stdin          - held open ->       its end means: log the rest, end your run, exit
      stdout, stderr <- lines -           to the log, without secrets
      PDEATHSIG      - by the kernel ->   as for ranks (`runner.supervisor.ranks`)
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO

from runner.durable import disk, write_text
from runner.errors import JobError, Problem, RunnerError
from runner.events import Event
from runner.job.secrets import without_secrets
from runner.manifest import Job
from runner.supervisor.identity import Identity, flat
from runner.supervisor.notices import Notices
from runner.supervisor.ranks import shim
from runner.supervisor.remains import last_error
from runner.supervisor.result import Record
from runner.supervisor.run_folder import RunFolder
from runner.tracking import choice
from runner.tracking.request import Request, environ_of, without

COMMAND = (sys.executable, "-m", "runner.tracking")

WAIT = 10.0
"""Seconds that trackers have, all together, when the command ends."""

WAIT_NOTICED = 3.0
"""The same when the machine will be taken away: it may have other things to do."""

FIRST_PAUSE, LONGEST_PAUSE = 30.0, 900.0
"""Seconds before a process that ended is started again; doubled each time."""

LOOK = 0.1

_LOG_BYTES = 1 << 20
"""A log takes no more: some library may complain at every step."""

_LINE = 1 << 16


def names(job: Job) -> list[str]:
    """The trackers that a job asks for."""
    return choice.asked(job.training.options.get("report_to"))


def need_packages(job: Job) -> None:
    """Make sure that the trackers of a job can be started here.

    Raises:
        JobError: a package is not installed.
    """
    if missing := choice.missing(names(job)):
        reason = f"{', '.join(missing)} cannot be imported by {sys.executable}"
        remedy = f"{choice.remedy(missing)}, or training.report_to=none"
        raise JobError([Problem("training.report_to", reason, remedy)])


class Trackers:
    """All of one command.

    Args:
        say: takes a warning, from any thread.
        until: on the monotonic clock, when a machine that will be taken away may be gone.
    """

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        notices: Notices,
        say: Callable[[Event], object],
        until: Callable[[], float | None],
    ) -> None:
        self._job = job
        self._folder = folder
        self._notices = notices
        self._say = say
        self._keepers: list[_Keeper] = []
        self._until = until

    def start(self, identity: Identity, record: Record) -> None:
        """Start them. The run's id is known, and its events are written."""
        for name in names(self._job):
            folder = self._folder.tracking / name
            request = Request(
                tracker=name,
                run_dir=self._folder.path,
                folder=folder,
                id=identity.run_id,
                name=self._job.name,
                project=str(self._job.training.options.get("project") or "huggingface"),
                config=without(_config(self._job), os.environ),
                batch=self._job.training.global_batch_size,
                before=record.metrics["before"],
            )
            file = folder.with_suffix(".json")
            try:
                with disk("write the request of a tracker", folder):
                    folder.mkdir(parents=True, exist_ok=True)
                    write_text(file, request.model_dump_json(indent=2) + "\n")
            except RunnerError as error:
                self._warn(name, str(error))
                continue
            command, environ = [*COMMAND, str(file)], environ_of(name, os.environ, folder)
            self._keepers.append(
                _Keeper(command, environ, folder.with_suffix(".log"), partial(self._warn, name))
            )

    def close(self) -> None:
        """Let them log the rest, for a moment."""
        began = time.monotonic()
        for keeper in self._keepers:
            keeper.close()
        while any(keeper.alive for keeper in self._keepers) and time.monotonic() < self._deadline(began):
            self._notices.poll()
            time.sleep(LOOK)
        for keeper in self._keepers:
            if keeper.leave():
                waited = time.monotonic() - began
                keeper.warn(f"it did not finish in {waited:.0f} s, and what it had not logged is not logged")

    def _deadline(self, began: float) -> float:
        if self._notices.hurry:
            return 0.0
        if self._notices.first is None:
            return began + WAIT
        until = self._until()
        return began + WAIT_NOTICED if until is None else min(began + WAIT_NOTICED, until)

    def _warn(self, name: str, why: str) -> None:
        log = (self._folder.tracking / name).with_suffix(".log")
        message = f"tracker {name}: {why}; the run does not depend on it; log: {log}"
        with contextlib.suppress(RunnerError):  # a full disk, which the run itself meets at its next event
            self._say({"event": "warning", "message": message})


class _Keeper:
    """Runs one tracker's process in a thread, and again; PDEATHSIG follows this thread, which outlives it."""

    def __init__(
        self, command: list[str], environ: dict[str, str], log: Path, warn: Callable[[str], None]
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


def _config(job: Job) -> dict[str, object]:
    """The resolved job by dotted key, as the command line takes them."""
    keys = flat(job.model_dump(mode="json"))
    return {re.sub(r"\[(\d+)\]", r".\1", key): value for key, value in keys.items()}


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
