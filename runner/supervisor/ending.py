"""What a person reads last of a run that is done: the verdict, and what to type next. Pure.

relaxed accuracy  0.00 -> 0.92  (n=320)
done: 250 steps in 3:10, 2 attempts; runs/demo-sft/adapter
next: runner export runs/demo-sft --to demo-sft-export
"""

from __future__ import annotations

import shlex
from pathlib import Path

from runner.supervisor.progress import change_lines, duration, near
from runner.supervisor.result import Result


def verdict(ended: Result, trained: Path) -> list[str]:
    """What came of it.

    Args:
        trained: where what was trained lies.
    """
    attempts = f"{ended.attempts} attempt{'' if ended.attempts == 1 else 's'}"
    return [
        *change_lines(ended.metrics["before"], ended.metrics["after"]),
        *_chosen(ended),
        f"done: {ended.steps} steps in {duration(ended.seconds)}, {attempts}; {near(trained)}",
    ]


def _chosen(ended: Result) -> list[str]:
    """Which step it is that the metrics are of, where it was chosen."""
    best = ended.best
    if best is None:
        return []
    early = "training ended early; " if ended.stopped_early else ""
    by = f"{best['metric'].replace('_', ' ')} ({best['value']:.4g})"
    return [f"{early}kept: step {best['step']}, the best by {by}"]


def next_lines(run: Path, program: str, report: bool) -> list[str]:
    """What to type next.

    Args:
        run: `runs/<name>`.
        program: the command line's own name.
        report: whether the command itself leaves one, and says where.
    """
    folder = shlex.quote(near(run))
    asked = [] if report else [f"{program} report {folder}"]
    lines = [*asked, f"{program} export {folder} --to {shlex.quote(f'{run.name}-export')}"]
    return [f"{'      ' if number else 'next: '}{line}" for number, line in enumerate(lines)]
