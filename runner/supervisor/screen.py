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
from typing import IO, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from runner.events import Event
from runner.supervisor.progress import PHASES, duration, fidelity_line, metric_lines, printable

SECONDS_BETWEEN = 10.0
"""Without a terminal, progress is a line this often, at every tenth of the way, and at the first and last."""

SLOW_STORE = 3.0
"""Seconds of failing calls after which a person wants to know."""

_WINDOW = 20
"""Steps that rates and ETA are averaged over."""

_PARTS = ("description", "fields[count]", "fields[detail]")
"""Of the bar's line, around the bar."""

_BAR = 24
"""Columns of the bar, where there is room."""

_LEAST_BAR = 8

_GAP = 1
"""Columns between two parts of the bar's line."""

_SLOW_DATA = 0.02
"""Share of the time that training may wait for data before a person is told."""


class _Output(Console):
    """A console whose reader may leave: then it is quiet, and nothing fails at exit either."""

    def on_broken_pipe(self) -> None:
        # Rich's own answer is to exit; the run goes on.
        self.quiet = True
        silence(self.file)


def silence(file: IO[Any]) -> None:
    """Let a file point nowhere, because Python flushes it once more at exit and would turn the exit code into
    120."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, file.fileno())
    except (OSError, ValueError):  # no descriptor behind it
        pass
    finally:
        os.close(null)


class Screen:
    """The display of one run.

    Args:
        file: where to; stdout by default.
        clock: seconds, only their differences matter.
        quiet: show warnings, and what `loud` is told, alone.
    """

    def __init__(
        self,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        quiet: bool = False,
    ) -> None:
        file = file or sys.stdout
        tty = file is not None and file.isatty()  # None: of a process that was started without
        self._console = _Output(
            file=file,
            quiet=file is None,
            highlight=False,
            markup=False,
            emoji=False,
            soft_wrap=True,
        )
        # Rich alone would draw into a file where FORCE_COLOR is set.
        self._bars = tty and self._console.is_terminal and not self._console.is_dumb_terminal
        self._quiet = quiet
        self._clock = clock
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._phase = ""
        self._rates: deque[tuple[float, int, int, float]] = deque(maxlen=_WINDOW)
        self._last_line: dict[str, tuple[float, int]] = {}

    def show(self, event: Event) -> None:
        """Show what an event means to a person; most mean nothing."""
        match event["event"]:
            case "warning":
                self.loud(f"warning: {event.get('message')}")
            case "store" if event.get("waited", 0) >= SLOW_STORE:
                reason = str(event.get("message")).partition("; remedy")[0]
                self.loud(f"the store does not answer, {event['waited']:.0f} s by now: {reason}")
            case "phase" if not self._quiet:
                self._on_phase(str(event["phase"]))
            case "step" if not self._quiet:
                self._on_step(event)
            case "progress" if not self._quiet:
                self._on_progress(str(event["phase"]), int(event["done"]), int(event["total"]))
            case _:
                for line in lines_of(event):
                    self.line(line)

    def line(self, text: str) -> None:
        """One line of text about how it goes, above the bar if there is one."""
        if not self._quiet:
            self.loud(text)

    def loud(self, text: str) -> None:
        """One line of text, also where it is to be quiet."""
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
        if self._bars:
            self._draw(name, None, None, [])
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
        self._report("training", step, steps, "step ", parts)

    def _on_progress(self, phase: str, done: int, total: int) -> None:
        name = PHASES.get(phase, phase)
        if phase == "fetch":
            self._report(name, done >> 20, max(1, total >> 20), "", ["MiB"])
        else:
            self._report(name, done, total, f"{name} ", [])

    def _report(self, name: str, done: int, total: int, noun: str, details: list[str]) -> None:
        if self._bars:
            self._draw(name, done, total, details)
            return
        now, tenth = self._clock(), 10 * done // total if total else 10
        at, before = self._last_line.get(name, (None, 0))
        if at is None or tenth != before or now - at >= SECONDS_BETWEEN or done >= total:
            self._last_line[name] = (now, tenth)
            self.line("  ".join([f"{noun}{done}/{total}", *details]))

    def _draw(self, name: str, done: int | None, total: int | None, details: list[str]) -> None:
        count = "" if total is None else f"{done}/{total}"
        name, width, detail = fitted(name, count, details, self._console.width)
        words = [TextColumn(f"{{task.{part}}}", markup=False) for part in _PARTS]
        columns = (words[0], *([BarColumn(bar_width=width)] if width else []), *words[1:])
        if self._bar is None:
            self._bar = Progress(*columns, console=self._console, auto_refresh=False, transient=True)
            self._task = self._bar.add_task(name, total=None, count="", detail="")
            self._guard(self._bar.start)
        assert self._task is not None
        self._bar.columns = columns
        self._bar.reset(
            self._task, total=total, completed=done or 0, description=name, count=count, detail=detail
        )
        self.tick()


def lines_of(event: Event) -> list[str]:
    """What other events mean to a person; most mean nothing."""
    match event:
        case {"event": "plan", "steps": steps, "rows": rows, "geometry": dict(cut)}:
            return [_fits(cut, steps, rows)]
        case {"event": "audit", "lines": list(lines)}:
            return [str(line) for line in lines]
        case {"event": "evaluation", "when": when}:
            return [f"{when}: {line}" for line in metric_lines(event.get("metrics") or {})]
        case {"event": "fidelity", "changes": list(changes)}:
            return [fidelity_line(changes)]
        case {"event": "commit", "id": id, "step": step}:
            return [f"checkpoint {id} is committed, step {step}"]
        case {"event": "removed", "id": id, "reason": reason}:
            return [f"removed leftover {id}: {reason}"]
        case {"event": "message", "text": text}:
            return [str(text)]
    return []


def _fits(cut: Mapping[str, Any], steps: Any, rows: Any) -> str:
    """How the global batch is cut, now that it is known to fit."""
    sizes = [f"{cut.get('per_device')} rows at once"]
    if cut.get("world", 1) != 1:
        sizes.append(f"{cut['world']} processes")
    if cut.get("accumulation", 1) != 1:
        sizes.append(f"{cut['accumulation']} accumulated")
    counted = f"{rows:,}" if isinstance(rows, int) else f"{rows}"
    return (
        f"{steps} steps of {cut.get('global_batch_size')} rows ({' x '.join(sizes)}), {counted} rows in all"
    )


def fitted(name: str, count: str, details: Sequence[str], width: int) -> tuple[str, int, str]:
    """One line for a terminal of this width: the name, the width of the bar, and the details.

    What has no room goes, in this order: the details between the first and the last, from the back; the bar;
    the last detail, the first; the end of the name. Of `loss 0.5  900 tokens/s  1.5 GiB  ETA 0:50` stay
    `loss 0.5  ETA 0:50`.
    """
    room = width - 1 - len(name) - len(count) - 3 * _GAP
    kept = list(details)
    while len(kept) > 2 and len("  ".join(kept)) > room - _LEAST_BAR:
        del kept[-2]
    while kept and len("  ".join(kept)) > room:
        del kept[-1]
    detail = "  ".join(kept)
    bar = min(_BAR, room - len(detail))
    bar = bar if bar >= _LEAST_BAR else 0
    return name[: max(0, width - 1 - len(count) - _GAP)], bar, detail
