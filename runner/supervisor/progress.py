"""What people see of a run: a bar on a terminal, single lines elsewhere, and the numbers at the end.

`Screen.show` takes every event of a run (`runner.events`) and decides what is worth a line. Nothing is
decided from what is shown, and a terminal or pipe that goes away costs the display only. Rich draws the
bar, from this thread alone: PDEATHSIG and fork want one thread (`runner.supervisor.ranks`).
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from runner.events import Event

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

SECONDS_BETWEEN = 10.0
"""Without a terminal, progress is a line this often, at every tenth of the way, and at the first and last."""

SLOW_STORE = 3.0
"""Seconds of failing calls after which a person wants to know."""

_WINDOW = 20
"""Steps that rates and ETA are averaged over."""

_SLOW_DATA = 0.02
"""Share of the time that training may wait for data before a person is told."""


class _Output(Console):
    """A console whose reader may leave: then it is quiet, and nothing fails at exit either."""

    def on_broken_pipe(self) -> None:
        # Rich's own answer is to exit; the run goes on. The file points nowhere from here, because
        # Python flushes it once more at exit and would turn the exit code into 120.
        self.quiet = True
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, self.file.fileno())
        except (OSError, ValueError):  # no descriptor behind it
            pass
        finally:
            os.close(null)


class Screen:
    """The display of one run.

    Args:
        file: where to; stdout by default.
        clock: seconds, only their differences matter.
    """

    def __init__(self, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = _Output(
            file=file or sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True
        )
        self._clock = clock
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._phase = ""
        self._rates: deque[tuple[float, int, int, float]] = deque(maxlen=_WINDOW)
        self._last_line: dict[str, tuple[float, int]] = {}

    def show(self, event: Event) -> None:
        """Show what an event means to a person; most mean nothing."""
        match event["event"]:
            case "phase":
                self._on_phase(str(event["phase"]))
            case "plan":
                rows, steps = event.get("rows", "?"), event.get("steps", "?")
                cut = event.get("geometry")
                shape = (
                    f" of {cut.get('per_device')} x {cut.get('accumulation')} rows"
                    if isinstance(cut, dict)
                    else ""
                )
                if isinstance(cut, dict) and cut.get("world", 1) != 1:
                    shape += f" on each of {cut['world']} processes"
                self.line(f"{rows} rows, {steps} steps{shape}")
            case "audit":
                for line in event.get("lines", []):
                    self.line(str(line))
            case "step":
                self._on_step(event)
            case "progress":
                self._on_progress(str(event["phase"]), int(event["done"]), int(event["total"]))
            case "evaluation":
                for line in metric_lines(event.get("metrics") or {}):
                    self.line(f"{event.get('when')}: {line}")
            case "fidelity":
                self.line(fidelity_line(list(event["changes"])))
            case "commit":
                self.line(f"checkpoint {event['id']} is committed, step {event['step']}")
            case "removed":
                self.line(f"removed leftover {event['id']}: {event['reason']}")
            case "store" if event.get("waited", 0) >= SLOW_STORE:
                reason = str(event.get("message")).partition("; remedy")[0]
                self.line(f"the store does not answer, {event['waited']:.0f} s by now: {reason}")
            case "warning":
                self.line(f"warning: {event.get('message')}")
            case "message":
                self.line(str(event.get("text")))

    def line(self, text: str) -> None:
        """One line of text, above the bar if there is one."""
        self._guard(lambda: self._console.print(printable(text)))

    def tick(self) -> None:
        """Draw the bar again; called a few times a second."""
        if self._bar is not None:
            self._guard(self._bar.refresh)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._guard(self._bar.stop)
            self._bar = None

    def _guard(self, draw: Callable[[], object]) -> None:
        try:
            draw()
        except (OSError, ValueError):  # a terminal that hung up (EIO), a full disk behind `>`, a closed file
            self._console.on_broken_pipe()

    def _on_phase(self, phase: str) -> None:
        if phase == self._phase:
            return
        # Training is interrupted by every save; that is no news.
        quiet = phase == "save" or (phase == "train" and self._phase == "save")
        self._phase = phase
        name = PHASES.get(phase, phase)
        if quiet:
            return
        if self._console.is_terminal:
            self._draw(name, None, None, "")
        else:
            self.line(name)

    def _on_step(self, event: Event) -> None:
        step, steps = int(event["step"]), int(event["steps"])
        waited = float(event.get("data_seconds", 0.0))
        self._rates.append((float(event["seconds"]), int(event["tokens"]), int(event["images"]), waited))
        seconds = sum(rate[0] for rate in self._rates) or float("inf")
        parts = [
            f"loss {event['loss']:.4f}",
            f"{sum(rate[1] for rate in self._rates) / seconds:,.0f} tokens/s",
            f"{sum(rate[2] for rate in self._rates) / seconds:.1f} images/s",
        ]
        if (share := sum(rate[3] for rate in self._rates) / seconds) >= _SLOW_DATA:
            parts.append(f"{share:.0%} waiting for data")
        if event.get("memory_bytes"):
            parts.append(f"{event['memory_bytes'] / 2**30:.2f} GiB")
        if step < steps:
            parts.append(f"ETA {duration(seconds / len(self._rates) * (steps - step))}")
        self._report("training", step, steps, "step ", "  ".join(parts))

    def _on_progress(self, phase: str, done: int, total: int) -> None:
        name = PHASES.get(phase, phase)
        if phase == "fetch":
            self._report(name, done >> 20, max(1, total >> 20), "", "MiB")
        else:
            self._report(name, done, total, f"{name} ", "")

    def _report(self, name: str, done: int, total: int, noun: str, detail: str) -> None:
        if self._console.is_terminal:
            self._draw(name, done, total, detail)
            return
        now, tenth = self._clock(), 10 * done // total if total else 10
        at, before = self._last_line.get(name, (None, 0))
        if at is None or tenth != before or now - at >= SECONDS_BETWEEN or done >= total:
            self._last_line[name] = (now, tenth)
            self.line(f"{noun}{done}/{total}  {detail}".rstrip())

    def _draw(self, name: str, done: int | None, total: int | None, detail: str) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[count]}", markup=False),
                TextColumn("{task.fields[detail]}", markup=False),
                console=self._console,
                auto_refresh=False,
                transient=True,
            )
            self._task = self._bar.add_task(name, total=None, count="", detail="")
            self._guard(self._bar.start)
        assert self._task is not None
        count = "" if total is None else f"{done}/{total}"
        self._bar.reset(
            self._task, total=total, completed=done or 0, description=name, count=count, detail=detail
        )
        self.tick()


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


def printable(text: str) -> str:
    """The text without what would move a cursor or ring a bell: it may come from a dataset."""
    return "".join(character if character.isprintable() or character in "\n\t" else "�" for character in text)


def _title(name: str) -> str:
    return name.replace("_", " ")


def _estimate(value: Any) -> str:
    if not isinstance(value, Mapping):
        return _number(value)
    ends = [value.get(end) for end in ("low", "high")]
    interval = "" if None in ends else f" [{', '.join(map(_number, ends))}]"
    return _number(value.get("overall")) + interval


def _number(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else "-"


def _count(value: Any, with_groups: bool = False) -> str:
    if not isinstance(value, Mapping) or "n" not in value:
        return ""
    groups = ", ".join(f"{key} {_number(share)}" for key, share in value.items() if f"n_{key}" in value)
    return f" (n={value['n']}{'; ' + groups if groups and with_groups else ''})"
