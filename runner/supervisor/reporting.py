"""The report of a run that ends, by a process of its own: what goes wrong there is a warning, and never the
end of the run. What the report says is `runner.report`'s.

RUNNER_REPORT=off leaves it out; `runner report` makes it at any time.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from runner.supervisor.display import Display
from runner.supervisor.notices import Notices
from runner.supervisor.progress import near
from runner.supervisor.run_folder import RunFolder

VARIABLE = "RUNNER_REPORT"

PATIENCE = 60.0
"""Seconds that a report may take; one of a long run takes a few."""

ENOUGH = 15.0
"""Seconds that a machine which goes away must have left for one to be begun."""

_LOOK = 0.1


def not_off(environ: Mapping[str, str]) -> bool:
    """Whether somebody may get a report at all."""
    return environ.get(VARIABLE) != "off"


def wanted(setting: str | None, job: bool, left: float | None, hurry: bool) -> bool:
    """Whether a run that ends gets a report.

        RUNNER_REPORT   job.yaml   seconds left   hurried   answer
        off             any        any            any       no
        any other       no         any            any       no        nothing was begun
        any other       yes        any            yes       no
        any other       yes        below ENOUGH   no        no
        any other       yes        more           no        yes
        any other       yes        unknown        no        yes

    Args:
        left: until the machine is gone; None: nobody said.
    """
    if setting == "off" or not job or hurry:
        return False
    return left is None or left >= ENOUGH


@contextlib.contextmanager
def reported(folder: RunFolder, notices: Notices, screen: Display) -> Iterator[None]:
    """Write `report.html` when the block has ended, however it did; the screen is told, a warning aloud."""
    try:
        yield
    finally:
        if wanted(os.environ.get(VARIABLE), folder.job.is_file(), notices.left, notices.hurry):
            _write(folder.path, notices, os.environ, screen)


def _write(folder: Path, notices: Notices, environ: Mapping[str, str], screen: Display) -> None:
    command = [sys.executable, "-m", "runner", "report", str(folder)]
    try:
        with subprocess.Popen(
            command,
            env={**environ, "NO_COLOR": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as process:
            reason = _ended(process, notices)
    except OSError as error:
        reason = str(error)
    if reason is None:
        screen.line(f"report: {near(folder / 'report.html')}")
    else:
        screen.loud(f"warning: no report was written: {reason}; `runner report {near(folder)}` makes it")


def _ended(process: subprocess.Popen[bytes], notices: Notices) -> str | None:
    """Wait for the process; returns why there is no report, None if there is."""
    deadline = time.monotonic() + (PATIENCE if notices.left is None else min(PATIENCE, notices.left / 2))
    while True:
        notices.poll()
        try:
            _, said = process.communicate(timeout=_LOOK)
            break
        except subprocess.TimeoutExpired:
            if notices.hurry or time.monotonic() > deadline:
                process.kill()
                process.communicate()
                return "asked to hurry" if notices.hurry else "it took too long"
    if process.returncode == 0:
        return None
    lines = said.decode("utf-8", "replace").strip().splitlines()
    return lines[0] if lines else f"exit code {process.returncode}"
