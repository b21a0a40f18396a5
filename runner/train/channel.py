"""The trainer's line to its supervisor: events out, one request in, and a lifeline.

Events are JSON lines on the pipe `RUNNER_EVENTS_FD`; without one they are dropped, so that a plan can be
run by hand. The request is a file in the attempt's folder (`runner.request`). The lifeline is a pipe that
the supervisor holds open: when it closes, this process kills itself, so that no rank outlives it; and what
this process forks ends with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from runner.request import Reader, Request

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Channel:
    """Events and requests of one attempt."""

    def __init__(self, attempt_dir: Path, events_fd: int | None) -> None:
        self._requests = Reader(attempt_dir)
        self._events = None if events_fd is None else os.fdopen(events_fd, "w", buffering=1, encoding="utf-8")

    @classmethod
    def from_environment(cls, attempt_dir: Path) -> Channel:
        """The channel that the supervisor prepared; also starts watching the lifeline."""
        lifeline = os.environ.get("RUNNER_LIFELINE_FD")
        if lifeline is not None:
            threading.Thread(target=_die_with, args=(int(lifeline),), daemon=True).start()
            _bind_forks()
        events = os.environ.get("RUNNER_EVENTS_FD")
        return cls(attempt_dir, None if events is None else int(events))

    def send(self, event: str, **fields: Any) -> None:
        """Tell the supervisor. A broken pipe is no error: without its supervisor this process is ending."""
        if self._events is not None:
            with contextlib.suppress(BrokenPipeError):
                self._events.write(json.dumps({"event": event, **fields}) + "\n")

    def request(self) -> Request:
        """What the supervisor asks for now. One `stat`; cheap enough for every step.

        Raises:
            RunnerError: the file is no request.
        """
        return self._requests.now()


def _die_with(lifeline: int) -> None:
    """Block until the other end closes, then kill this process and nothing is left to clean up."""
    while True:
        with contextlib.suppress(InterruptedError):
            if not os.read(lifeline, 1):
                os.kill(os.getpid(), signal.SIGKILL)


def _bind_forks() -> None:
    """Let no process that this one forks outlive it (Linux; elsewhere they are spawned).

    PyTorch's data loader workers look whether they have another parent than at their start. One whose parent
    was killed before that start finds init, for ever the same, and waits for work (torch 2.13,
    `torch.utils.data._utils.worker.ManagerWatchdog`).
    """
    if sys.platform != "linux":
        return
    prctl = ctypes.CDLL(None).prctl  # loaded now, not between fork and start
    parent = os.getpid()

    def before() -> None:
        nonlocal parent
        parent = os.getpid()  # a worker forks, too

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died in between: the signal will not come
            os._exit(1)

    os.register_at_fork(before=before, after_in_child=in_child)
