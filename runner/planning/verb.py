"""A job -> the document of its plan, and the exit code that a run would end with for what does not do."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoint.place import run_place
from runner.command import complain, say
from runner.durable import scratch
from runner.facts import Answer, Question
from runner.findings import Findings
from runner.manifest import Job
from runner.memory import Subject
from runner.plan import Geometry, geometry
from runner.planning import memory, numbers, words
from runner.planning.store import check_room, check_store
from runner.settings import Resolved
from runner.supervisor import fetch, identity, result
from runner.supervisor.ask import ask
from runner.supervisor.direct import grace_seconds
from runner.supervisor.fetching import fetched
from runner.supervisor.notices import Notices
from runner.supervisor.run_folder import RunFolder
from runner.supervisor.screen import Screen
from runner.supervisor.world import Placement, place


@dataclass(frozen=True)
class Asked:
    """What the command line says beside the job."""

    runs: Path
    """The parent of `runs/<name>`."""
    gpu: str | None = None
    """Type of GPU that memory is counted for."""
    sample: int | None = None
    """Rows to look at; None: all, up to `runner.facts.QUICK`."""
    steps_per_second: float | None = None
    price_per_hour: float | None = None
    """Of all machines of the job together, in whatever currency."""


def plan(resolved: Resolved, asked: Asked, as_json: bool) -> int:
    """Print the plan of a job. Returns 0, or the exit code of the first check that failed.

    Raises:
        Preempted: asked to stop.
    """
    document = make(resolved, asked)
    say(json.dumps(document, indent=2, ensure_ascii=False) if as_json else "\n".join(words.lines(document)))
    failed = [check for check in document["checks"] if check["status"] == "failed"]
    if failed:
        complain(f"{len(failed)} of {len(document['checks'])} checks failed; nothing was started")
    return int(document["exit_code"])


def make(resolved: Resolved, asked: Asked) -> dict[str, Any]:
    """The document; docs/plan.md says what its keys mean."""
    job, at = resolved.job, memory.where(asked.gpu)
    folder = RunFolder((asked.runs / job.name).absolute())
    checks = Findings()
    placement, cut = checks.make("geometry", lambda: _cut(job)) or (None, None)
    answer, found = _looked_at(job, folder, asked.sample, checks)

    model = None if answer is None else answer.model
    data = None if answer is None else answer.data
    training = room = None
    if data is not None and cut is not None:
        if model is not None:
            room = memory.section(Subject(model, data, job, cut, "single", at.device), at)
        training = numbers.training_section(job, data, cut, None if room is None else room["strategy"])
    steps = None if training is None else training["steps"]
    size = None
    if model is not None and data is not None and steps is not None:
        size = numbers.checkpoint_bytes(job, model, data, steps)
    checks.make("store", lambda: check_store(job, folder.path))
    if size is not None:
        checks.make("room for checkpoints", lambda: check_room(job, folder.path, size))
    grace = checks.make("grace", lambda: grace_seconds(os.environ))
    speed, source = _throughput(folder, asked.steps_per_second)
    where = run_place(job.checkpoints.uri, job.name, folder.path)
    return {
        "format": 1,
        "name": job.name,
        "exit_code": checks.exit_code,
        "job": job.model_dump(mode="json"),
        "sources": {key: origin for key, origin in resolved.sources.items() if origin != "default"},
        "revisions": {} if found is None else found.fetched.revisions,
        "model": None
        if answer is None or model is None
        else numbers.model_section(job, model, answer.weight_bytes),
        "data": None if data is None else data.model_dump(exclude={"savings"}),
        "speed": None if data is None else data.savings,
        "eval_rows": None if answer is None else answer.eval_rows,
        "training": training,
        "memory": room,
        "checkpoints": numbers.checkpoints_section(job, where, size),
        "grace": numbers.grace_section(grace, size, speed),
        "time": numbers.time_section(steps, speed, source, asked.price_per_hour),
        "downloads": _downloads(job, found),
        "notes": [
            *(() if placement is None else placement.lines),
            *(() if answer is None else answer.notes),
        ],
        "checks": [check.model_dump() for check in checks.made],
    }


def _cut(job: Job) -> tuple[Placement, Geometry]:
    """The processes and how they cut the batch; a job that takes every GPU it finds is planned for one a
    machine."""
    placement = place(job, gpus=0)
    return placement, geometry(job, placement.world)


def _looked_at(
    job: Job, folder: RunFolder, sample: int | None, checks: Findings
) -> tuple[Answer | None, fetch.Answer | None]:
    """Everything but the weights, fetched and looked at."""
    with Notices() as notices, contextlib.closing(Screen(sys.stderr)) as screen, scratch("plan") as work:

        def get() -> fetch.Answer:
            stored = identity.read(folder.identity)
            pins = {} if stored is None else stored.pins
            request = fetch.Request(job=job, train=True, pins=pins, weights=False)
            return fetched(request, work / "fetch", notices, screen.show)

        found = checks.make("sources", get)
        if found is None:
            return None, None
        question = Question(job=job, fetched=found.fetched, sample=sample)
        answer = checks.make("facts", lambda: ask(question, work, notices))
        if answer is not None:
            checks.made += answer.findings
    return answer, found


def _throughput(folder: RunFolder, given: float | None) -> tuple[float | None, str | None]:
    """Optimizer steps a second and who says so: the command line, else a former run of that name."""
    if given is not None:
        return given, "--steps-per-second"
    former = result.read(folder.result)
    if former is None or not former.steps or former.seconds <= 0:
        return None, None
    return former.steps / former.seconds, f"{folder.result}, loading and evaluation included"


def _downloads(job: Job, found: fetch.Answer | None) -> list[dict[str, Any]]:
    """What a run would fetch beside what the plan did."""
    if found is None or found.weights is None or found.weights.here:
        return []
    return [{"what": f"weights of {job.model.name_or_path}", "bytes": found.weights.bytes}]
