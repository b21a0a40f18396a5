"""A run on AWS Batch: look at it, read its log, end it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from runner.cluster.batch import ALIVE, Batch
from runner.cluster.batch_jobs import alive, submissions
from runner.cluster.waiting import Phase, State
from runner.errors import UsageError

PAUSE = 10.0
"""Seconds between two looks."""

_IDENTITY = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

Json = Mapping[str, Any]
Say = Callable[[str], None]


def is_identity(word: str) -> bool:
    """Whether a word is a job id of Batch."""
    return _IDENTITY.fullmatch(word) is not None


def look(batch: Batch, identity: str) -> State:
    """What a job does now."""
    job = batch.job(identity)
    return State(Phase.GONE, "Batch does not know it any more") if job is None else state(job)


def state(job: Json) -> State:
    """What a job does, from its description.

    status                            ->
    SUCCEEDED                         DONE
    FAILED                            FAILED, with the code of the last attempt
    RUNNING                           RUNNING
    any other, attempts               PENDING: after which end
    any other                         PENDING: what Batch says of it
    """
    attempts = [one.get("container", {}) for one in job.get("attempts", ())]
    ends = [one for one in attempts if one.get("exitCode") is not None or one.get("reason")]
    reason = job.get("statusReason", "")
    match job["status"]:
        case "SUCCEEDED":
            return State(Phase.DONE, "done")
        case "FAILED":
            container = job.get("container", {})
            last = container if container.get("exitCode") is not None else ends[-1] if ends else {}
            code = last.get("exitCode")
            why = ", ".join(filter(None, (last.get("reason"), reason)))
            said = "no exit code" if code is None else f"exit {code}"
            return State(
                Phase.FAILED, f"failed after {len(attempts)} attempts: {said}: {why}".rstrip(": "), code or 1
            )
        case "RUNNING":
            return State(Phase.RUNNING, f"runs, attempt {max(len(attempts), 1)}")
    words = f"{job['status']}: {reason or _USUAL.get(job['status'], '')}".rstrip(": ")
    if ends:
        last = ends[-1]
        words += f" (attempt {len(attempts)} ended: exit {last.get('exitCode')} {last.get('reason', '')})"
    return State(Phase.PENDING, words)


_USUAL = {
    "RUNNABLE": "waits for a machine; if for long, ask for less in resources, or see the limits and "
    "instance types of the compute environment",
    "STARTING": "a machine is there; the image is pulled",
}


def logs(batch: Batch, identity: str, again: bool) -> Iterator[str]:
    """The log of a job's newest attempt; `again`: as it is written, and of later attempts, until its end.

    Raises:
        UsageError: there is no such job, or no log yet.
    """
    stream, token = "", None
    while True:
        job = known(batch, identity)
        now = job.get("container", {}).get("logStreamName")
        if now is None and not again:
            raise UsageError(f"{identity} has no log: {state(job).words}\n    remedy: --follow waits for one")
        if now != stream:
            stream, token = now, None
        while True:
            lines, after = batch.lines(job, token)
            yield from lines
            if after == token:  # CloudWatch gives the same token at the end
                break
            token = after
        if not again or job["status"] not in ALIVE:
            return
        time.sleep(PAUSE)


def cancel(batch: Batch, found: Sequence[Json], name: str, say: Say) -> None:
    """End what is alive: cancelled where it waits, terminated where it runs (SIGTERM, 30 s, SIGKILL)."""
    living = alive(found)
    for job in living:
        operation = "TerminateJob" if job["status"] in ("STARTING", "RUNNING") else "CancelJob"
        batch.call(operation, jobId=job["jobId"], reason="runner cancel")
        say(
            f"{job['jobName']} ({job['jobId']}): {operation}; what is committed stays, and submit goes on "
            "from there"
        )
    if not living:
        say(f"{name}: nothing of it is alive")


def known(batch: Batch, identity: str) -> Json:
    """All about a job.

    Raises:
        UsageError: Batch does not know it.
    """
    job = batch.job(identity)
    if job is None:
        raise UsageError(
            f"{identity}: Batch does not know this job\n"
            "    remedy: see the region (AWS_REGION); Batch forgets a job a week after its end"
        )
    return job


def newest(batch: Batch, queue: str, run: str) -> Json:
    """The newest job of a run.

    Raises:
        UsageError: Batch remembers none.
    """
    found = submissions(batch, queue, run)
    if not found:
        raise UsageError(
            f"{run}: queue {queue} has no job of this run\n"
            "    remedy: submit it; Batch forgets jobs a week after their end"
        )
    return (alive(found) or found)[0]


def describe(batch: Batch, queue: str, run: str) -> list[str]:
    """A line for the newest job of a run, if any."""
    found = submissions(batch, queue, run)
    return [
        f"{job['jobName']} ({job['jobId']}) in queue {queue}: {look(batch, job['jobId']).words}"
        for job in (alive(found) or found)[:1]
    ]
