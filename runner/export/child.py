"""A child process of an export: in a trainer's environment, to its end, and its log if that was a bad one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from runner.durable import disk
from runner.errors import Preempted
from runner.events import Event
from runner.supervisor.environment import environ_of_trainer
from runner.supervisor.notices import Notices
from runner.supervisor.ranks import Child, Exit, watch
from runner.supervisor.world import Machine


def run_child(command: Sequence[str], log: Path, notices: Notices, show: Callable[[Event], None]) -> Exit:
    """Run a command.

    Raises:
        Preempted: asked to stop.
    """
    environ = environ_of_trainer(os.environ, 1, "single", Machine.here(os.environ))
    exit = watch(
        [Child(command, environ, log)],
        notices=notices,
        on_event=show,
        on_notice=lambda reason: True,
        on_tick=lambda: None,
    )
    if notices.first is not None:
        raise Preempted(f"{notices.first}: the export is stopped; nothing is left of it")
    return exit


def kept(log: Path) -> Path:
    """A log where it is not removed with the rest."""
    with disk("keep the log", Path(tempfile.gettempdir())):
        handle, name = tempfile.mkstemp(prefix="runner-export-", suffix=".log")
        os.close(handle)
        shutil.copyfile(log, name)
    return Path(name)
