"""`runner status`: reads a run's store, and prints where the run stands, for people or as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

from runner import events
from runner.checkpoint.find import nothing
from runner.checkpoint.head import EVENTS, HEAD, Head
from runner.checkpoint.lease import decoded, refuse_headless
from runner.checkpoint.store import Store
from runner.checkpoint_verbs import closing, place_of
from runner.command import say
from runner.errors import RunnerError
from runner.events import Event
from runner.manifest import Job
from runner.run_words import named
from runner.status.standing import Standing, standing
from runner.supervisor.progress import change_lines, duration, moment, printable

_PARTS = 4
"""Parts of the events that are read, the newest of the owner that wrote last."""

_LONGEST = 200
"""Characters of a text in a line."""

_WORDS = {
    "starting": "starting: it fetches, restores, or waits for other nodes",
    "running": "running",
    "waiting": "waiting for the store, which is further behind than checkpoints.max_loss",
    "ending": "ending: it sends what is left",
    "lost": "lost: no word of its owner; the next train takes over, from the newest checkpoint",
    "preempted": "preempted: the same command goes on",
    "failed": "failed",
    "released": "released: the next train goes on",
    "done": "done",
    "removing": "being removed",
}


def status(arguments: argparse.Namespace) -> int:
    """The verb. Returns 0, whatever the state of the run is.

    Raises:
        DataError: there is no run, or its `HEAD` is damaged.
        AccessDenied: one may not look. That is another thing.
        StorageError: the store is silent.
    """
    run = named("status", arguments.words, arguments.runs)
    run.reach(arguments)
    arguments.submissions = None if run.job is None else _submissions(run.job, arguments.context)
    return closing(_status)(arguments)


def _status(arguments: argparse.Namespace) -> int:
    store, submissions = place_of(arguments).store(), arguments.submissions
    here = read(store)
    if here is None and not submissions:
        raise nothing(store)
    if here is None and arguments.json:
        say(json.dumps({"place": store.place, "state": None, "submissions": submissions}, indent=2))
        return 0
    if here is None:
        say("\n".join([store.place, "  nothing yet: no command has begun the run", *_indented(submissions)]))
        return 0
    if arguments.json:
        say(json.dumps(document(store.place, here, submissions), indent=2))
    else:
        say("\n".join([text(store.place, here), *_indented(submissions or [])]))
    return 0


def _indented(submissions: list[str]) -> list[str]:
    return [f"  {line}" for line in submissions]


def _submissions(job: Job, context: str | None) -> list[str] | None:
    """What its cluster or queue says of a job; None where the job names none. One that does not answer is no
    failure: the store has the run."""
    if job.kubernetes is None and job.aws_batch is None:
        return None
    from runner.cluster.act import describe

    try:
        return describe(job, context) or ["no submission of it is remembered"]
    except RunnerError as error:
        return [f"its submissions are not known: {_line(str(error))}"]


def read(store: Store) -> Standing | None:
    """Where the run of a store stands; None: nobody has begun it.

    `HEAD` is read once: it moves while one looks.

    Raises:
        DataError, AccessDenied, StorageError: as `status`.
    """
    if (held := store.read(HEAD)) is None:
        refuse_headless(store)
        return None
    head = decoded(store, held)
    newest = None if head.newest is None else store.read(head.newest.key)
    return standing(head, held.age, None if newest is None else newest.age, _events(store, head))


def _events(store: Store, head: Head) -> Iterator[Event]:
    match = re.fullmatch(rf"{EVENTS}(\d+)-(\d+)\.jsonl", head.events or "")
    if match is None:
        return
    epoch, number = match[1], int(match[2])
    for part in range(max(0, number + 1 - _PARTS), number + 1):
        kept = store.read(f"{EVENTS}{epoch}-{part:06d}.jsonl")
        for line in [] if kept is None else kept.data.splitlines():
            if (event := events.parse(line)) is not None:
                yield event


def document(place: str, here: Standing, submissions: list[str] | None = None) -> dict[str, Any]:
    """`status --json`."""
    fields = dataclasses.asdict(here)
    loss = None if here.loss is None else {**fields["loss"], "trend": here.loss.trend}
    derived = {"loss": loss, "preemptions": here.preemptions, "submissions": submissions}
    return {"place": place, **fields, **derived}


def text(place: str, here: Standing) -> str:
    """For people."""
    lines = [place, f"  {_WORDS[here.state]}{_more(here)}"]
    if here.error:
        lines.append(f"  ended with {_known(here.exit_code)}: {_line(str(here.error))}")
    lines.append(f"  step {_known(here.step)} of {_known(here.steps)}{_loss(here)}{_eta(here)}")
    if here.metrics is not None:
        lines += [f"  {line}" for line in change_lines(here.metrics.get("before"), here.metrics.get("after"))]
    if here.checkpoint is None:
        lines.append("  no checkpoint is committed")
    else:
        age = "" if here.checkpoint_age is None else f", {duration(here.checkpoint_age)} ago"
        lines.append(f"  checkpoint {here.checkpoint}, step {here.checkpoint_step}{age}")
    if here.at_risk is not None:
        lines.append(f"  at risk: {duration(here.at_risk)} of training that no checkpoint has")
    if here.noticed is not None:
        kinds = f" ({here.noticed} after a notice, {here.lost} without)" if here.preemptions else ""
        lines.append(f"  attempts {here.attempts}, preemptions survived {here.preemptions}{kinds}")
    lines += [
        f"    attempt {one.get('attempt')} from step {one.get('step')}: {_line(str(one.get('reason')))}"
        for one in here.restarts[-3:]
    ]
    if here.events:
        lines.append("  last events:")
        lines += [f"    {moment(event.get('time')) or '?'}  {_line(_words(event))}" for event in here.events]
    return printable("\n".join(lines))


def _more(here: Standing) -> str:
    if here.state in ("done", "removing"):
        return ""
    age = "unknown" if here.lease_age is None else f"{duration(here.lease_age)} ago"
    where = (
        f", on {here.owner['host']}"
        if here.state in ("starting", "running", "waiting", "ending", "lost")
        else ""
    )
    phase = (
        f" ({here.phase})" if here.phase is not None and here.phase not in ("start", "train", "wait") else ""
    )
    return f"{phase}{where}, epoch {here.epoch}, last word {age}"


def _loss(here: Standing) -> str:
    if here.loss is None:
        return ""
    if here.loss.trend is None:
        return f", loss {here.loss.last:.4f}"
    way = f"{here.loss.before:.4f} -> {here.loss.recent:.4f}"
    return f", loss {here.loss.last:.4f} ({here.loss.trend} over {here.loss.steps} steps: {way})"


def _eta(here: Standing) -> str:
    return "" if here.eta is None else f", ETA {duration(here.eta)}"


def _words(event: Event) -> str:
    left_out = ("time", "attempt", "event", "versions", "metrics")
    said = [f"{key} {value}" for key, value in event.items() if key not in left_out and value is not None]
    return " ".join([str(event["event"]), *said])


def _line(text: str) -> str:
    return printable(text.replace("\n", " "))[:_LONGEST]


def _known(value: int | None) -> str:
    return "?" if value is None else f"{value}"
