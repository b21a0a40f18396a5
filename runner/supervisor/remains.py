"""What a child leaves behind: the last error of its log, and the outcome of a trainer."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pydantic import ValidationError

from runner.durable import disk
from runner.supervisor.progress import printable
from runner.supervisor.verdict import Outcome

_LOG_TAIL = 1 << 16
"""Bytes of a log's end that are searched for the error."""

_LONGEST_LINE = 300
"""Characters of it that are shown."""

_ERROR_LINE = re.compile(r"^[\w.]*(Error|Exception|Exit|Interrupt|Killed|fault)\b")


def last_error(log: Path) -> str:
    """The last line of a log that names an error, else its last line; empty if it has none."""
    with disk("read the log", log), log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _LOG_TAIL))
        text = file.read().decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR_LINE.match(line)]
    line = (errors or lines or [""])[-1]
    return printable(line[:_LONGEST_LINE])


def outcome(path: Path) -> Outcome | None:
    """What the trainer left; one that cannot be read is none."""
    try:
        with disk("read the outcome", path):
            return Outcome.model_validate(json.loads(path.read_bytes())) if path.exists() else None
    except (ValueError, ValidationError):
        return None
