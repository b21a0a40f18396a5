"""Campaigns: which run is killed where, in lanes beside each other, and the score of all of them.

    sweep    a kill before and after every store call of a first command, then of one that goes on
    storm    runs whose every command is killed at a random call or time, on this machine or another, before a
             store that fails now and then

What happens to a run follows from the seed and its name alone, so that one can be had again.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.chaos.proxy import Side, Strike
from tests.chaos.run import PREFIX, Arena, Kill, Kind, Move, Run, Target
from tests.chaos.verdict import Ending, ending, judge

PER_STORM = 12
"""Kills that one run has to bear."""


@dataclass(frozen=True)
class Model:
    """A kind of run, and what it does when nobody disturbs it."""

    kind: Kind
    ending: Ending
    calls: int
    """Of its store."""
    places: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Planned:
    """A run and the kills that it will have."""

    name: str
    model: Model
    kills: tuple[Kill, ...]
    faults: tuple[tuple[str, str, str], ...] = ()
    """Of the store: method, kind of key, and how, as `tests.fault_proxy` says it; once each."""


@dataclass
class Score:
    """All that has been counted."""

    runs: int = 0
    commands: int = 0
    unreached: int = 0
    heads: int = 0
    looks: int = 0
    verified: int = 0
    collected: int = 0
    probes: int = 0
    uploads: int = 0
    faults: int = 0
    victims: Counter[str] = field(default_factory=Counter)
    places: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Kills by place and side."""
    broken: dict[str, list[str]] = field(default_factory=dict)
    """What was wrong, by run and what was done to it."""
    slowest: tuple[float, str] = (0.0, "")
    """Seconds and name of the run that took longest."""
    began: float = field(default_factory=time.monotonic)

    @property
    def kills(self) -> int:
        """Moments at which something was killed."""
        return self.places.total()

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.began) / 60

    def add(self, run: Run, wrong: Sequence[str], plan: Sequence[Kill], seconds: float) -> None:
        """Count a run."""
        self.runs += 1
        self.slowest = max(self.slowest, (seconds, run.name))
        self.commands += run.commands
        self.unreached += run.unreached
        self.heads += len(run.trace.heads())
        for killed in run.kills:
            self.victims["+".join(sorted(killed.victims))] += 1
            side = "" if killed.kill.strike is None else killed.kill.strike.side
            self.places[killed.place, side] += 1
        if wrong:
            planned = "; ".join(str(kill) for kill in plan)
            self.broken[f"{run.name}, kept in {run.folder}, killed: {planned}"] = list(wrong)

    def lines(self) -> Iterator[str]:
        """The score for a person."""
        yield f"{self.kills} kills in {self.minutes:.1f} minutes: {_counted(self.victims)}"
        sides = sorted({side for _, side in self.places})
        for place in sorted({place for place, _ in self.places}):
            found = {side or "-": self.places[place, side] for side in sides if self.places[place, side]}
            yield f"  {place:26} " + ", ".join(f"{side} {number}" for side, number in found.items())
        yield (
            f"{self.runs} runs, {self.commands} commands, {self.unreached} planned kills came too late; "
            f"{self.heads} accepted writes of HEAD; longest run: {self.slowest[1]}, {self.slowest[0]:.0f} s"
        )
        yield (
            f"observer: {self.looks} looks, {self.verified} checkpoints verified whole, {self.collected} "
            "collected while they were read"
        )
        yield f"the store failed {self.faults} times in between"
        yield f"left by killed commands: {self.probes} objects of probes, {self.uploads} unfinished uploads"


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counter.most_common())


def undisturbed(arena: Arena, kind: Kind, name: str, times: int = 1) -> Model:
    """Run a kind to its end without a kill; its fetcher's answer is recorded if it has none."""
    calls, places, seconds = 0, [], 0.0
    expected: Ending = {}
    for number in range(times):
        run = Run(arena, f"{name}-{number}", kind)
        began = time.monotonic()
        run.to_end()
        seconds = time.monotonic() - began
        calls = max(calls, run.trace.calls)
        places += [place for place in run.trace.places if place not in places]
        expected = ending(run.path, kind)
        wrong = judge(run, expected)
        assert not wrong, (wrong, run.folder)
        remove(run)
    return Model(kind, expected, calls, tuple(places), seconds)


def record_fetch(arena: Arena, kind: Kind) -> Kind:
    """The same kind with the answer of its fetcher in a file, which saves half a second in every command."""
    run = Run(arena, "fetch", kind)
    run.to_end()
    assert not run.wrong, run.wrong
    answer = arena.folder / f"answer-{time.monotonic_ns()}.json"
    shutil.copy(run.path / "fetch" / "answer.json", answer)
    remove(run)
    return replace(kind, fetched=str(answer))


