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
import sys
import time
from collections.abc import Callable
from functools import partial

from runner.durable import disk, write_text
from runner.errors import JobError, Problem, RunnerError
from runner.events import Event
from runner.manifest import Job
from runner.supervisor.identity import Identity, flat
from runner.supervisor.keeper import Keeper
from runner.supervisor.notices import Notices
from runner.supervisor.result import Record
from runner.supervisor.run_folder import RunFolder
from runner.tracking import choice
from runner.tracking.request import Request, environ_of, without

COMMAND = (sys.executable, "-m", "runner.tracking")

WAIT = 10.0
"""Seconds that trackers have, all together, when the command ends."""

WAIT_NOTICED = 3.0
"""The same when the machine will be taken away: it may have other things to do."""

LOOK = 0.1


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
        self._keepers: list[Keeper] = []
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
                Keeper(command, environ, folder.with_suffix(".log"), partial(self._warn, name))
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
                keeper.warn(f"it did not finish in {waited:.0f} s; the rest is left to the next command")

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


def _config(job: Job) -> dict[str, object]:
    """The resolved job by dotted key, as the command line takes them."""
    keys = flat(job.model_dump(mode="json"))
    return {re.sub(r"\[(\d+)\]", r".\1", key): value for key, value in keys.items()}
