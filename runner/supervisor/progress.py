"""A run in words for people: its phases, its metrics, durations. `runner.supervisor.screen` shows them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PHASES = {
    "fetch": "fetching",
    "load": "loading the model",
    "data": "preparing the data",
    "evaluate_before": "evaluating before training",
    "probe": "finding a batch size that fits",
    "train": "training",
    "wait": "waiting for the store",
    "save": "saving",
    "evaluate": "evaluating",
    "evaluate_loss": "evaluating the loss",
    "evaluate_after": "evaluating after training",
    "export": "exporting",
}


def metric_lines(metrics: Mapping[str, Any]) -> list[str]:
    """`relaxed accuracy 0.93 (n=240; augmented 0.95, human 0.91)`, one line a metric that means something."""
    return [
        f"{_title(name)} {_estimate(value)}{_count(value, with_groups=True)}"
        for name, value in metrics.items()
        if value is not None
    ]


def change_lines(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[str]:
    """`relaxed accuracy  0.21 -> 0.93  (n=240)`, one line a metric, aligned; an unknown side is -.

    With a confidence interval: `preference accuracy  0.50 [0.44, 0.56] -> 0.97 [0.94, 0.99]  (n=240)`.
    """
    names = list(dict.fromkeys([*(before or {}), *(after or {})]))
    width = max((len(name) for name in names), default=0)
    return [
        f"{_title(name):<{width}}  {_estimate((before or {}).get(name))} -> "
        f"{_estimate((after or {}).get(name))} {_count((after or before or {}).get(name))}".rstrip()
        for name in names
    ]


def fidelity_line(changes: Sequence[str]) -> str:
    """How an attempt goes on from its checkpoint (`runner.plan.changes`)."""
    if not changes:
        return "resume: exact, with the same world, strategy and micro-batch"
    how = ", ".join(changes)
    return f"resume: close, {how}: order of rows and global batch are kept, sums round differently"


def duration(seconds: float) -> str:
    """`4:05`, `1:02:30`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def moment(at: Any) -> str | None:
    """`2026-11-30 09:00:00 UTC`, of seconds since 1970; None of what is none, as of no clock."""
    if isinstance(at, bool) or not isinstance(at, int | float):
        return None
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
    except (ValueError, OverflowError, OSError):
        return None


def near(path: Path) -> str:
    """A path as a person here would type it: from the current folder on, where it lies below that."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # somebody removed it; a run that ends has its last words all the same
        return str(path)
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def printable(text: str) -> str:
    """The text without what would move a cursor or ring a bell: it may come from a dataset."""
    return "".join(character if character.isprintable() or character in "\n\t" else "�" for character in text)


def point(value: Any) -> str:
    """A metric as one number, without its interval: `0.93`; - where it is not known."""
    return _number(value.get("overall") if isinstance(value, Mapping) else value)


def _title(name: str) -> str:
    return name.replace("_", " ")


def _estimate(value: Any) -> str:
    if not isinstance(value, Mapping):
        return _number(value)
    ends = [value.get(end) for end in ("low", "high")]
    interval = "" if None in ends else f" [{', '.join(map(_number, ends))}]"
    return point(value) + interval


def _number(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else "-"


def _count(value: Any, with_groups: bool = False) -> str:
    if not isinstance(value, Mapping) or "n" not in value:
        return ""
    groups = ", ".join(f"{key} {_number(share)}" for key, share in value.items() if f"n_{key}" in value)
    return f" (n={value['n']}{'; ' + groups if groups and with_groups else ''})"