def sweep(model: Model, seed: int, every: int = 1, offset: int = 0) -> Iterator[Planned]:
    """A kill before and after every call of a first command, and one at the next call of a second command.

    Args:
        every: 1 takes each call, n every n-th, beginning at `offset`.
    """
    targets: tuple[Target, ...] = ("supervisor", "both")
    sides: tuple[Side, ...] = ("before", "after")
    count = 0
    for number in range(1 + offset, model.calls + 1, every):
        for side in sides:
            dice = random.Random(f"{seed}-sweep-{number}-{side}")
            first = Kill(dice.choice(targets), Strike(number, side))
            # The one that goes on restores, and sends less: about as many calls.
            again = Strike(1 + count * every % model.calls, dice.choice(sides))
            count += 1
            yield Planned(f"sweep-{number}-{side}", model, (first, Kill(dice.choice(targets), again)))
    for number, (place, at) in enumerate(LAST):
        for side in sides:
            yield Planned(f"last-{number}-{side}", model, (Kill("supervisor", Strike(at, side, place)),))


LAST = (("PUT checkpoints of the end", 1), ("PUT HEAD done", 1), ("PUT HEAD done", 2))
"""The calls of the end, whose numbers depend on how many checkpoints were replaced while they waited."""


def storm(model: Model, seed: int, number: int, kills: int = PER_STORM, name: str = "storm") -> Planned:
    """One run of a storm."""
    dice = random.Random(f"{seed}-{name}-{number}")
    killed = tuple(_random(model, dice) for _ in range(kills))
    return Planned(f"{name}-{number}", model, killed, tuple(_fault(dice) for _ in range(dice.randint(0, 12))))


def _fault(dice: random.Random) -> tuple[str, str, str]:
    """One failure of the store, of those that may pass."""
    method = dice.choice(("PUT", "PUT", "GET", "POST", "DELETE"))
    how = ["before", "after", "500", "503", "0.2s", *(["truncate"] if method == "GET" else ["409"])]
    return (
        method,
        dice.choice(("probe", "run.json", "HEAD", "blobs", "checkpoints", "events")),
        dice.choice(how),
    )


def _random(model: Model, dice: random.Random) -> Kill:
    target: Target = dice.choices(("supervisor", "both", "rank"), (4, 3, 3))[0]
    side: Side = dice.choices(("before", "after", "late"), (4, 4, 2))[0]
    move: Move | None = dice.choices((None, "fresh", "former"), (8, 1, 1))[0]
    what = dice.random()
    if target == "rank":  # it is there for the later calls only
        if what < 0.6:
            return Kill(target, seconds=dice.uniform(0, 0.5) * model.seconds, move=move)
        return Kill(target, Strike(dice.randint(model.calls // 2, model.calls), side), move=move)
    if what < 0.3:
        return Kill(target, seconds=dice.uniform(0, model.seconds), move=move)
    if what < 0.5:
        return Kill(target, Strike(dice.randint(1, 2), side, dice.choice(model.places)), move=move)
    return Kill(target, Strike(dice.randint(1, model.calls), side), move=move)


def play(
    arena: Arena,
    plans: Iterator[Planned],
    score: Score,
    *,
    lanes: int,
    until: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Play runs, several beside each other, until there are no more, or it is enough.

    Args:
        until: asked before each new run; True begins no more.
    """
    with ThreadPoolExecutor(lanes) as pool:
        under_way: dict[Future[None], str] = {}
        spoken = time.monotonic()
        while True:
            while len(under_way) < lanes and not until() and (plan := next(plans, None)) is not None:
                under_way[pool.submit(_play, arena, plan, score)] = plan.name
            if not under_way:
                return
            done, _ = wait(under_way, 5, FIRST_COMPLETED)
            for one in done:
                del under_way[one]
                one.result()
            if time.monotonic() - spoken > 15:
                spoken = time.monotonic()
                say(
                    f"{score.minutes:5.1f} min: {score.kills} kills, {score.runs} runs, "
                    f"{len(score.broken)} broken; now {', '.join(under_way.values())}"
                )


def _play(arena: Arena, plan: Planned, score: Score) -> None:
    began = time.monotonic()
    run = Run(arena, plan.name, plan.model.kind)
    arena.observer.watch(run.name, PREFIX)
    faults = [
        arena.proxy.fail(method, f"/{run.name}/{PREFIX}{kind}.*", how) for method, kind, how in plan.faults
    ]
    run.to_end(plan.kills)
    score.faults += sum(fault.met for fault in faults)
    wrong = judge(run, plan.model.ending)
    report = arena.observer.leave(run.name)
    wrong += report.violations
    score.looks += report.looks
    score.verified += report.verified
    score.collected += report.collected
    score.probes += sum(key.startswith(f"{PREFIX}probe/") for key in run.bucket.listed())
    score.uploads += run.bucket.uploads()
    score.add(run, wrong, plan.kills, time.monotonic() - began)
    if wrong:
        keep(run)
    else:
        remove(run)


def keep(run: Run) -> None:
    """For whoever looks for the reason: what the store had, and every write in its order."""
    folder = Path(run.folder, "store")
    for key in run.bucket.listed():
        file = folder / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(run.bucket.read(key) or b"")
    lines = [f"{one.when:.3f} {one.method} {one.key} if {one.condition}" for one in run.trace.mutations]
    Path(run.folder, "mutations").write_text("\n".join(lines) + "\n")
    Path(run.folder, "kills").write_text("\n".join(str(killed) for killed in run.kills) + "\n")
    run.bucket.remove()


def remove(run: Run) -> None:
    shutil.rmtree(run.folder)
    run.bucket.remove()
    run.arena.proxy.forget(run.name)
