"""One attempt: the trainer's folder and environment, what it said, and how it ended in words.

    runs/<name>/attempts/<n>/    plan.json, trainer.log, request.json (ours), outcome.json (its last act)

What is committed and what follows is `runner.launch`'s.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.durable import disk, write_text
from runner.errors import OutOfMemory
from runner.events import Event
from runner.plan import Plan
from runner.supervisor import cgroup, remains
from runner.supervisor.ranks import Exit, Notices, watch
from runner.supervisor.seen import Seen
from runner.supervisor.verdict import Crash, Outcome
from runner.supervisor.watchdog import Watchdog

TRAINER = (sys.executable, "-m", "runner.train")
"""The command that takes the path of a plan; tests give their own."""

NEAR = 0.95
"""Share of the memory limit at which a trainer is ended: the kernel may kill its supervisor as well."""


SECRET = ("AWS_", "GOOGLE_", "AZURE_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Beginnings of variables that a trainer does not get."""


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
    ended_for_memory: bool = False
    """By its supervisor, near the limit, with a micro-batch in memory."""

    @property
    def out_of_memory(self) -> bool:
        """Whether a micro-batch did not fit.

        outcome         ended     killed    phase                 answer
        out_of_memory   -         -         -                     yes
        any other       -         -         -                     no
        none            yes       -         -                     yes: it was seen when it was ended
        none            no        yes       probe, train, save    yes
        none            no        yes       any other             no: no smaller micro-batch would help
        none            no        no        -                     no: it crashed
        """
        if self.outcome is not None:
            return self.outcome.outcome == OutOfMemory.outcome
        return self.ended_for_memory or (self.killed_for_memory and self.seen.with_batch)

    @property
    def reason(self) -> str:
        """Why it did not finish, in one line."""
        if self.outcome is not None:
            return self.outcome.error or str(self.exit)
        if self.exit.ended is not None:
            return self.exit.ended
        if self.killed_for_memory:
            return "SIGKILL by the kernel: its control group is out of memory"
        line = remains.last_error(self.log)
        # The log of a process that was killed ends with something else.
        return f"{self.exit}: {line}" if line and self.exit.returncode > 0 else str(self.exit)

    def message(self, number: int) -> str:
        """What a person needs to know about the end of this attempt."""
        line = remains.last_error(self.log)
        said = f"; its last line: {line}" if line and line not in self.reason else ""
        place = self.seen.place
        hung = self.outcome is None and self.exit.ended is not None and place in self.exit.ended
        how = self.reason if hung else f"ended {place} with {self.reason}"
        return f"attempt {number} {how}{said}; log: {self.log}"

    def crash(self, number: int, progressed: bool) -> Crash:
        """For the verdict."""
        return Crash(
            attempt=number,
            step=self.seen.working,
            reason=self.reason,
            progressed=progressed,
            by_signal=self.outcome is None and self.exit.returncode < 0 and self.exit.ended is None,
            rows=self.seen.rows,
        )


def new_folder(attempts: Path, after: int = 0) -> tuple[int, Path]:
    """The next attempt's number and its new, empty folder. A number is used once, whatever happens to it.

    Args:
        after: the number of the newest attempt on any machine.
    """
    with disk("create the attempt's folder", attempts):
        attempts.mkdir(parents=True, exist_ok=True)
        number = max(last_number(attempts), after) + 1
        folder = attempts / str(number)
        folder.mkdir()  # exclusive: an existing one is an error
    return number, folder


def last_number(attempts: Path) -> int:
    """The number of the newest attempt, 0 if there is none."""
    if not attempts.is_dir():
        return 0
    return max((int(path.name) for path in attempts.iterdir() if path.name.isdecimal()), default=0)


def environ_of_trainer(environ: Mapping[str, str]) -> dict[str, str]:
    """The supervisor's environment, with what a single quiet trainer needs on top, and without credentials of
    stores: a trainer talks to none, and runs code of many packages (`SECRET`).

    CUDA_VISIBLE_DEVICES   0                 of a supervisor that has none
                           its first         of one that has a list: TRL refuses DataParallel over several
                           the same          of one that hides all (empty, -1)

    OMP_WAIT_POLICY        PASSIVE           unless it is set: on a machine with other work, threads that spin
                                             at OpenMP's barriers made a training step twenty times slower
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {
        **{name: value for name, value in environ.items() if not name.startswith(SECRET)},
        "CUDA_VISIBLE_DEVICES": visible,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


def too_full(share: float, seen: Seen, plan: Plan) -> bool:
    """Whether a trainer is to be ended for its memory, before the kernel kills it and more.

    Only where a smaller micro-batch may help: what there is may be enough, and an end for nothing is none.

        share         phase                 per device    loss              answer
        below NEAR    -                     -             -                 no
        from NEAR     probe, train, save    above 1       any but aot*      yes
        from NEAR     probe, train, save    above 1       aot*: it sorts    no
        from NEAR     probe, train, save    1             -                 no
        from NEAR     any other             -             -                 no
    """
    size = seen.per_device or plan.geometry.per_device
    return share >= NEAR and seen.with_batch and size > 1 and not plan.job.training.sorts


@dataclass
class _Guard:
    """Looks after a trainer that would not end by itself."""

    plan: Plan
    seen: Seen
    log: Path
    watchdog: Watchdog
    for_memory: str | None = None
    """What it said of the memory first."""

    def look(self) -> str | None:
        """Why the trainer has to be ended now; None: it goes on."""
        share = cgroup.pressure()
        if share is not None:
            self.seen.memory_peak = max(share, self.seen.memory_peak or 0.0)
            if too_full(share, self.seen, self.plan):
                self.for_memory = self.for_memory or f"at {share * 100:.0f} % of the memory limit"
                return self.for_memory
        with disk("read the log", self.log):
            silence = self.watchdog.tick(self.log.stat().st_size)
        return None if silence is None else f"hung: {silence} {self.seen.place}"


def run(
    plan: Plan,
    *,
    trainer: Sequence[str],
    environ: Mapping[str, str],
    notices: Notices,
    seen: Seen,
    on_event: Callable[[Event], None],
    on_notice: Callable[[str], bool],
    on_tick: Callable[[], str | None],
) -> Ended:
    """Start a trainer on a plan and stay until it is gone. One that hangs, or fills the memory, is ended.

    Args:
        seen: kept up to date before each `on_event`.
        on_notice: asks the trainer to stop (`runner.request`), or returns True to end it.
        on_tick: a reason that it returns ends the trainer, too.
    """
    folder = plan.attempt_dir
    file, log = folder / "plan.json", folder / "trainer.log"
    guard = _Guard(plan, seen, log, Watchdog())
    with disk("write the plan", file):
        write_text(file, plan.model_dump_json(indent=2) + "\n")

    def note(event: Event) -> None:
        seen.note(event)
        guard.watchdog.note(event)
        on_event(event)

    kills = cgroup.kills()
    exit = watch(
        [*trainer, str(file)],
        environ=environ,
        log=log,
        notices=notices,
        on_event=note,
        on_notice=on_notice,
        on_tick=lambda: on_tick() or guard.look(),
    )
    unasked = exit.returncode == -signal.SIGKILL and exit.ended is None
    return Ended(
        exit,
        remains.outcome(folder / "outcome.json"),
        seen,
        log,
        killed_for_memory=unasked and kills is not None and (cgroup.kills() or 0) > kills,
        ended_for_memory=exit.ended is not None and exit.ended == guard.for_memory,
    )
