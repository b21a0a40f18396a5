"""Processes of this machine as Linux shows them: children, and whoever works in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def _stat(pid: str) -> list[str]:
    """State, parent and the rest of one process; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []


def _all() -> Iterator[str]:
    return (name for name in os.listdir("/proc") if name.isdecimal())  # noqa: PTH208


def children(pid: int) -> list[int]:
    """Living children of a process."""
    found = []
    for name in _all():
        stat = _stat(name)
        if len(stat) > 1 and stat[1] == str(pid) and stat[0] not in "ZX":
            found.append(int(name))
    return found


def command_line(pid: int) -> str:
    """The command of a process, words apart by a blank; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return ""


def working_in(folder: Path) -> list[str]:
    """Commands of living processes that name a folder."""
    lines = [command_line(int(name)) for name in _all()]
    return [line for line in lines if str(folder) in line]
