"""What a command says when it ends, for whoever finds its container: one JSON object in one file.

    RUNNER_TERMINATION_LOG=/dev/termination-log
    {"outcome": "preempted", "exit_code": 75, "step": 120, "checkpoint": "00000120-...", "message": "..."}

outcome       done, preempted, failed
message       what it printed: no traceback, and nothing that looks like a credential
step          newest that is committed, checkpoint its id; null when nothing is, or this process cannot know

At most `MOST` bytes of UTF-8, which is all that Kubernetes keeps. The file is written in place: there it is a
mount, which nothing can replace.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from runner.command import complain
from runner.errors import RunnerError
from runner.job.secrets import without_secrets

VARIABLE = "RUNNER_TERMINATION_LOG"

MOST = 4096


def spoken(environ: Mapping[str, str], act: Callable[[], int]) -> int:
    """Do what a command does, and write why it failed, if it does. One that succeeds says so itself.

    Raises:
        Whatever `act` raises.
    """
    try:
        return act()
    except RunnerError as error:
        step, checkpoint = error.kept or (None, None)
        write(environ, error.outcome, error.exit_code, str(error), step, checkpoint)
        raise
    except KeyboardInterrupt:
        write(environ, "failed", 130, "interrupted")
        raise
    except BaseException as error:
        what = f"{type(error).__name__}: this is a defect of vlm-runner; its log says where"
        write(environ, "failed", RunnerError.exit_code, what)
        raise


def write(
    environ: Mapping[str, str],
    outcome: str,
    exit_code: int,
    message: str,
    step: int | None = None,
    checkpoint: str | None = None,
) -> None:
    """Write the file, where one is asked for. One that cannot be written is said, and that is all."""
    if not (path := environ.get(VARIABLE)):
        return
    said = {"outcome": outcome, "exit_code": exit_code, "step": step, "checkpoint": checkpoint}
    try:
        Path(path).write_bytes(_encoded(without_secrets(message, environ), said))
    except (OSError, ValueError) as error:
        complain(f"warning: {VARIABLE}={path}: cannot be written: {error}")


def _encoded(message: str, said: Mapping[str, object]) -> bytes:
    """The object, with as much of the message as there is room for."""
    low, high = 0, len(message)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(_json(message, middle, said)) <= MOST else (low, middle - 1)
    return _json(message, low, said)


def _json(message: str, length: int, said: Mapping[str, object]) -> bytes:
    text = message if length >= len(message) else f"{message[:length]} ..."
    document = {**said, "message": text}
    # A lone surrogate, of a file's name, is no UTF-8.
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
