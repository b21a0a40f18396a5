"""`runner health --max-age SECONDS --runs DIR`: does the supervisor of DIR still look around?

The exec probe of a pod. A supervisor writes the time into `runs/<name>/alive` at each look for notices, which
all its loops do more than once a second, whatever they wait for: no thread does it for it, so that one that
is stuck grows old. It says nothing about the trainer: a silent one is its supervisor's to judge, and a probe
that killed the pod for it would cost the save.

The time is the machine's monotonic clock, which no correction of the date moves and which begins anew when
the machine does. Only the standard library: a probe runs every few seconds beside the training.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from runner.command import Verb, complain, say

FILE = "alive"

EVERY = 1.0
"""Seconds between two times that are written."""

_DIGITS = 20


class Heart:
    """The file of one supervisor, while the context lasts. What cannot be written is not: a disk that fails
    is said by whoever needs it.

    Args:
        folder: `runs/<name>`, or a node's in it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._file: int | None = None
        self._at = float("-inf")

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError):
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            os.close(self._file)

    def beat(self) -> None:
        """Write the time, once in `EVERY` seconds."""
        now = time.monotonic()
        if self._file is not None and now - self._at >= EVERY:
            self._at = now
            with contextlib.suppress(OSError):  # in place: the same bytes need no space on a full disk
                os.pwrite(self._file, f"{now:{_DIGITS}.3f}".encode(), 0)


def age(runs: Path, now: float) -> float | None:
    """Seconds since the youngest sign of life below a folder of runs; None: there is none of this boot."""
    files = [*runs.glob(f"*/{FILE}"), *runs.glob(f"*/nodes/*/{FILE}")]
    ages = [now - beat for file in files if (beat := _read(file)) is not None and beat <= now]
    return min(ages, default=None)


def beat(folder: Path) -> float | None:
    """The time that a run's supervisor last wrote, on the machine's monotonic clock; None: nobody did."""
    return _read(folder / FILE)


def _read(file: Path) -> float | None:
    try:
        return float(file.read_bytes())
    except (OSError, ValueError):  # one that begins, or that this user may not read
        return None


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-age", type=float, default=60.0, metavar="SECONDS", help="how old is dead (default: 60)"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs are kept")


def _health(arguments: argparse.Namespace) -> int:
    found = age(arguments.runs, time.monotonic())
    if found is None:
        complain(f"dead: no supervisor has begun in {arguments.runs}")
        return 1
    line = f"its supervisor looked around {found:.1f} s ago, and {arguments.max_age:g} s are allowed"
    if not found <= arguments.max_age:
        complain(f"dead: {line}")
        return 1
    say(f"alive: {line}")
    return 0


HEALTH = Verb(
    "Say whether the supervisor of a folder of runs is alive: 0, or 1. For probes.",
    "  runner health --max-age 60 --runs /scratch/runs\n",
    _arguments,
    _health,
)
