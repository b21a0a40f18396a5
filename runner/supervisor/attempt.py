"""One attempt: the trainer's folder and environment, what it said, and how it ended in words.

    runs/<name>/attempts/<n>/    plan.json, trainer.log, request.json (ours), outcome.json (its last act)

What is committed and what follows is `runner.launch`'s.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from runner.durable import disk, write_json, write_text
from runner.errors import OutOfMemory
from runner.events import Event
from runner.plan import Plan
from runner.supervisor import cgroup
from runner.supervisor.progress import printable
from runner.supervisor.ranks import Exit, Notices, watch
from runner.supervisor.verdict import Crash, Outcome

TRAINER = (sys.executable, "-m", "runner.train")
"""The command that takes the path of a plan; tests give their own."""

_LOG_TAIL = 1 << 16
"""Bytes of a log's end that are searched for the error."""

_LONGEST_LINE = 300
"""Characters of it that are shown."""

_WITH_BATCH = ("probe", "train", "save")
"""Phases in which a micro-batch is or was just in memory."""

_ERROR_LINE = re.compile(r"^[\w.]*(Error|Exception|Exit|Interrupt|Killed|fault)\b")


@dataclass
class Seen:
    """What a trainer's events said so far."""

    phase: str = "start"
    step: int | None = None
    """The optimizer step at work while in training, from 1; None when the last one is done."""
    rows: tuple[int, ...] = ()
    """Rows of that step, if they were said."""
    per_device: int | None = None
    """The per-device size at work, tried or found; None before any."""
    fits: bool = False
    """Whether that size is what training runs with."""

    def note(self, event: Event) -> None:
        """Take one event."""
        match event["event"]:
            case "phase":
                self.phase = event["phase"]
            case "plan":
                restored = event.get("restored_step")
                self.step = restored + 1 if isinstance(restored, int) else None
                self._note_size(event.get("geometry"))
            case "probe":
                self.per_device = event["per_device"]
            case "begin":
                self.step, self.rows = event["step"], tuple(event["ids"])
            case "step":
                done = event["step"] >= event["steps"]
                self.step, self.rows = None if done else event["step"] + 1, ()

    def _note_size(self, cut: object) -> None:
        if isinstance(cut, dict) and isinstance(cut.get("per_device"), int):
            self.per_device, self.fits = cut["per_device"], True

    @property
    def place(self) -> str:
        """`in step 17`, `while loading`: where the trainer was."""
        return f"in step {self.step}" if self.working is not None else f"in phase {self.phase}"

    @property
    def working(self) -> int | None:
        """The step at work, None outside training."""
        return self.step if self.phase == "train" else None


@dataclass(frozen=True)
class Ended:
    """A trainer that is gone."""

    exit: Exit
    outcome: Outcome | None
    """None: it crashed."""
    seen: Seen
    log: Path
    killed_for_memory: bool = False
    """By the kernel's own count (`runner.supervisor.cgroup`)."""

    @property
    def out_of_memory(self) -> bool:
        """Whether a micro-batch did not fit.

        outcome         killed for memory    phase                 answer
        out_of_memory   -                    -                     yes
        any other       -                    -                     no
        none            yes                  probe, train, save    yes
        none            yes                  any other             no: no smaller micro-batch would help
        none            no                   -                     no: it crashed
        """
        if self.outcome is not None:
            return self.outcome.outcome == OutOfMemory.outcome
        return self.killed_for_memory and self.seen.phase in _WITH_BATCH

    @property
    def reason(self) -> str:
        """Why it did not finish, in one line."""
        if self.outcome is not None:
            return self.outcome.error or str(self.exit)
        if self.killed_for_memory:
            return "SIGKILL by the kernel: its control group is out of memory"
        line = last_error(self.log)
        # The log of a process that was killed ends with something else.
        return f"{self.exit}: {line}" if line and self.exit.returncode > 0 else str(self.exit)

    def message(self, number: int) -> str:
        """What a person needs to know about the end of this attempt."""
        line = last_error(self.log)
        said = f"; its last line: {line}" if line and line not in self.reason else ""
        return f"attempt {number} ended {self.seen.place} with {self.reason}{said}; log: {self.log}"

    def crash(self, number: int, progressed: bool) -> Crash:
        """For the verdict."""
        return Crash(
            attempt=number,
            step=self.seen.working,
            reason=self.reason,
            progressed=progressed,
            by_signal=self.outcome is None and self.exit.returncode < 0,
            rows=self.seen.rows,
        )


def new_folder(attempts: Path) -> tuple[int, Path]:
    """The next attempt's number and its new, empty folder. A number is used once, whatever happens to it."""
    with disk("create the attempt's folder", attempts):
        attempts.mkdir(parents=True, exist_ok=True)
        number = last_number(attempts) + 1
        folder = attempts / str(number)
        folder.mkdir()  # exclusive: an existing one is an error
    return number, folder


def last_number(attempts: Path) -> int:
    """The number of the newest attempt, 0 if there is none."""
    if not attempts.is_dir():
        return 0
    return max((int(path.name) for path in attempts.iterdir() if path.name.isdecimal()), default=0)


def environ_of_trainer(environ: Mapping[str, str]) -> dict[str, str]:
    """The supervisor's environment, with what a single quiet trainer needs on top.

    CUDA_VISIBLE_DEVICES   0                 of a supervisor that has none
                           its first         of one that has a list: TRL refuses DataParallel over several
                           the same          of one that hides all (empty, -1)

    OMP_WAIT_POLICY        PASSIVE           unless it is set: on a machine with other work, threads that spin
                                             at OpenMP's barriers made a training step twenty times slower
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {
        **environ,
        "CUDA_VISIBLE_DEVICES": visible,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


def run(
    plan: Plan,
    *,
    trainer: Sequence[str],
    environ: Mapping[str, str],
    notices: Notices,
    seen: Seen,
    on_event: Callable[[Event], None],
    on_notice: Callable[[str], None],
    on_tick: Callable[[], None],
) -> Ended:
    """Start a trainer on a plan and stay until it is gone.

    Args:
        seen: kept up to date before each `on_event`.
    """
    folder = plan.attempt_dir
    file, log = folder / "plan.json", folder / "trainer.log"
    with disk("write the plan", file):
        write_text(file, plan.model_dump_json(indent=2) + "\n")

    def ask_to_stop(reason: str) -> bool:
        with disk("ask the trainer to stop", folder):
            write_json(folder / "request.json", {"format": 1, "action": "stop", "reason": reason})
        on_notice(reason)
        return False

    def note(event: Event) -> None:
        seen.note(event)
        on_event(event)

    kills = cgroup.kills()
    exit = watch(
        [*trainer, str(file)],
        environ=environ,
        log=log,
        notices=notices,
        on_event=note,
        on_notice=ask_to_stop,
        on_tick=on_tick,
    )
    unasked = exit.returncode == -signal.SIGKILL and not exit.killed_by_us
    for_memory = unasked and kills is not None and (cgroup.kills() or 0) > kills
    return Ended(exit, _outcome(folder / "outcome.json"), seen, log, for_memory)


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


def _outcome(path: Path) -> Outcome | None:
    """What the trainer left; one that cannot be read is none."""
    try:
        with disk("read the outcome", path):
            return Outcome.model_validate(json.loads(path.read_bytes())) if path.exists() else None
    except (ValueError, ValidationError):
        return None
