"""Follow a submission to its end, wherever it is: ask again every few seconds, and say what has changed.

A cluster or a cloud that does not answer is waited for: the job goes on without whoever watches.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from runner.cluster.waiting import Phase, State
from runner.errors import RunnerError, StorageError

PATIENCE = 300.0
"""Seconds that silence is waited for."""


def follow(name: str, look: Callable[[], State], pause: float, say: Callable[[str], None]) -> int:
    """Say what a submission does until it has ended. Returns the exit code of its run.

    Args:
        look: asks what it does now.
        pause: seconds between two looks.

    Raises:
        RunnerError: there was silence for too long, or one may not look any more.
    """
    last, silent = "", 0.0
    while True:
        try:
            now = look()
            silent = 0.0
        except StorageError as error:
            if silent >= PATIENCE:
                raise StorageError(f"{error}; {name} itself goes on") from error
            silent += pause
            now = State(Phase.PENDING, f"there is no answer: {str(error).splitlines()[0]}")
        if now.words != last:
            say(f"{name}: {now.words}")
            last = now.words
        match now.phase:
            case Phase.DONE:
                return 0
            case Phase.FAILED:
                return now.code
            case Phase.GONE:
                say(f"{name}: what was committed stays; submit again to go on")
                return RunnerError.exit_code
        time.sleep(pause)
