"""Kill runs and say what became of them: `python -m tests.chaos --kills 500`, about ten minutes on two cores.

After that, duels of two supervisors. Exits 1 when a promise was broken, or there were fewer kills than asked
for: with the seed, the run and the folder where everything of it is kept. `--only sweep-17-after --seed N`
plays one run again. With `--trainer` and `--job` the runs are those of another trainer, as storms: its
undisturbed end is what the others must have.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from tests.chaos import defects, duel, kinds
from tests.chaos.campaign import PER_STORM, Planned, Score, play, record_fetch, storm, sweep, undisturbed
from tests.chaos.nursery import Hurry
from tests.chaos.run import Arena, Kind

MOST = 12
"""Lines about one run."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--kills", type=int, default=500, help="at least so many")
    parser.add_argument("--duels", type=int, default=100, help="rounds of two supervisors on one run")
    parser.add_argument("--defects", action="store_true", help="plant some, and see that they are found")
    parser.add_argument("--minutes", type=float, default=15.0, help="begin no run after so long")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--lanes", type=int, default=3, help="runs beside each other")
    parser.add_argument("--every", type=int, default=1, help="sweep over every n-th call; 0: no sweep")
    parser.add_argument("--only", help="name of one run to play again")
    parser.add_argument("--trainer", help="command of another trainer; the plan's path is appended")
    parser.add_argument("--job", type=Path, help="its job, as JSON without name and checkpoints.uri")
    parser.add_argument("--kept", nargs="*", default=["adapter/*", "steps.jsonl"], help="what is compared")
    asked = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the server must not stay
    say(f"seed {asked.seed}")
    score, tally = Score(), duel.Tally()
    with kinds.arena() as arena:
        plans = _plans(arena, asked)
        if asked.only is not None:
            plans = (plan for plan in plans if plan.name == asked.only)
        enough = (lambda: score.runs > 0) if asked.only else (lambda: _enough(score, asked))
        if asked.kills:
            play(arena, plans, score, lanes=1 if asked.only else asked.lanes, until=enough, say=say)
            _tell(score.lines())
        undetected = list(_defects(arena)) if asked.defects else []
        if asked.duels and asked.only is None and asked.trainer is None:
            _duel(arena, asked, tally)
            _tell(tally.lines())
        say(f"{arena.proxy.total} calls of the store")
    broken = score.broken | tally.broken
    for run, wrong in broken.items():
        say(f"broken: seed {asked.seed}, {run}")
        _tell(f"    {one}" for one in wrong[:MOST])
    _tell(undetected)
    short = asked.only is None and score.kills < asked.kills
    if short:
        say(f"only {score.kills} of {asked.kills} kills in {asked.minutes:g} minutes")
    say(f"broken: {len(broken)} runs" if broken else "no promise was broken")
    return 1 if broken or short or undetected else 0


def _defects(arena: Arena) -> Iterator[str]:
    kind = record_fetch(arena, kinds.lean(arena.folder / "sources"))
    yield from defects.unfound(arena, undisturbed(arena, kind, "undisturbed-defect"))


def _duel(arena: Arena, asked: argparse.Namespace, tally: duel.Tally) -> None:
    hurry = Hurry(ttl=1.0, renew=0.2)
    kind = record_fetch(arena, kinds.lean(arena.folder / "sources", hurry, step_seconds=0.1))
    model = undisturbed(arena, kind, "undisturbed-duel")
    # Most of a duel is waiting for a lease to run out.
    duel.play(arena, model, duel.rounds(asked.seed, asked.duels, hurry.ttl), tally, 2 * asked.lanes, say)


def _enough(score: Score, asked: argparse.Namespace) -> bool:
    return score.minutes > asked.minutes or (score.kills >= asked.kills and score.runs >= asked.least)


def _plans(arena: Arena, asked: argparse.Namespace) -> Iterator[Planned]:
    """The sweep, then storms without end; every eighth with the other tests' trainer and the real fetcher."""
    asked.least = 0
    sources = arena.folder / "sources"
    hasty = Hurry(renew=0.2)
    if asked.trainer is not None:
        given = json.loads(asked.job.read_text())
        kind = Kind(tuple(shlex.split(asked.trainer)), given, hasty, kept=tuple(asked.kept))
        kind = record_fetch(arena, kind)
        model = undisturbed(arena, kind, "undisturbed")
        yield from (storm(model, asked.seed, number) for number in itertools.count())
    lean = record_fetch(arena, kinds.lean(sources))
    model = undisturbed(arena, lean, "undisturbed", 3 if asked.every == 1 else 1)
    say(f"undisturbed: {model.calls} calls in {model.seconds:.1f} s")
    if asked.every:
        planned = list(sweep(model, asked.seed, asked.every))
        asked.least = len(planned)
        yield from planned
    stormy = replace(model, kind=replace(lean, hurry=hasty))
    whole = None
    for number in itertools.count():
        if number % 8 == 7:
            whole = whole or undisturbed(arena, kinds.whole(sources, hasty), "undisturbed-whole")
            yield storm(whole, asked.seed, number, PER_STORM // 2, "whole")
        else:
            yield storm(stormy, asked.seed, number)


def _tell(lines: Iterable[str]) -> None:
    for line in lines:
        say(line)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
