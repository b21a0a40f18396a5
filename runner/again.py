"""What to type after a command on a run has failed, by its exit code. Pure.

    75, 74    the same command: what was trained is kept
    78        the job edited, and the same command
    65        the data mended, or the job edited, and the same command

After every other end there is nothing to type: its message says what to look at, or whom to ask.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from runner.errors import DataError, JobError, Preempted, StorageError


def again(code: int, program: str, words: Sequence[str], file: str | None) -> str | None:
    """The line, or none.

    Args:
        program: the command line's own name.
        words: what was typed after it.
        file: the job's; None: it has none.
    """
    command = f"{program} {shlex.join(words)}"
    if code in (Preempted.exit_code, StorageError.exit_code):
        return f"    next: {command}"
    if code == JobError.exit_code:
        return f"    next: edit {file or 'the job'}, then: {command}"
    if code == DataError.exit_code:
        return f"    next: mend that, or edit {file or 'the job'}, then: {command}"
    return None
