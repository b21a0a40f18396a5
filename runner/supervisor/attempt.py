"""One attempt: the trainer's folder, its processes, what they said, and how it ended in words.

    runs/<name>/attempts/<n>/
      plan.json, request.json        ours, for every rank
      trainer.log, outcome.json      of rank 0; the outcome is its last act
      trainer-<k>.log, outcome-<k>.json    of rank k

What is committed and what follows is `runner.launch`'s.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from runner.durable import disk, write_text
from runner.errors import OutOfMemory
from runner.events import Event
from runner.plan import Plan
from runner.supervisor import cgroup, remains
from runner.supervisor.environment import environs_of_ranks
from runner.supervisor.notices import Notices
from runner.supervisor.order import Share
from runner.supervisor.ranks import Child, Exit, watch
from runner.supervisor.seen import Seen
from runner.supervisor.verdict import Crash, Outcome
from runner.supervisor.watchdog import Watchdog
from runner.supervisor.world import Machine

TRAINER = (sys.executable, "-m", "runner.train")
"""The command that takes the path of a plan; tests give their own."""

NEAR = 0.95
"""Share of the memory limit at which a trainer is ended: the kernel may kill its supervisor as well."""


@dataclass(frozen=True)
class Ended:
    """A trainer that is gone, with all its ranks."""

    exit: Exit
    outcome: Outcome | None
    """None: it crashed."""
    seen: Seen
    log: Path
    """Of the rank that the end of the others follows from."""
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
            return self.exit.of_rank(self.outcome.error) if self.outcome.error else str(self.exit)
        if self.exit.ended is not None:
            return self.exit.ended
        if self.killed_for_memory:
            return self.exit.of_rank("SIGKILL by the kernel: its control group is out of memory")
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


def log_of(folder: Path, rank: int) -> Path:
    """The log of a rank in its attempt's folder."""
    return folder / (f"trainer-{rank}.log" if rank else "trainer.log")


def outcome_of(folder: Path, rank: int) -> Path:
    """What a rank leaves there at every end but a crash."""
    return folder / (f"outcome-{rank}.json" if rank else "outcome.json")


def judged(exit: Exit, left: Sequence[Outcome | None]) -> tuple[Exit, Outcome | None]:
    """The outcome of an attempt, and the exit that names the rank whose outcome it is.

        ended first    it left         others left      outcome of the attempt
        none badly     -               -                what rank 0 left
        a bad one      a cause         -                that
        a bad one      another, or no  a cause          that: the first failed of it
        a bad one      another, or no  no cause         what the first left; none is a crash
        killed by us   a cause         -                that, of the first that has one
        killed by us   none            -                what rank 0 left
        the last three, and it is done, but not every rank left an outcome: none, one was killed at work

    A cause is an out of memory, or a failure with an exit code of its own (65, 78, ...). What is a failure
    with 1 here, a lost connection, say, may have its cause in another rank.

    Args:
        exit: the rank that ended badly first, or none.
        left: the outcome of each rank.
    """
    found = exit.rank or 0
    if exit.rank is not None or exit.ended is not None:
        found = next((rank for rank in (found, *range(len(left))) if is_cause(left[rank])), found)
    own = left[found]
    if own is None:
        return exit, None
    well = exit.rank is None and exit.ended is None
    if own.outcome == "done" and not well and None in left:
        return exit, None
    return (exit if found == (exit.rank or 0) else Exit(own.exit_code, rank=found)), own


def is_cause(outcome: Outcome | None) -> bool:
    """Whether an outcome says by itself why an attempt ended, whatever else went wrong."""
    if outcome is None:
        return False
    return outcome.outcome == OutOfMemory.outcome or (outcome.outcome == "failed" and outcome.exit_code != 1)


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
    machine: Machine,
    notices: Notices,
    seen: Seen,
    on_event: Callable[[Event], None],
    on_notice: Callable[[str], bool],
    on_tick: Callable[[], str | None],
    share: Share | None = None,
) -> Ended:
    """Start a trainer on a plan, with all its ranks here, and stay until it is gone. One that hangs, or fills
    the memory, is ended.

    Args:
        environ: the supervisor's own.
        seen: kept up to date before each `on_event`.
        on_notice: asks the trainer to stop (`runner.request`), or returns True to end it.
        on_tick: a reason that it returns ends the trainer, too.
        share: the ranks of this machine; None: all are here.
    """
    folder = plan.attempt_dir
    file, world = folder / "plan.json", plan.geometry.world
    first = 0 if share is None else share.first_rank
    guard = _Guard(plan, seen, log_of(folder, first), Watchdog())
    with disk("write the plan", file):
        write_text(file, plan.model_dump_json(indent=2) + "\n")

    def note(event: Event) -> None:
        seen.note(event)
        guard.watchdog.note(event)
        on_event(event)

    kills = cgroup.kills()
    environs = environs_of_ranks(environ, world, plan.strategy, machine, share)
    exit = watch(
        [
            Child([*trainer, str(file)], its_own, log_of(folder, rank))
            for rank, its_own in enumerate(environs, start=first)
        ],
        notices=notices,
        on_event=note,
        on_notice=on_notice,
        on_tick=lambda: on_tick() or guard.look(),
    )
    unasked = exit.returncode == -signal.SIGKILL and exit.ended is None
    left = [remains.outcome(outcome_of(folder, first + local)) for local in range(len(environs))]
    exit, outcome = judged(exit, left)
    if exit.rank is not None:
        exit = replace(exit, rank=first + exit.rank)
    return Ended(
        exit,
        outcome,
        seen,
        log_of(folder, first if exit.rank is None else exit.rank),
        killed_for_memory=unasked and kills is not None and (cgroup.kills() or 0) > kills,
        ended_for_memory=exit.ended is not None and exit.ended == guard.for_memory,
    )
