"""Two supervisors on one run, from two folders; the owner is stopped at a call for longer than it promised.

It is stopped (SIGSTOP) in the middle of a multi-part upload, between manifest and HEAD, while it deletes, its
request answered or still under way while another takes the run; then it wakes up (SIGCONT) and goes on as if
nothing had happened. One advances the run to its end, the other ends with 76, or waits and takes over, or
finds it done.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from runner.checkpoint.head import Head, decode
from tests.chaos.campaign import Model, keep, remove
from tests.chaos.nursery import Command
from tests.chaos.processes import children
from tests.chaos.proxy import Side, Strike
from tests.chaos.run import LONGEST, PREFIX, Arena, Run
from tests.chaos.verdict import ending, judge

OWNER, RIVAL = "owner", "rival"
"""Access keys, by which the proxy knows who asks."""

MID = (
    ("UploadPart", 3),
    ("CompleteMultipartUpload", 1),
    ("PUT blobs", 7),
    ("PUT checkpoints", 2),
    ("PUT HEAD", 5),
    ("LIST pins", 2),
    ("DELETE checkpoints", 1),
    ("DELETE blobs", 3),
    ("LIST blobs", 1),
    ("PUT events", 2),
)
"""Where the owner is stopped, and about how many calls of that kind it makes."""


@dataclass(frozen=True)
class Round:
    """What is done to one run."""

    name: str
    strike: Strike
    pause: float
    """Seconds that the owner is stopped."""
    rival_at: float | None
    """Seconds from the owner's start to the rival's; None: when the owner is stopped."""
    with_rank: bool
    """Whether its trainer is stopped as well, as on a machine that sleeps."""


@dataclass
class Tally:
    """All rounds."""

    rounds: int = 0
    takeovers: int = 0
    codes: Counter[tuple[int | None, int | None]] = field(default_factory=Counter)
    """Exit codes of owner and rival."""
    stops: Counter[tuple[str, str]] = field(default_factory=Counter)
    heads: int = 0
    broken: dict[str, list[str]] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """The tally for a person."""
        stopped = sum(self.stops.values())
        yield f"{self.rounds} duels, {stopped} with the owner stopped, {self.takeovers} with a takeover"
        for (place, side), number in sorted(self.stops.items()):
            yield f"  {place:26} {side} {number}"
        codes = ", ".join(f"{one}/{other} {number}" for (one, other), number in self.codes.most_common())
        yield f"exit codes of owner/rival: {codes}; {self.heads} accepted writes of HEAD, each a single line"


def rounds(seed: int, count: int, ttl: float) -> Iterator[Round]:
    """What happens follows from the seed and the number."""
    for number in range(count):
        dice = random.Random(f"{seed}-duel-{number}")
        place, most = dice.choice(MID)
        side: Side = dice.choice(("around", "after", "late"))
        pause = dice.uniform(0.7, 4) * ttl
        strike = Strike(dice.randint(1, most), side, place, delay=dice.uniform(0.2, 1.5) * pause)
        rival = dice.choice((None, None, None, None, 0.0, dice.uniform(0, 2)))
        yield Round(f"duel-{number}", strike, pause, rival, dice.random() < 0.3)


def play(
    arena: Arena, model: Model, planned: Iterator[Round], tally: Tally, lanes: int, say: Callable[[str], None]
) -> None:
    """Play rounds, several beside each other."""
    spoken = time.monotonic()
    with ThreadPoolExecutor(lanes) as pool:
        for _ in pool.map(lambda one: duel(arena, model, one, tally), planned):
            if time.monotonic() - spoken > 15:
                spoken = time.monotonic()
                say(f"{tally.rounds} duels, {tally.takeovers} takeovers, {len(tally.broken)} broken")


def duel(arena: Arena, model: Model, plan: Round, tally: Tally) -> None:
    """One round."""
    run = Run(arena, plan.name, model.kind)
    arena.observer.watch(run.name, PREFIX)
    homes = [run.machine]
    run.move()
    homes.append(run.machine)
    stopped = threading.Event()
    owner: list[Command] = []

    def stop() -> None:
        while not owner:
            time.sleep(0.001)
        pid = owner[0].pid
        victims = [pid, *(children(pid) if plan.with_rank else [])]
        _send(victims, signal.SIGSTOP)
        threading.Timer(plan.pause, _send, (victims, signal.SIGCONT)).start()
        stopped.set()

    run.trace.arm(plan.strike, stop, OWNER)
    owner.append(arena.nursery.start(run.invocation(homes[0], AWS_ACCESS_KEY_ID=OWNER)))
    if plan.rival_at is None:
        while not stopped.wait(0.02) and owner[0].code is None:
            pass
    else:
        time.sleep(plan.rival_at)
    rival = arena.nursery.start(run.invocation(homes[1], AWS_ACCESS_KEY_ID=RIVAL))
    codes = [one.wait(LONGEST) for one in (owner[0], rival)]
    for one, code in zip((owner[0], rival), codes, strict=True):
        if code is None:
            run.wrong.append("a supervisor hangs")
            _send([one.pid], signal.SIGKILL)
            one.wait(10)
    wrong = _verdict(run, homes, codes, model)
    wrong += arena.observer.leave(run.name).violations
    heads = [decode(Head, one.body, "HEAD") for one in run.trace.heads()]
    tally.rounds += 1
    tally.heads += len(heads)
    tally.takeovers += bool(heads and heads[-1].epoch > 1)
    tally.codes[codes[0], codes[1]] += 1
    if stopped.is_set():
        tally.stops[str(plan.strike.place), plan.strike.side] += 1
    if wrong:
        tally.broken[f"{plan}, kept in {run.folder}"] = wrong
        keep(run)
    else:
        remove(run)


def _verdict(run: Run, homes: list[Path], codes: list[int | None], model: Model) -> list[str]:
    """What is wrong after a round."""
    winners = [home for home, code in zip(homes, codes, strict=True) if code == 0]
    wrong = [] if set(codes) <= {0, 76} else [f"exit codes {codes}: {_said(run)}"]
    if not winners:
        return [*wrong, *run.wrong, f"nobody finished: {codes}"]
    for run.machine in winners:
        if ending(run.path, run.kind) != model.ending:
            wrong.append(f"another end in {run.machine}")
    return [*wrong, *judge(run, model.ending, tidy=False)]


def _said(run: Run) -> list[str]:
    return [file.read_text()[-400:] for file in sorted(run.folder.glob("machine-*/output-*"))]


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
